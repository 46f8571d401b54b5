"""Answers to questions on images: what is right, what the figures are, how well the shipped model answers."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import structprune
from structprune.calibration.image_questions import ImageQuestion
from structprune.calibration.text_source import DEMO_VISION, TextSource
from structprune.checkpoint.locate import resolve
from structprune.demo.sights import SIGHTS
from structprune.errors import InputError, QualityError, UsageError
from structprune.evaluation import questions as module
from structprune.evaluation.questions import (
    Answers,
    ask_questions,
    held_out_questions,
    is_right,
    mcnemar,
    question_exam,
    read_question_exam,
)
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.recipe.options import EvaluateOptions
from tests.seeing import ROWS, save_rows, save_seeing

pytest.importorskip("PIL")


def test_an_answer_is_right_with_the_expected_first_words():
    assert is_right(" Red.", "red")
    assert is_right("Two dogs, on a sofa", "two dogs")
    assert not is_right("dark red", "red")
    assert not is_right("reddish", "red")
    assert not is_right("", "red")


def test_mcnemar_by_hand():
    # Of 10 that only one gets right all are the one's: 2 / 2^10. One of 4: 2 (1 + 4) / 16. Level: 1.
    assert mcnemar(10, 0) == mcnemar(0, 10) == 2 / 1024
    assert mcnemar(1, 3) == 10 / 16
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0
    assert 0 < mcnemar(1500, 500) < 1e-40  # more than a float's exponent holds on the way


def exam_of(kinds: list[str]):
    asked = [ImageQuestion(torch.zeros(3, 8, 8, dtype=torch.uint8), "?", "a", kind, "row") for kind in kinds]
    return question_exam(TextSource("mine.jsonl"), asked, SimpleNamespace())


def test_figures_by_hand(monkeypatch):
    exam = exam_of(["one", "one", "two"])
    monkeypatch.setattr(module, "batch_of", lambda asked, _: {"input_ids": torch.ones(len(asked), 1)})
    monkeypatch.setattr(module, "check_placeholders", lambda *_: None)
    half, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    # Batches of two: the dense model gets all right, the other the first only.
    said = {
        "dense": [Answers([True, True], torch.cat([half, half])), Answers([True], half)],
        "model": [Answers([True, False], torch.cat([half, sure])), Answers([False], half)],
    }
    monkeypatch.setattr(module, "answer", lambda model, *_: said[model.name].pop(0))
    model, dense = (SimpleNamespace(name=name, device="cpu") for name in ("model", "dense"))
    told: list[tuple[str, int, int]] = []
    found = ask_questions(
        model, exam, dense=dense, batch_size=2, progress=lambda *report: told.append(report)
    )
    assert [report[1:] for report in told] == [(0, 2), (1, 2), (2, 2)]
    assert found["asked"] == 3
    assert found["accuracy"] == {"model": 1 / 3, "dense": 1.0}
    assert found["kinds"] == {
        "one": {"asked": 2, "model": 0.5, "dense": 1.0},
        "two": {"asked": 1, "model": 0.0, "dense": 1.0},
    }
    # KL((1/2, 1/2) || (9/10, 1/10)) = log(5/3), once in three.
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert found["kl"] == pytest.approx(kl / 3, rel=1e-5)
    assert found["kl_se"] == pytest.approx(kl / 3, rel=1e-5)
    assert found["mcnemar"] == {"dense_only": 2, "model_only": 0, "p": 0.5}


def test_without_a_dense_model_nothing_is_compared(tmp_path):
    folder = save_seeing(tmp_path / "model")
    exam = read_question_exam(str(save_rows(tmp_path)), structprune.processor(folder))
    found = ask_questions(open_model(folder), exam)
    assert found["mcnemar"] is None and found["kl"] is None
    assert found["accuracy"]["dense"] is None and set(found["kinds"]) == {"what", "presence"}
    # The same model beside itself: no question is only one's, and nothing diverges.
    beside = ask_questions(open_model(folder), exam, dense=open_model(folder), batch_size=2)
    assert beside["kl"] == 0 and beside["mcnemar"] == {"dense_only": 0, "model_only": 0, "p": 1.0}
    assert beside["accuracy"]["model"] == beside["accuracy"]["dense"] == found["accuracy"]["model"]


def test_a_model_that_computes_nan_is_named(tmp_path):
    folder = save_seeing(tmp_path / "model")
    exam = read_question_exam(str(save_rows(tmp_path)), structprune.processor(folder))
    model = open_model(folder)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(QualityError, match="line 1: the logits of its answer are not finite"):
        ask_questions(model, exam)


def test_a_question_without_an_answer_and_a_streamed_model_are_refused(tmp_path):
    processor = structprune.processor(save_seeing(tmp_path / "model"))
    rows = save_rows(tmp_path, [ROWS[0], {"image": "images/one.png", "question": "?"}])
    with pytest.raises(InputError, match="line 2: key 'answer' is missing"):
        read_question_exam(str(rows), processor)
    assert len(read_question_exam(str(rows), processor, limit=1).questions) == 1
    with pytest.raises(UsageError, match="need the whole model in memory"):
        read_question_exam(DEMO_VISION, processor, streamed=True)


def test_evaluate_asks_the_questions_of_a_file(tmp_path):
    folder, rows = save_seeing(tmp_path / "model"), save_rows(tmp_path)
    options = EvaluateOptions(questions=str(rows), compare=str(folder))
    found = structprune.evaluate(str(folder), options)
    assert found["questions"]["asked"]["mcnemar"]["p"] == 1.0
    assert found["protocol"]["questions"]["asked"]["questions"] == 3
    assert json.dumps(found)
    with pytest.raises(UsageError, match="need the whole model in memory"):
        structprune.evaluate(str(folder), options, opening=Opening(stream=True))


def test_held_out_questions_are_one_of_each_kind_on_every_image():
    asked = held_out_questions(12)
    assert [one.kind for one in asked] == [*SIGHTS, *SIGHTS, *SIGHTS[:2]]
    assert asked[0].image is not asked[5].image and torch.equal(asked[0].image, asked[4].image)
    assert asked[0].open_image().size == (96, 96)


def test_the_shipped_model_answers_held_out_questions():
    folder = resolve(DEMO_VISION)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    processor = structprune.processor(folder)
    exam = read_question_exam(DEMO_VISION, processor, limit=150)
    found = ask_questions(open_model(folder, Opening(dtype="float32")), exam, batch_size=50)
    assert found["accuracy"]["model"] >= 0.85
    # No kind's commonest answer is given to more than the first share of its questions.
    for kind, commonest in {
        "colour": 0.25,
        "shape": 0.35,
        "place": 0.2,
        "count": 0.35,
        "presence": 0.56,
    }.items():
        assert found["kinds"][kind]["model"] >= commonest + 0.25, kind


def test_the_shipped_model_is_blind_without_its_image():
    folder = resolve(DEMO_VISION)
    exam = read_question_exam(DEMO_VISION, structprune.processor(folder), limit=50)
    blank = torch.full((3, 96, 96), 40, dtype=torch.uint8)
    asked = tuple(replace(one, image=blank) for one in exam.questions)
    found = ask_questions(open_model(folder), replace(exam, questions=asked), batch_size=50)
    assert found["accuracy"]["model"] < 0.5
