"""What report.json of a folder must hold for a page about it; other keys may stand there and are not read."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What 64 bits hold: no figure of a model is larger, and Python would print thousands of digits.
Count = Annotated[int, Field(ge=0, lt=2**63)]
# What float32 holds, in which models compute: a chart can still be drawn of it.
Figure = Annotated[float, Field(ge=-1e39, le=1e39)]
Fraction = Annotated[float, Field(ge=0, le=1)]
COUNTED_WHILE_RUNNING = ("visual_tokens", "avg_tokens", "selection_flops", "counted", "visual_flops")


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class _Sizes(_Read):
    """How many parameters or bytes there were, and are."""

    dense: Count
    pruned: Count


class _Size(_Read):
    """How large a model is."""

    parameters: Count
    bytes: Count


class _Parameters(_Sizes):
    """With those that are not zero."""

    nonzero: Count


class _Found(_Read):
    """What had been pruned before."""

    pruned: bool
    sparsity: Fraction | None
    pattern: str | None
    method: str | None


class _WhileRunning(_Read):
    """What a running model computes; a plan that was made before it told has none of these."""

    visual_tokens: Count = 0
    tokens: Count = 0
    avg_tokens: float = 0.0
    visual_flops: Figure = 0.0
    image_flops: float = 0.0
    selection_flops: float = 0.0
    counted: str = ""

    @model_validator(mode="after")
    def _told_whole(self) -> "_WhileRunning":
        if "tokens" in self.model_fields_set:
            for name in COUNTED_WHILE_RUNNING:
                if name not in self.model_fields_set:
                    raise ValueError(f"tokens without {name}")
        return self


class _StageRow(_Read):
    """One stage: what it was asked, what whole units allow, what was measured."""

    folder: Annotated[str, Field(pattern=r"^\w[\w-]*$")]
    method: str
    config: dict[str, Any] = {}
    unit: str = ""
    asked: float | str | None = None
    reachable: float | None = None
    measured: float | None = None
    note: str = ""
    while_running: _WhileRunning = _WhileRunning()


class _MatrixRow(_Read):
    """One kind of matrix in a block."""

    parameters: Count
    zeros: Count


class _BlockRow(_Read):
    """The matrices of a block, as they are in the files."""

    block: Count
    parameters: Count
    zeros: Count
    matrices: dict[str, _MatrixRow]


class _CheckRow(_Read):
    """One check of the proof."""

    name: str
    ok: bool
    detail: str


class _Checks(_Read):
    """All of them."""

    checks: list[_CheckRow]


class _Divergence(_Read):
    """How far a model's distributions are from the dense one's."""

    kl: Figure | None
    kl_se: Figure | None
    top1_agreement: Fraction | None


class _Pair(_Read):
    """A figure of the model, and of the dense one."""

    model: float | None
    dense: float | None


class _McNemar(_Read):
    """Which answers only one of two models gets right."""

    dense_only: Count
    model_only: Count
    p: float


class _Answers(_Read):
    """Answers to questions on images."""

    accuracy: _Pair
    kinds: dict[str, _Pair]
    kl: Figure | None
    kl_se: Figure | None
    mcnemar: _McNemar | None


class _Stamps(_Read):
    """How it was all measured."""

    texts: dict[str, dict[str, Any]] = {}
    questions: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    flags: list[str] = []


class _Continuation(_Read):
    """What both models write after a prompt."""

    prompt: str
    dense: str | None = None
    model: str | None = None


class _Measured(_Read):
    """What was measured of a model and of the dense one."""

    perplexity: dict[str, _Pair] = {}
    divergence: dict[str, _Divergence] = {}
    questions: dict[str, _Answers] = {}
    tasks: dict[str, dict[str, _Pair]] = {}
    protocol: _Stamps = _Stamps()
    generations: list[_Continuation] = []


class LaterFigures(_Measured):
    """What `evaluate` printed: with the run that it measured, None where no run wrote the folder.

    It may have been compared with another dense model than the run was: the one that an earlier run began
    with, say.
    """

    perplexity: dict[str, _Pair]
    protocol: _Stamps
    run: str | None
    dense: _Size | None


class _Spread(_Read):
    """The median of some rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float


class _SpreadPair(_Read):
    """Of the model, and of the one it is compared with."""

    model: _Spread
    compared: _Spread | None


class _Timed(_SpreadPair):
    """With how many times faster the model is."""

    speedup: _Spread | None


class _CountPair(_Read):
    """Bytes of the model, and of the one it is compared with."""

    model: Count | None
    compared: Count | None


class _Batch(_Read):
    """How fast so many prompts at once are read and answered, and in how much memory."""

    batch: Count
    prefill_tokens_per_second: _Timed
    decode_tokens_per_second: _Timed
    first_token_seconds: _Timed
    peak_memory_bytes: _CountPair
    kv_bytes: _CountPair


class _Contestant(_Read):
    """A model that was timed."""

    pruned: bool
    file_bytes: Count


class _Contestants(_Read):
    """The model, and the one it is compared with."""

    model: _Contestant
    compared: _Contestant | None


class _SpeedProtocol(_Read):
    """How speed was measured."""

    accelerators: list[str]
    device: str
    processor: str
    length: Count
    new: Count
    dtype: str
    threads: Count
    repeats: Count
    cached_tokens: Count
    peak_memory: str


class _Speed(_Read):
    """What `bench` measured."""

    models: _Contestants
    batches: list[_Batch]
    protocol: _SpeedProtocol
    flags: list[str]


class _HeldOut(_Read):
    """One look at the held-out windows during a recovery."""

    step: Count
    held_out_loss: float


class _Training(_Read):
    """What a recovery led to."""

    start_loss: float | None
    best_loss: float | None
    best_step: Count
    history: list[_HeldOut] = []
    data: dict[str, Any] = {}


class _Machine(_Read):
    """Where it was made."""

    processor: str
    threads: Count


class Report(_Read):
    """All of it."""

    output: str
    method: str
    sparsity: Fraction | None
    pattern: str | None
    parameters: _Parameters
    bytes: _Sizes
    seconds: float
    loads_in: list[str]
    blocks: list[_BlockRow]
    verification: _Checks
    evaluation: _Measured | None
    command: str = "prune"
    calibration: dict[str, Any] | None
    stages: list[_StageRow]
    machine: _Machine
    versions: dict[str, str | None]
    found: _Found | None = None
    weights: dict[str, Count] = {}
    bench: _Speed | None = None
    recovery: _Training | None = None
