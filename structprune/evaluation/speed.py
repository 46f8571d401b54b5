"""How fast models read and write: one after the other in every round, so that all meet the same machine.

One pass does what a user waits for: the prompts are read at once into a cache (prefill), the first token of
each is chosen, and the others follow one forward at a time (decode). Tokens are greedy; what `generate` adds
around the forwards, and would take of any model alike, is left out.
"""

import inspect
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from structprune.calibration.data import positions
from structprune.errors import EnvironmentFailure, UsageError
from structprune.models.cost import cache_bytes
from structprune.models.shapes import cache_entry, cache_of
from structprune.proof.fresh_process import ordinary_tokens
from structprune.recipe.options import BenchOptions

# Long enough that prefill is bound by computing, short enough for a processor.
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Workload:
    """What every model is timed on.

    Attributes:
        length: Tokens of each prompt.
        new: Tokens generated after it.
        batches: Prompts at once, ascending.
        repeats: Rounds.
    """

    length: int
    new: int
    batches: tuple[int, ...]
    repeats: int

    @property
    def cached(self) -> int:
        """Return how many tokens of each sequence are in the cache at the end: the last one is never read."""
        return self.length + self.new - 1


@dataclass(frozen=True)
class Pass:
    """One pass of a model over a batch.

    Attributes:
        prefill: Seconds of the forward over the prompts.
        first: Seconds until the first token of every prompt is known.
        decode: Seconds of all further tokens.
        tokens: What was generated, shape [batch, new].
        kv_bytes: The cache at the end.
    """

    prefill: float
    first: float
    decode: float
    tokens: Tensor
    kv_bytes: int


@dataclass(frozen=True)
class Spread:
    """A figure of all rounds.

    Attributes:
        median: Of the rounds.
        low: The lowest.
        high: The highest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def workload_of(options: BenchOptions, configs: Sequence[PreTrainedConfig]) -> Workload:
    """Return what models with these configs can all be timed on.

    Raises:
        UsageError: The prompt and what is generated need more positions than a model has.
    """
    known = [limit for config in configs if (limit := positions(config)) is not None]
    limit = min(known, default=None)
    length = options.length or min(DEFAULT_LENGTH, max(2, (limit or 2**62) - options.new))
    if limit is not None and length + options.new > limit:
        asked = (
            f"bench.length {length} and bench.new {options.new}"
            if options.length
            else f"bench.new {options.new}"
        )
        raise UsageError(
            f"{asked}: more than the model's max_position_embeddings, {limit}",
            hint=f"prompt and new tokens together are at most {limit}: a shorter --length, or fewer --new",
        )
    return Workload(length, options.new, options.batch, options.repeats)


def prompts(config: PreTrainedConfig, workload: Workload, batch: int) -> Tensor:
    """Return random token ids without a meaning of their own, the same each time; shape [batch, length]."""
    # Other tokens take other experts, but no dense matrix product depends on them.
    draw, ordinary = random.Random(0), ordinary_tokens(config)
    return torch.tensor([draw.choices(ordinary, k=workload.length) for _ in range(batch)])


@torch.no_grad()
def timed_pass(model: PreTrainedModel, ids: Tensor, new: int) -> Pass:
    """Read prompts and generate `new` tokens after each; the ids may lie on another device.

    Args:
        model: In memory.
        ids: Shape [batch, tokens].
        new: At least 2.
    """
    # As `generate` does: only the last token of a prompt needs the head.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    began = _now(model.device)
    output = model(input_ids=ids.to(model.device), use_cache=True, **last)
    prefilled = _now(model.device)
    chosen = [output.logits[:, -1:].argmax(-1)]
    chosen[0].cpu()
    first = _now(model.device)
    for _ in range(new - 1):
        output = model(input_ids=chosen[-1], **cache_entry(output), use_cache=True, **last)
        chosen.append(output.logits[:, -1:].argmax(-1))
    tokens = torch.cat(chosen, dim=1).cpu()
    decoded = _now(model.device)
    stored = cache_bytes(cache_of(output))
    return Pass(prefilled - began, first - began, decoded - first, tokens, stored)


def timed_rounds(
    models: Sequence[PreTrainedModel], workload: Workload, batch: int, done: Callable[[int], None]
) -> list[list[Pass]]:
    """Return the passes of each round, one per model: every round runs the models in their order.

    Args:
        models: In memory, all on one device.
        workload: What they are timed on.
        batch: Prompts at once.
        done: Told after each round how many are done.

    Raises:
        EnvironmentFailure: The memory does not suffice.
    """
    ids = [prompts(model.config, workload, batch) for model in models]
    rounds = []
    with fitting(batch, workload):
        for model, own in zip(models, ids, strict=True):
            timed_pass(model, own, 2)  # kernels are chosen and memory is taken when they are first needed
        for number in range(1, workload.repeats + 1):
            rounds.append(
                [timed_pass(model, own, workload.new) for model, own in zip(models, ids, strict=True)]
            )
            done(number)
    return rounds


@contextmanager
def fitting(batch: int, workload: Workload) -> Iterator[None]:
    """Turn a failed allocation into an error that names the batch and says what helps."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "memory" not in str(error):
            raise
        raise EnvironmentFailure(
            f"no memory for a batch of {batch} prompts of {workload.length} tokens",
            hint="a smaller --batch, a shorter --length, or --device cpu",
        ) from None


def _now(device: torch.device) -> float:
    """Return the time once a device has done all it was asked for: it computes while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
