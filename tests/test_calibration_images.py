"""Questions on images become batches by the model's own processor; what cannot be one stops with one line."""

import json
import sys

import pytest
import torch

import structprune
from structprune.calibration.image_questions import asks_on_images, read_questions
from structprune.calibration.images import (
    batch_of,
    check_placeholders,
    hash_of_batches,
    load_questions,
    prompt_of,
)
from structprune.calibration.text_source import TextSource
from structprune.errors import EnvironmentFailure, InputError, UsageError
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.recipe.recipe import assemble
from tests.seeing import ROWS, save_rows, save_seeing
from tests.tiny import VOCABULARY, save_tiny

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return save_seeing(tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(scope="module")
def processor(seeing):
    return structprune.processor(seeing)


def source(path) -> TextSource:
    return TextSource(str(path))


def test_a_batch_is_what_the_processor_makes_of_the_plain_prompt(tmp_path, seeing, processor):
    questions = read_questions(source(save_rows(tmp_path)))
    batch = batch_of(questions, processor)
    prompts = [f"USER: <image>\n{row['question']} ASSISTANT:" for row in ROWS]
    assert [prompt_of(one, processor) for one in questions] == prompts
    # Sixteen patches of 8 x 8 make an image; prompts are padded in front.
    assert (batch["input_ids"] == VOCABULARY - 1).sum(1).tolist() == [16, 16, 16]
    assert tuple(batch["pixel_values"].shape) == (3, 3, 32, 32)
    lengths = batch["attention_mask"].sum(1)
    assert int(lengths.max()) == batch["input_ids"].shape[1] and int(lengths.min()) < int(lengths.max())
    assert batch["attention_mask"][2, 0] == 0 and batch["attention_mask"][2, -1] == 1
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    model = open_model(seeing)
    assert tuple(logits(model, batch).shape) == (*batch["input_ids"].shape, VOCABULARY)


def test_a_chat_template_writes_the_prompt_where_there_is_one(tmp_path):
    template = "<s>[{{ messages[0]['content'][1]['text'] }}]<image>{% if add_generation_prompt %}!{% endif %}"
    processor = structprune.processor(save_seeing(tmp_path / "model", chat_template=template))
    (question, *_) = read_questions(source(save_rows(tmp_path)))
    assert prompt_of(question, processor) == "<s>[What is it?]<image>!"
    ids = batch_of([question], processor)["input_ids"][0]
    assert int((ids == 1).sum()) == 1  # the template wrote the beginning, so the tokenizer does not


def test_the_same_seed_draws_the_same_batches_and_the_rest_is_left(tmp_path, processor):
    path = source(save_rows(tmp_path))
    one, other = (load_questions(path, processor, samples=2, seed=seed, batch_size=1) for seed in (0, 0))
    assert one.facts == other.facts and one.facts["samples"] == 2 and one.facts["questions_available"] == 3
    assert len(one.batches) == 2 and len(one.left.questions) == 1
    asked = {one.left.questions[0].question} | {row["question"] for row in ROWS}
    assert len(asked) == 3
    assert load_questions(path, processor, samples=2, seed=1).facts["sha256"] != one.facts["sha256"]


def test_the_hash_covers_pixels(tmp_path, processor):
    path = save_rows(tmp_path)
    before = load_questions(source(path), processor, samples=3).facts["sha256"]
    assert load_questions(source(path), processor, samples=3).facts["sha256"] == before
    (tmp_path / "images/one.png").write_bytes((tmp_path / "images/two.png").read_bytes())
    assert load_questions(source(path), processor, samples=3).facts["sha256"] != before
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    assert hash_of_batches([batch]) != hash_of_batches([{"pixel_values": batch["input_ids"]}])


def test_fewer_questions_than_samples_are_taken_whole_with_a_warning(tmp_path, processor, caplog):
    assert load_questions(source(save_rows(tmp_path)), processor, samples=9).facts["samples"] == 3
    assert "3 questions, fewer than 9 samples" in caplog.text


def test_the_first_row_tells_questions_from_texts(tmp_path):
    save_rows(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "a", "image": "b"}\n')
    assert asks_on_images(source(tmp_path / "asked.jsonl"))
    assert asks_on_images(TextSource("demo-vision"))
    assert not asks_on_images(TextSource(str(tmp_path / "asked.jsonl"), column="question"))
    assert not asks_on_images(source(tmp_path / "text.jsonl"))
    assert not asks_on_images(TextSource("demo"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "images/three.png", "question": "?"}, r"line 1: .*three.png: no such image"),
        ({"question": "What is it?"}, r"line 1: key 'image' is missing"),
        ({"image": "images/one.png"}, r"line 1: key 'question' is missing"),
        ({"image": "images/one.png", "question": 3}, r"line 1: key 'question' holds 3, expected text"),
        ({"image": "images/one.png", "question": "?", "answer": ""}, r"line 1: key 'answer' holds ''"),
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path, row, said):
    with pytest.raises(InputError, match=said):
        read_questions(source(save_rows(tmp_path, [row])))


def test_an_empty_file_and_a_file_that_is_no_image_are_named(tmp_path, processor):
    with pytest.raises(InputError, match="no questions in it"):
        read_questions(source(save_rows(tmp_path, [])))
    path = save_rows(tmp_path)
    (tmp_path / "images/one.png").write_text("not an image")
    with pytest.raises(InputError, match=r"line 1: .*one.png is not a readable image"):
        batch_of(read_questions(source(path)), processor)


def test_a_placeholder_inside_a_question_is_refused(tmp_path, processor):
    path = save_rows(tmp_path, [ROWS[0] | {"question": "Is <image> a cat?"}])
    with pytest.raises(InputError, match=r"line 1: the question holds '<image>'"):
        load_questions(source(path), processor)


def test_placeholders_that_do_not_match_the_model_are_refused(tmp_path):
    # Patches of 4 where the model has patches of 8: 64 placeholders for 16 features.
    folder = save_seeing(tmp_path / "model", patch_size=4)
    batch = batch_of(read_questions(source(save_rows(tmp_path)))[:1], structprune.processor(folder))
    with pytest.raises(InputError, match=r"writes 64 placeholders for 1 images, and the model refuses"):
        check_placeholders(open_model(folder), batch)
    with pytest.raises(InputError, match="no placeholder that the model knows"):
        check_placeholders(open_model(folder), {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_a_prompt_longer_than_the_model_is_refused(tmp_path, processor):
    with pytest.raises(InputError, match="more than the model's 9 positions"):
        load_questions(source(save_rows(tmp_path)), processor, max_length=9)


def test_without_the_extra_the_error_names_it(tmp_path, seeing, monkeypatch):
    questions = read_questions(source(save_rows(tmp_path)))
    monkeypatch.setitem(sys.modules, "PIL", None)
    for refused in (lambda: structprune.processor(seeing), questions[0].open_image):
        with pytest.raises(EnvironmentFailure) as caught:
            refused()
        assert "structprune[vision]" in caught.value.hint


def test_a_model_of_text_has_no_processor(tmp_path):
    with pytest.raises(InputError, match="there is no processor for images"):
        structprune.processor(save_tiny("llama", tmp_path / "llama"))
    broken = save_seeing(tmp_path / "broken")
    (broken / "processor_config.json").write_text("{")
    with pytest.raises(InputError, match="the processor cannot be opened"):
        structprune.processor(broken)


def test_the_vision_demo_looks_at_its_own_questions_unless_told_otherwise():
    raw = {"model": "demo-vision", "output": "out", "prune": "wanda"}
    assert assemble(raw).calibration.source == "demo-vision"
    assert assemble(raw | {"calibration": {"samples": 4}}).calibration.source == "demo-vision"
    assert assemble(raw | {"calibration": {"source": "mine.txt"}}).calibration.source == "mine.txt"
    assert assemble(raw | {"model": "demo"}).calibration.source == "demo"


def test_a_vision_model_is_pruned_on_images_and_proved_with_one(tmp_path, seeing):
    rows = save_rows(tmp_path)
    report = structprune.prune(
        str(seeing), tmp_path / "out", "wanda", calibration={"source": str(rows), "samples": 2}
    )
    assert report["calibration"]["images"] and report["calibration"]["samples"] == 2
    (answered,) = report["evaluation"]["questions"].values()
    assert answered["asked"] == 1  # the question that was left
    (reload,) = [row for row in report["verification"]["checks"] if row["name"] == "reload"]
    assert reload["ok"] and "with an image" in reload["detail"]
    card = (tmp_path / "out/README.md").read_text()
    assert "2 questions on images" in card and "Right answers, asked, " in card


def test_a_length_for_questions_and_a_model_that_does_not_see_are_refused(tmp_path, seeing):
    rows = {"source": str(save_rows(tmp_path))}
    with pytest.raises(UsageError, match=r"calibration.length is 16, and questions on images are read whole"):
        structprune.prune(str(seeing), tmp_path / "out", "wanda", calibration=rows | {"length": 16})
    with pytest.raises(InputError, match="there is no processor for images"):
        structprune.prune(
            str(save_tiny("llama", tmp_path / "llama")), tmp_path / "out", "wanda", calibration=rows
        )
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reads_the_questions(tmp_path, seeing):
    raw = {"model": str(seeing), "output": str(tmp_path / "out"), "prune": "wanda"}
    rows = save_rows(tmp_path, [{"image": "images/one.png", "question": "What is it?"}])
    assert structprune.dry_run(assemble(raw | {"calibration": {"source": str(rows)}}))["stages"]
    (tmp_path / "images/one.png").unlink()
    with pytest.raises(InputError, match="no such image"):
        structprune.dry_run(assemble(raw | {"calibration": {"source": str(rows)}}))


def test_rows_of_json_that_are_no_objects_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(["image"]) + "\n")
    with pytest.raises(InputError, match="line 1 holds a list, expected an object"):
        read_questions(source(path))
