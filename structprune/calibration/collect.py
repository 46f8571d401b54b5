"""Collects the statistics of a block's inputs: one object per distinct input, not one per linear."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structprune.calibration.statistics import Gram, InputNorm
from structprune.errors import EnvironmentFailure
from structprune.models.arch import Linear
from structprune.models.walk import Block


@dataclass(frozen=True)
class Collected:
    """What calibration remembers of the inputs of a block's linears.

    Attributes:
        statistics: By label; linears that read the same input share one object.
        scarce: Tokens of the experts that fewer tokens reached than they have inputs, by label.
    """

    statistics: Mapping[str, InputNorm] = field(default_factory=dict)
    scarce: Mapping[str, int] = field(default_factory=dict)


def collect(block: Block, chosen: Sequence[Linear], make: type[InputNorm], *, advance: bool) -> Collected:
    """Run the calibration data through a block and remember what the chosen linears read.

    An expert that fewer tokens reached than it has inputs borrows the missing ones from the average of the
    block's experts.

    Args:
        block: The current block of a walk.
        chosen: Linears of the block.
        make: The kind of statistic.
        advance: Also make the block's outputs the inputs of the next block.

    Raises:
        EnvironmentFailure: A statistic does not fit the memory; names the linear and the size.
    """
    statistics: dict[str, InputNorm] = {}
    fed: dict[str, InputNorm] = {}  # the linears whose turn it is to add what they read
    previous: list[tuple[Tensor, InputNorm]] = []

    def observe(linear: Linear, inputs: Tensor) -> None:
        if linear.label not in statistics:
            if previous and previous[0][0] is inputs:
                statistics[linear.label] = previous[0][1]
                return
            with _named(linear, inputs.shape[-1]):
                statistics[linear.label] = fed[linear.label] = make(inputs.shape[-1], inputs.device)
            previous[:] = [(inputs, statistics[linear.label])]
        if linear.label in fed:
            with _named(linear, inputs.shape[-1]):
                fed[linear.label].add(inputs)

    block.observe(observe, list(chosen), advance=advance)
    experts = [linear for linear in chosen if linear.expert is not None]
    tokens = {linear.label: statistics[linear.label].tokens for linear in experts}
    scarce = {
        linear.label: tokens[linear.label]
        for linear in experts
        if tokens[linear.label] < linear.weight.shape[1]
    }
    for name in sorted({linear.name for linear in experts if linear.label in scarce}):
        _borrow([linear for linear in experts if linear.name == name], statistics, make)
    return Collected(statistics, scarce)


def remembered_bytes(chosen: Sequence[Linear], make: type[InputNorm] | None, gradients: bool) -> int:
    """Return at most how many bytes Gram matrices, and gradients where wanted, of a block's linears take."""
    shapes = [linear.weight.shape for linear in chosen]
    gram = make is not None and issubclass(make, Gram)
    return 4 * sum(inputs * inputs * gram + out * inputs * gradients for out, inputs in shapes)


def _borrow(experts: Sequence[Linear], statistics: dict[str, InputNorm], make: type[InputNorm]) -> None:
    """Fill up the statistics of the experts of one projection to as many tokens as they have inputs."""
    width, device = experts[0].weight.shape[1], experts[0].weight.device
    average = make(width, device)
    for linear in experts:
        average.merge(statistics[linear.label])
    if average.tokens == 0:
        return
    for linear in experts:
        own = statistics[linear.label]
        if own.tokens < width:  # fewer tokens than inputs make no Gram matrix of full rank
            statistics[linear.label] = make(width, device)
            statistics[linear.label].merge(own)
            statistics[linear.label].merge(average, (width - own.tokens) / average.tokens)


@contextmanager
def _named(linear: Linear, width: int) -> Iterator[None]:
    """Turn a failed allocation into an error that names the linear and says what helps."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise EnvironmentFailure(
            f"{linear.label}: no memory for the statistics of its {width} inputs "
            f"(a Gram matrix of {width} x {width} takes {width * width * 4 / 2**30:.2f} GiB)",
            hint="hold less beside it: --stream, a smaller batch_size or fewer samples; or --exclude it",
        ) from None
