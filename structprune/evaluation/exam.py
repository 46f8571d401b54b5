"""What a model will be measured on: read, cut and checked before anything is computed.

A run that has decided for an hour must not stop because a text is missing or a task misspelt.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from structprune.calibration.data import Left, hash_of, positions, sequence_start, window_length
from structprune.calibration.image_questions import LeftQuestions
from structprune.calibration.text_source import DEMO, TextSource
from structprune.calibration.texts import name_of, pieces
from structprune.demo.world import HELD_OUT_SEED
from structprune.demo.world import text as demo_text
from structprune.errors import UsageError
from structprune.evaluation.generations import PROMPTS, beginnings, prompt_length
from structprune.evaluation.harness import check_tasks
from structprune.evaluation.perplexity import Windows
from structprune.evaluation.protocol import cut_windows, hash_of_tokenizer
from structprune.evaluation.questions import QuestionExam, question_exam, read_question_exam
from structprune.evaluation.speed import Workload
from structprune.recipe.options import EvaluateOptions

DEMO_CHARACTERS = 200_000
# Of questions that were not drawn, so many at most tell how good the result is.
LEFT_QUESTIONS = 128
# Long enough for a context; the windows of calibration are often four times as long, and cost as much.
LEFT_LENGTH = 512


@dataclass(frozen=True)
class ExamText:
    """A text for the perplexity.

    Attributes:
        name: What its figures are called.
        windows: What is scored.
        stamp: How they were cut, and from what.
    """

    name: str
    windows: Windows
    stamp: dict[str, Any]


@dataclass(frozen=True)
class Exam:
    """What a model will be measured on.

    Attributes:
        options: How; also which tasks.
        texts: For the perplexity.
        prompts: Beginnings for the models to continue.
        reason: Why there is no text, where there is none; empty where only tasks were asked for.
        workload: What its speed is timed on; None where that was not asked for.
        questions: On images, to be answered.
        processor: Opens the model's, for tasks with images.
    """

    options: EvaluateOptions
    texts: tuple[ExamText, ...] = ()
    prompts: tuple[str, ...] = ()
    reason: str = ""
    workload: Workload | None = None
    questions: QuestionExam | None = None
    processor: Callable[[], ProcessorMixin] | None = None

    @property
    def asks(self) -> bool:
        """Return whether anything is measured but speed."""
        return bool(self.texts or self.questions or self.options.tasks)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what shapes its figures; JSON values."""
        return {
            "options": self.options.model_dump(mode="json"),
            "texts": {text.name: text.stamp for text in self.texts},
            "questions": self.questions.stamp if self.questions else None,
        }


def read_exam(
    options: EvaluateOptions,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    streamed: bool = False,
    processor: ProcessorMixin | None = None,
) -> Exam:
    """Read the texts and questions that were asked for, and look the tasks up.

    Args:
        options: What to measure; the text "demo" is held-out text of the demo's generator.
        tokenizer: The model's.
        config: The model's.
        streamed: Whether it is streamed; tasks and questions need it in memory.
        processor: The model's, where questions on images are asked.

    Raises:
        UsageError: A size is impossible, a task is unknown, two texts have one name, or questions are asked
            without a processor.
        InputError: A text is too short, or cannot be trusted.
        EnvironmentFailure: Data cannot be reached, or lm-eval is not installed.
    """
    names = [name_of(source) for source in options.text]
    if len(set(names)) < len(names):
        raise UsageError(f"two texts have the same name: {', '.join(names)}", hint="results are listed by it")
    size = window_length(options.length, positions(config))
    if options.tasks:
        check_tasks(options.tasks, options.include_path, streamed=streamed)
    questions = None
    if options.questions is not None:
        if processor is None:
            raise UsageError(
                "evaluate.questions needs the processor of a vision-language model", hint="give its folder"
            )
        questions = read_question_exam(options.questions, processor, limit=options.limit, streamed=streamed)
    texts = []
    for name, source in zip(names, options.text_sources, strict=True):
        windows, stamp = cut_windows(
            text_of(source),
            tokenizer,
            source=source.source,
            length=size,
            start=sequence_start(tokenizer),
            stride=options.stride,
            windows=options.windows,
        )
        texts.append(ExamText(name, windows, stamp | asdict(source)))
    prompts: list[str] = []
    if texts and options.generations:
        prompts = beginnings(text_of(options.text_sources[0]), tokenizer, max_length=positions(config))
    return Exam(options, tuple(texts), tuple(prompts), questions=questions)


def exam_on_left_questions(options: EvaluateOptions, left: LeftQuestions, processor: ProcessorMixin) -> Exam:
    """Return the exam of a run that was told none: on what calibration left of its questions.

    Args:
        options: Of these, at most so many questions.
        left: What was left.
        processor: The model's.
    """
    known = [one for one in left.questions if one.answer is not None]
    if not known:
        name = name_of(left.text.source)
        said = (
            f"nothing was measured: no question of {name} with an answer was left that the run has not seen"
        )
        return Exam(options, reason=f"{said}; name some with evaluate.questions")
    exam = question_exam(left.text, known[-(options.limit or LEFT_QUESTIONS) :], processor)
    stamp = exam.stamp | {"held_out": "the last questions that the run did not look at"}
    return Exam(options, questions=replace(exam, stamp=stamp))


def exam_on_left(
    options: EvaluateOptions, left: Left, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> Exam:
    """Return the exam of a run that was told no text: on what calibration left of its own source.

    Args:
        options: Of these, at most so many windows of at most such a length.
        left: What was left.
        tokenizer: The model's.
        config: The model's.
    """
    name = name_of(left.text.source)
    inputs = left.inputs[-(options.windows or len(left.inputs)) :, : options.length or LEFT_LENGTH]
    if not len(inputs):
        said = f"no perplexity was measured: nothing of {name} was left that the run has not looked at"
        return Exam(options, reason=f"{said}; name a text with evaluate.text")
    windows = Windows(inputs, [1] * len(inputs))
    stamp = asdict(left.text) | {
        "tokens_sha256": hash_of(inputs),
        "tokenizer": hash_of_tokenizer(tokenizer),
        "tokens": inputs.numel(),
        "length": inputs.shape[1],
        "stride": None,
        "windows": len(inputs),
        "scored_tokens": windows.scored,
        "bos": left.bos.rule,
        "held_out": "the last windows of what was read that the run did not look at",
    }
    prompts: tuple[str, ...] = ()
    if options.generations and (room := prompt_length(positions(config))):
        start = 0 if left.bos.token is None else 1
        prompts = tuple(str(tokenizer.decode(row)) for row in inputs[:PROMPTS, start:][:, :room].tolist())
    return Exam(options, (ExamText(name, windows, stamp),), prompts)


def text_of(source: TextSource) -> Iterator[str]:
    """Return a text in pieces.

    Of the built-in file, which calibration reads, another part of the same world stands for it: what is
    measured must be text that was not looked at.
    """
    if source.source == DEMO:
        return iter([demo_text(HELD_OUT_SEED, DEMO_CHARACTERS)])
    return pieces(source)
