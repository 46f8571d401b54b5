"""What a run's result will be measured on: chosen, read and checked before the run computes anything."""

from dataclasses import replace

from structprune.calibration.data import Left, positions
from structprune.calibration.image_questions import LeftQuestions
from structprune.calibration.text_source import DEMO, DEMO_VISION
from structprune.checkpoint.source import Source
from structprune.evaluation.exam import (
    LEFT_LENGTH,
    Exam,
    exam_on_left,
    exam_on_left_questions,
    read_exam,
)
from structprune.evaluation.footprint import check_room
from structprune.evaluation.protocol import same_footing
from structprune.evaluation.speed import workload_of
from structprune.models.identity import skeleton
from structprune.recipe.options import BenchOptions, EvaluateOptions

DEMO_WINDOWS = 8
DEMO_LIMIT = 200  # questions of the built-in ones


def with_bench(exam: Exam, options: BenchOptions | None, source: Source) -> Exam:
    """Return an exam that times the result too, where that is asked for.

    Args:
        exam: What else is measured.
        options: What the recipe says of the bench.
        source: The model that the result is compared with.

    Raises:
        UsageError: The prompts need more positions than the model has.
        EnvironmentFailure: Both models, or the largest batch, do not fit the memory.
    """
    if options is None:
        return exam
    module = skeleton(source.model)
    workload = workload_of(options, [module.config])
    check_room([module, module], workload, source.opening.device)
    return replace(exam, workload=workload)


def prepare_exam(
    options: EvaluateOptions | None,
    source: Source,
    looked_at: Left | LeftQuestions | None,
    dense: Source | None = None,
) -> Exam:
    """Return what to measure a run's result on.

    A run that was told neither texts, questions nor tasks takes what it has left of the text or the questions
    that it looks at; of the built-in ones another part of the same world. One that looks at none measures
    nothing: any text of ours would say little about what the model is for.

    Args:
        options: What the recipe says of the evaluation.
        source: The model.
        looked_at: What the run leaves of its data; None where it looks at no data.
        dense: What the result is compared with, where that is another model.

    Raises:
        UsageError: A size is impossible, a task is unknown, or the models cannot be compared.
        InputError: A text cannot be trusted or is too short, or there is no tokenizer that fits.
        EnvironmentFailure: Data cannot be reached, or lm-eval is not installed.
    """
    streamed = bool(source.opening.stream)
    asked = options or EvaluateOptions()
    if asked.skip:
        return Exam(asked, reason="nothing was measured: no evaluation was asked for")
    if not asked.asks:
        if looked_at is None:
            why = "no perplexity was measured: the run looked at no data"
            return Exam(asked, reason=f"{why}; name a text with evaluate.text")
        if "generations" not in asked.model_fields_set:
            # Without a cache each of their tokens reads a streamed model once.
            asked = asked.model_copy(update={"generations": not streamed})
        if isinstance(looked_at, LeftQuestions):
            return _exam_on_questions(asked, source, looked_at, streamed=streamed)
    tokenizer = source.checked_tokenizer()
    if dense is not None:
        same_footing(source.model, tokenizer, dense.model, dense.tokenizer)
    if asked.asks or not isinstance(looked_at, Left):
        processor = source.processor() if asked.questions else None
        exam = read_exam(asked, tokenizer, source.model.config, streamed=streamed, processor=processor)
        return replace(exam, processor=source.processor)
    if looked_at.text.source == DEMO:
        length = asked.length or min(LEFT_LENGTH, positions(source.model.config) or LEFT_LENGTH)
        sizes = {"text": (DEMO,), "windows": asked.windows or DEMO_WINDOWS, "length": length}
        return read_exam(asked.model_copy(update=sizes), tokenizer, source.model.config)
    return exam_on_left(asked, looked_at, tokenizer, source.model.config)


def _exam_on_questions(
    asked: EvaluateOptions, source: Source, left: LeftQuestions, *, streamed: bool
) -> Exam:
    if streamed:
        return Exam(asked, reason="nothing was measured: questions on images need the whole model in memory")
    processor = source.processor()
    if left.text.source == DEMO_VISION:
        known = {"questions": DEMO_VISION, "limit": asked.limit or DEMO_LIMIT}
        return read_exam(
            asked.model_copy(update=known),
            source.checked_tokenizer(),
            source.model.config,
            processor=processor,
        )
    return exam_on_left_questions(asked, left, processor)
