"""What a recipe says beside its stages: what to calibrate on, how to recover, what to evaluate."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from structprune.calibration.text_source import TextSource
from structprune.decide.sparsity import fraction_of, parse_sparsity
from structprune.errors import UsageError
from structprune.recipe.fields import OptionGroup

# Far above any use, far below where a product of two of them leaves 64 bits.
Count = Annotated[int, Field(ge=1, le=2**24)]
Length = Annotated[int, Field(ge=2, le=2**22)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rank = Annotated[int, Field(ge=1, le=4096)]
# An empty tag leaves the path of a refused pattern as the user wrote it.
Ranks = Annotated[
    Annotated[dict[str, Rank], Tag("")] | Annotated[Literal["importance"], Tag("importance")],
    Discriminator(lambda value: "importance" if value == "importance" else ""),
]


class Where(OptionGroup):
    """What every command computes with.

    Args:
        seed: Decides what is drawn: calibration samples, random scores, training order.
        dtype: What to compute in; "auto" is the dtype of the files.
        device: "auto" for the accelerator there is.
    """

    seed: Seed = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$")] = "auto"


class CalibrationOptions(OptionGroup):
    """What a pruner looks at.

    Args:
        source: A .txt, .jsonl or .parquet file, a data set's name, or "demo" for the built-in text. A .jsonl
            file with rows {"image", "question"}, or "demo-vision", holds questions on images.
        samples: Sequences, or questions, drawn.
        length: Tokens per sequence; min(2048, the model's positions) unless given. Questions have none.
        batch_size: Sequences per forward.
        column: Which column holds the text.
        split: Which split of a data set.
        revision: Which commit or branch of a data set.
    """

    source: Text = "demo"
    samples: Count = 128
    length: Length | None = None
    batch_size: Count = 8
    column: Text | None = None
    split: Text = "train"
    revision: Text | None = None

    @property
    def text_source(self) -> TextSource:
        """Return where the text comes from."""
        return TextSource(self.source, self.column, self.split, self.revision)


class RecoverOptions(OptionGroup):
    """How a pruned model is trained again.

    Args:
        data: Where the training text comes from; as `source` of the calibration.
        steps: Optimizer steps.
        rank: Rank of each matrix's change.
        alpha: A change is scaled by alpha / rank; twice the rank unless given.
        ranks: Another rank for the modules whose name ends in a match of this regular expression; or
            "importance": of each block in proportion to the importance that its pruning found, with the same
            sum and alpha / rank the same everywhere.
        alphas: Another alpha for the modules whose name ends in a match of this regular expression.
        learning_rate: The highest; it rises over `warmup` and falls to zero along a cosine.
        length: Tokens per sequence; min(2048, the model's positions) unless given.
        batch_size: Sequences per optimizer step, over all processes of the run.
        warmup: Fraction of the steps over which the learning rate rises.
        clip: Largest norm of a step's gradient.
        held_out: Fraction of the sequences that is never trained on and decides what is kept.
        check_every: Steps from one look at the held-out loss to the next; a killed run goes on from there.
        teacher: The dense model, whose predictions are imitated; none unless given.
        teacher_weight: Share of the teacher in the loss, 0-1.
        temperature: Softens the teacher's predictions; 1 leaves them as they are.
        seed: Of the data's order, the held-out split and the first factors; the recipe's unless given.
        dtype: What training multiplies in; weights, gradients and moments are float32.
        gradient_checkpointing: Keep only what enters each block, and run it once more in the backward pass:
            about half of the memory, up to a third more time, the same result.
        keep_adapter: Save the change beside the model instead of merging it.
        shard: Divide the model among the processes of the run, for one that does not fit each of them.
        samples: The most sequences read; all there are unless given.
        column: Which column holds the text.
        split: Which split of a data set.
        revision: Which commit or branch of a data set.
    """

    data: Text = "demo"
    steps: Count = 200
    rank: Rank = 16
    alpha: Annotated[int, Field(ge=1, le=2**16)] = Field(
        default_factory=lambda known: 2 * known.get("rank", 16)
    )
    ranks: Ranks = Field(default_factory=dict)
    alphas: dict[str, Positive] = Field(default_factory=dict)
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1e-4
    length: Length | None = None
    batch_size: Count = 8
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: Positive = 1.0
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    check_every: Count = 25
    teacher: Text | None = None
    teacher_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Positive = 1.0
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    keep_adapter: bool = False
    shard: bool = False
    samples: Count | None = None
    column: Text | None = None
    split: Text = "train"
    revision: Text | None = None

    @property
    def text_source(self) -> TextSource:
        """Return where the text comes from."""
        return TextSource(self.data, self.column, self.split, self.revision)

    @model_validator(mode="after")
    def _one_scale(self) -> Self:
        if self.ranks == "importance" and self.alphas:
            raise UsageError(
                "recover.alphas: ranks by importance keep alpha / rank the same in every block",
                hint="leave out alphas, or give ranks by name instead",
            )
        return self


def no_importance(methods: Sequence[str]) -> UsageError:
    """Return the refusal of ranks by importance where nothing tells any.

    Args:
        methods: Those of the plans or stages that there are.
    """
    said = f"{' and '.join(methods)} tells none" if methods else "there is no plan that could tell it"
    return UsageError(
        f"recover.ranks: importance of the blocks is asked for, and {said}",
        hint="a stage of width with `budget: sigmoid` tells it; or give ranks by name, {down_proj: 8}",
    )


class EvaluateOptions(OptionGroup):
    """What is measured on a model.

    Args:
        text: Texts for the perplexity: files, data sets, or "demo" for held-out text of the demo's world. A
            run without texts or tasks takes what calibration left of its source.
        questions: Questions on images with answers: a .jsonl file with rows {"image", "question", "answer"}
            and perhaps "kind", or "demo-vision" for held-out ones of the demo's world.
        tasks: Tasks of lm-eval.
        include_path: A folder with lm-eval task files of your own.
        length: Tokens per window; min(2048, the model's positions) unless given.
        stride: Tokens from one window to the next; none overlap unless given.
        windows: Only the first so many windows of each text.
        batch_size: Windows, or lm-eval requests, per forward.
        compare: The dense model to measure in the same run; `prune` always compares with its own.
        limit: Only so many documents of each task, and only so many questions.
        max_ppl_ratio: The highest perplexity allowed, as a multiple of the dense model's.
        skip: Measure nothing; a recipe may say `evaluate: false`.
        generations: Whether three beginnings are continued by both models, for the report of a run; much of
            the time of a short evaluation. `structprune evaluate` shows none and makes none.
        column: Which column holds the text.
        split: Which split of a data set.
        revision: Which commit or branch of a data set.
    """

    text: tuple[Text, ...] = ()
    questions: Text | None = None
    tasks: tuple[Text, ...] = ()
    include_path: Path | None = None
    length: Length | None = None
    stride: Annotated[int, Field(ge=1, le=2**22)] | None = None
    windows: Count | None = None
    batch_size: Count = 8
    compare: Text | None = None
    limit: Count | None = None
    max_ppl_ratio: Positive | None = None
    skip: bool = False
    generations: bool = True
    column: Text | None = None
    split: Text = "test"
    revision: Text | None = None

    @property
    def asks(self) -> bool:
        """Return whether anything is named to measure on."""
        return bool(self.text or self.questions or self.tasks)

    @property
    def text_sources(self) -> tuple[TextSource, ...]:
        """Return where the texts come from."""
        return tuple(TextSource(one, self.column, self.split, self.revision) for one in self.text)

    @field_validator("text", "tasks", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _gate_has_a_text(self) -> Self:
        if self.max_ppl_ratio is not None and self.skip:
            raise UsageError(
                "max_ppl_ratio needs an evaluation, and none is asked for",
                hint="leave out --no-evaluate (evaluate.skip), or --max-ppl-ratio",
            )
        if self.max_ppl_ratio is not None and not self.text:
            raise UsageError(
                "max_ppl_ratio needs a text to hold the model to: evaluate.text is not given",
                hint="name one: --set evaluate.text=FILE (--text FILE of `structprune evaluate`)",
            )
        return self


class BenchOptions(OptionGroup):
    """How the speed of a model is measured.

    Args:
        length: Tokens of each prompt; min(512, what the model's positions leave beside `new`) unless given.
        new: Tokens generated after it, one by one.
        batch: How many prompts are read at once; each number is measured.
        repeats: Rounds; in each every model runs once, so that all meet the same state of the machine.
    """

    length: Length | None = None
    new: Length = 32
    batch: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 8)
    repeats: Count = 5

    @field_validator("batch", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return (value,) if isinstance(value, int) else value

    @field_validator("batch")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))


def sparsity_of(
    sparsity: str | None = None, *, ratio: float | None = None, kind: str | None = None
) -> float | str | None:
    """Return the one sparsity that the papers' two flags and ours ask for; None when none is given.

    Wanda's `main.py` takes the ratio from one flag and a pattern from another, and accepts a pattern only
    at ratio 0.5. There N is what leaves; here N stays, so a pattern alone is taken only where both are half.

    Args:
        sparsity: Our own flag: a fraction, a percentage or "N:M".
        ratio: `--sparsity-ratio`, fraction removed.
        kind: `--sparsity-type`: "unstructured" or "N:M".

    Raises:
        UsageError: The flags contradict each other or leave N open.
    """
    pattern = None if kind in (None, "unstructured") else _normal("--sparsity-type", kind)
    asked = [_normal("--sparsity", sparsity)] if sparsity is not None else []
    asked += [_normal("--sparsity-ratio", ratio)] if ratio is not None else []
    if pattern is None:
        if len({fraction_of(value) for value in asked}) > 1:
            raise UsageError(
                f"--sparsity {sparsity} and --sparsity-ratio {ratio} differ", hint="give one of them"
            )
        return asked[0] if asked else None
    removed = fraction_of(pattern)
    if any(fraction_of(value) != removed for value in asked):
        raise UsageError(
            f"--sparsity-type {kind} removes {float(removed):g}, but {asked[0]} was asked for beside it",
            hint=f"leave that out: --sparsity {pattern}",
        )
    if not asked and removed != Fraction(1, 2):
        raise UsageError(
            f"--sparsity-type {kind} alone is ambiguous: N leaves in the papers' code and stays here",
            hint=f"--sparsity {pattern} keeps {str(pattern).replace(':', ' of ')}",
        )
    return pattern


def _normal(flag: str, value: object) -> float | str:
    try:
        return parse_sparsity(value)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}", hint="such as 0.5, 50% or 2:4") from None
