"""Answers to questions on images: which are right, beside the dense model's on the same prompts.

A model answers greedily, with its own `generate`, so that what prunes tokens while a prompt is read finds the
prompt and nothing behind it. An answer is right when its first words are the expected ones, whatever their
case and punctuation. Where two models answer, McNemar's exact test tells whether they differ by more than
chance: where they do not, a question that only one of them gets right is as likely the one's as the other's.

Source: McNemar 1947, Psychometrika 12, pages 153-157 (the exact binomial form).
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from structprune.calibration.image_questions import ImageQuestion, read_questions
from structprune.calibration.images import batch_of, check_placeholders, hash_of_batches
from structprune.calibration.text_source import DEMO_VISION, TextSource
from structprune.calibration.texts import name_of
from structprune.demo.scenes import render
from structprune.demo.sights import HELD_OUT_SEED, visual_questions
from structprune.errors import InputError, QualityError, UsageError
from structprune.evaluation.memory import Memory
from structprune.progress import Progress, silent
from structprune.ranks import Ranks
from structprune.runtime.attach import paused

# Enough to tell 85 from 80 percent; a small model answers them within seconds.
DEMO_QUESTIONS = 500
# What follows the expected words is read no further.
MORE_TOKENS = 1


@dataclass(frozen=True)
class QuestionExam:
    """Questions to ask a model.

    Attributes:
        name: What their figures are called.
        questions: Each with an answer.
        processor: The model's.
        stamp: Where they come from.
    """

    name: str
    questions: tuple[ImageQuestion, ...]
    processor: ProcessorMixin
    stamp: dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """What a model says to a batch of questions.

    Attributes:
        right: Which answers are right.
        first: Log-probabilities of the first token of the answers, shape [questions, vocabulary], float32.
    """

    right: list[bool]
    first: Tensor


def read_question_exam(
    source: str, processor: ProcessorMixin, *, limit: int | None = None, streamed: bool = False
) -> QuestionExam:
    """Read the questions that a model will be asked.

    Args:
        source: A .jsonl file, or "demo-vision" for held-out questions of the demo's world.
        processor: The model's.
        limit: Only the first so many.
        streamed: Whether the model is streamed; it answers in memory only.

    Raises:
        UsageError: The model is streamed.
        InputError: The file cannot be trusted, or a row has no answer.
    """
    if streamed:
        raise UsageError(
            "questions on images need the whole model in memory, and it is streamed",
            hint="open it resident, or leave the questions out",
        )
    text = TextSource(source)
    questions = held_out_questions(limit or DEMO_QUESTIONS) if source == DEMO_VISION else read_questions(text)
    return question_exam(text, questions[:limit], processor)


def question_exam(
    text: TextSource, questions: Sequence[ImageQuestion], processor: ProcessorMixin
) -> QuestionExam:
    """Return questions as an exam.

    Raises:
        InputError: One has no answer.
    """
    for one in questions:
        if one.answer is None:
            raise InputError(
                f"{one.where}: key 'answer' is missing, and questions are asked to be marked",
                hint='add the right word: {"image": ..., "question": ..., "answer": "red"}',
            )
    stamp = asdict(text) | {
        "questions": len(questions),
        "decoding": "greedy",
        "right": "the same first words",
    }
    return QuestionExam(name_of(text.source), tuple(questions), processor, stamp)


def held_out_questions(count: int) -> list[ImageQuestion]:
    """Return questions of the demo's world that neither its model nor a calibration has met."""
    found = []
    for number, one in zip(range(count), visual_questions(HELD_OUT_SEED), strict=False):
        where = f"question {number + 1} of {DEMO_VISION}"
        found.append(ImageQuestion(render(one.scene), one.question, one.answer, one.kind, where))
    return found


def ask_questions(
    model: PreTrainedModel,
    exam: QuestionExam,
    *,
    dense: PreTrainedModel | None = None,
    batch_size: int = 8,
    memory: Memory | None = None,
    ranks: Ranks = Ranks(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Ask a model, and in the same run the dense model, and return the figures, JSON-safe.

    Args:
        model: In memory.
        exam: What to ask.
        dense: The model to compare with, in memory.
        batch_size: Questions per forward.
        memory: What the dense model said in an earlier evaluation on this exam, and where to keep it.
        ranks: Those who share the batches; each returns the figures of all questions.
        progress: Told (stage, batches asked, batches) of this process's own.

    Returns:
        "asked"; "accuracy" ("model", "dense": share of right answers, 0-1); "kinds" (kind -> the same); "kl"
        (mean KL(dense || model) of the first token of an answer, in nats) and "kl_se" (its standard error);
        "mcnemar" ("dense_only", "model_only": how many only one of them gets right, and "p");
        "sha256" of the batches, pixels included. What needs a dense model is None without one.

    Raises:
        InputError: The processor's prompts do not fit the model.
        QualityError: A model answers with NaN.
    """
    memory = memory or Memory()
    right: dict[str, list[bool]] = {"model": [], "dense": []}
    divergences: list[float] = []
    hashes: list[str] = []
    share = ranks.portion(math.ceil(len(exam.questions) / batch_size))
    tell = partial(progress, f"questions of {exam.name}")
    if share:
        tell(0, len(share))
    for done, number in enumerate(share, start=1):
        asked = exam.questions[number * batch_size : (number + 1) * batch_size]
        batch = batch_of(asked, exam.processor)
        if not hashes:
            placed = {name: value.to(model.device) for name, value in batch.items()}
            with paused(model):  # its blocks are not run, so nothing could choose in them
                check_placeholders(model, placed)
        hashes.append(hash_of_batches([batch]))
        mine = answer(model, asked, batch, exam.processor)
        right["model"] += mine.right
        if dense is not None:
            theirs = memory.once(f"questions {number}", partial(answer, dense, asked, batch, exam.processor))
            right["dense"] += theirs.right
            parts = theirs.first.exp() * (theirs.first - mine.first)
            divergences += parts.sum(-1).clamp(min=0).tolist()
        tell(done, len(share))
    shares = [said for said, _ in ranks.tell_each([right["model"], right["dense"], divergences, hashes])]
    model_right, dense_right, divergences, hashes = (
        list(chain(*parts)) for parts in zip(*shares, strict=True)
    )
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return _figures(exam, {"model": model_right, "dense": dense_right}, divergences) | {"sha256": digest}


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    questions: Sequence[ImageQuestion],
    batch: dict[str, Tensor],
    processor: ProcessorMixin,
) -> Answers:
    """Return what a model answers.

    Args:
        model: In memory.
        questions: With answers.
        batch: What the processor made of them.
        processor: The model's.

    Raises:
        QualityError: Its logits are not finite.
    """
    call: Any = model
    tokenizer: Any = processor.tokenizer
    expected = [str(one.answer) for one in questions]
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected)
    said = call.generate(
        **{name: value.to(model.device) for name, value in batch.items()},
        max_new_tokens=longest + MORE_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first = said.logits[0].float().log_softmax(-1).cpu()
    if not bool(torch.isfinite(said.logits[0]).all()):
        raise QualityError(
            f"{questions[0].where}: the logits of its answer are not finite",
            hint="prune less, or compute in float32",
        )
    texts = tokenizer.batch_decode(said.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return Answers([is_right(text, one) for text, one in zip(texts, expected, strict=True)], first)


def is_right(said: str, expected: str) -> bool:
    """Tell whether an answer begins with the expected words, whatever their case and punctuation."""
    wanted = _words(expected)
    return _words(said)[: len(wanted)] == wanted


def mcnemar(one_only: int, other_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        one_only: Questions that only the one model gets right.
        other_only: Questions that only the other gets right.
    """
    count = one_only + other_only
    tail = sum(math.comb(count, index) for index in range(min(one_only, other_only) + 1))
    return min(1.0, 2 * tail / (1 << count))


def _figures(exam: QuestionExam, right: dict[str, list[bool]], divergences: list[float]) -> dict[str, Any]:
    mine, theirs = right["model"], right["dense"]
    kinds = sorted({one.kind for one in exam.questions if one.kind})
    places = {kind: [at for at, one in enumerate(exam.questions) if one.kind == kind] for kind in kinds}

    def shares(chosen: Sequence[int]) -> dict[str, float | None]:
        return {
            which: sum(marks[at] for at in chosen) / len(chosen) if marks else None
            for which, marks in right.items()
        }

    count = len(divergences)
    mean = sum(divergences) / count if count else None
    spread = None
    if mean is not None and count > 1:
        spread = math.sqrt(sum((one - mean) ** 2 for one in divergences) / (count - 1) / count)
    test = None
    if theirs:
        dense_only = sum(other and not one for one, other in zip(mine, theirs, strict=True))
        model_only = sum(one and not other for one, other in zip(mine, theirs, strict=True))
        test = {
            "dense_only": dense_only,
            "model_only": model_only,
            "p": mcnemar(dense_only, model_only),
        }
    return {
        "asked": len(mine),
        "accuracy": shares(range(len(mine))),
        "kinds": {kind: {"asked": len(chosen), **shares(chosen)} for kind, chosen in places.items()},
        "kl": mean,
        "kl_se": spread,
        "mcnemar": test,
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
