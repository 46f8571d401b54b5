"""lm-eval's tasks with images: its multimodal model, with fewer visual tokens where a folder says so."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import yaml

import structprune
from structprune.calibration.image_questions import ImageQuestion
from structprune.demo.scenes import render
from structprune.demo.sights import HELD_OUT_SEED, visual_questions
from structprune.errors import UsageError
from structprune.evaluation.harness import harness
from structprune.pruners import catalogue
from structprune.runtime import forward
from tests.conftest import Command
from tests.methods import QUICK, short_runs
from tests.tiny import tiny, tokenizer

pytest.importorskip("PIL")
pytest.importorskip("lm_eval")

COUNT, LEFT = 5, 16


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # It asks pip and the machine for their state, which takes seconds and goes into lm-eval's own JSON only.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    with short_runs():
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a task on scenes of the demo, one that compares answers, one without images."""
    folder = tmp_path_factory.mktemp("tasks")
    images, rows = folder / "images", []
    images.mkdir()
    for number, one in enumerate(islice(visual_questions(HELD_OUT_SEED), COUNT)):
        name = f"{number}.png"
        ImageQuestion(render(one.scene), one.question).open_image().save(images / name)
        rows.append({"file_name": name, "question": one.question, "answer": one.answer})
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scenes = {
        "task": "scenes",
        "dataset_path": "imagefolder",
        "dataset_kwargs": {"data_dir": str(images)},
        "test_split": "train",
        "output_type": "generate_until",
        "doc_to_image": ["image"],
        "doc_to_text": "USER: <image>\n{{question}} ASSISTANT:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        "filter_list": [
            {
                "name": "word",
                "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    compared = scenes | {
        "task": "compared",
        "output_type": "multiple_choice",
        "doc_to_choice": ["red", "blue"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    del compared["generation_kwargs"], compared["filter_list"]
    blind = {key: value for key, value in scenes.items() if key != "doc_to_image"} | {"task": "blind"}
    for task in (scenes, compared, blind):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    pruner = catalogue.find("divprune")(target={"tokens": LEFT})
    with short_runs():
        structprune.prune("demo-vision", out, pruner, evaluate={"skip": True}, writing=QUICK["writing"])
    return out


def test_tasks_with_images_are_answered_with_the_tokens_that_are_left(
    tasks: Path, pruned: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    narrowed = forward.Forward.narrowed

    def counted(run: forward.Forward, index: int, *rest: object) -> object:
        if index == 0 and run.images is not None:
            seen.append((len(run.images.sizes), int(run.visual_tokens(run.images).sum())))
        return narrowed(run, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(forward.Forward, "narrowed", counted)
    words = ["--tasks", "scenes", "--include-path", tasks, "--dtype", "float32", "--batch-size", 2]
    found = command("evaluate", pruned, "--compare", "demo-vision", *words, "--json").json
    figures = found["tasks"]["scenes"]["exact_match,word"]
    assert figures["dense"] == 1 and figures["model"] >= 0.4
    # Only the pruned model's forwards have an engine: two batches of two prompts and one of one.
    assert seen == [(2, 2 * LEFT), (2, 2 * LEFT), (1, LEFT)]


def test_what_lm_eval_cannot_do_with_images_is_refused_by_name(
    tasks: Path, pruned: Path, command: Command
) -> None:
    for names, said in (
        ("compared", "compared: images with output_type multiple_choice"),
        ("scenes,blind", "scenes has images, and others have none"),
    ):
        done = command("evaluate", pruned, "--tasks", names, "--include-path", tasks)
        assert done.code == 2 and said in done.err


def test_a_model_without_a_processor_reads_no_images(tasks: Path, llama: Path, command: Command) -> None:
    done = command("evaluate", llama, "--tasks", "scenes", "--include-path", tasks)
    assert done.code == 3 and "there is no processor for images" in done.err
    with pytest.raises(UsageError, match="no processor is there to read them"):
        harness(tiny("llama"), tokenizer(), ["scenes"], include_path=tasks)
