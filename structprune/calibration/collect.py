"""Collects the statistics of a block's inputs: one object per distinct input, not one per linear."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structprune.calibration.routing import RoutingSums
from structprune.calibration.statistics import InputSums, Parts, gradient_means
from structprune.errors import EnvironmentFailure
from structprune.models.arch import Linear
from structprune.models.walk import Block


@dataclass(frozen=True)
class BlockSums:
    """What calibration remembers of the inputs of a block's linears.

    Attributes:
        inputs: By label; linears that read the same input share one object.
        scarce: Tokens of the experts that fewer tokens reached than they have inputs, by label.
        routing: What a mixture sent to each of its experts; None unless asked.
    """

    inputs: Mapping[str, InputSums] = field(default_factory=dict)
    scarce: Mapping[str, int] = field(default_factory=dict)
    routing: RoutingSums | None = None


def collect_inputs(block: Block, observed: Sequence[Linear], parts: Parts, *, advance: bool) -> BlockSums:
    """Run the calibration data through a block and remember what some of its linears read.

    An expert that fewer tokens reached than it has inputs borrows the missing ones from the average of the
    block's experts.

    Args:
        block: The current block of a walk.
        observed: Linears of the block.
        parts: What is remembered of each input.
        advance: Also make the block's outputs the inputs of the next block.

    Raises:
        EnvironmentFailure: A statistic does not fit the memory; names the linear and the size.
    """
    sums: dict[str, InputSums] = {}
    feeding: dict[str, InputSums] = {}  # the linears whose turn it is to add what they read
    previous: list[tuple[Tensor, InputSums]] = []

    batches = block.batches

    def observe(position: int, linear: Linear, inputs: Tensor) -> None:
        # In the first batch it shows who reads the same tensor: the first of them adds it, for all batches.
        # Only neighbours can, so that remembering the last tensor is enough.
        if linear.label not in sums:
            if previous and previous[0][0] is inputs:
                sums[linear.label] = previous[0][1]
                return
            with _failing_by_name(linear, inputs.shape[-1]):
                made = InputSums(parts, inputs.shape[-1], inputs.device, batches.chunks)
            sums[linear.label] = feeding[linear.label] = made
            previous[:] = [(inputs, made)]
        if linear.label in feeding:
            with _failing_by_name(linear, inputs.shape[-1]):
                feeding[linear.label].add(inputs, batches.chunk(position))

    experts = [linear for linear in observed if linear.expert is not None]
    routing: RoutingSums | None = None
    if "routing" in parts and experts:
        whole = experts[0].whole
        routing = RoutingSums.nothing(len(whole), whole.device, batches.chunks)

    def routed(position: int, expert: int, outputs: Tensor, weights: Tensor) -> None:
        assert routing is not None
        routing.add(batches.chunk(position), expert, outputs, weights)

    block.observe(observe, list(observed), advance=advance, routed=routed if routing else None)
    # In the order of the block: which expert is reached first may differ from process to process.
    for linear in observed:
        if linear.label in feeding:
            feeding[linear.label].add_up(batches.ranks)
    if routing is not None:
        batches.ranks.add_apart(routing.chunks)
    tokens = {linear.label: sums[linear.label].tokens for linear in experts}
    scarce = {
        linear.label: tokens[linear.label]
        for linear in experts
        if tokens[linear.label] < linear.weight.shape[1]
    }
    for name in sorted({linear.name for linear in experts if linear.label in scarce}):
        _borrow_tokens([linear for linear in experts if linear.name == name], sums)
    return BlockSums(sums, scarce, routing)


def remembered_bytes(observed: Sequence[Linear], found: Sequence[Linear], parts: Parts) -> int:
    """Return at most how many bytes Gram matrices and gradients of a block take.

    Args:
        observed: The linears whose inputs are remembered.
        found: All of the block: a walk backward makes the gradients of each.
        parts: What is remembered.
    """
    gram = sum(linear.weight.shape[1] ** 2 for linear in observed) if "gram" in parts else 0
    return 4 * (gram + len(gradient_means(parts)) * sum(linear.weight.numel() for linear in found))


def _borrow_tokens(experts: Sequence[Linear], sums: dict[str, InputSums]) -> None:
    """Fill up the sums of the experts of one projection to as many tokens as they have inputs."""
    width, device = experts[0].weight.shape[1], experts[0].weight.device
    parts = sums[experts[0].label].parts
    average = InputSums(parts, width, device, sums[experts[0].label].chunks)
    for linear in experts:
        average.merge(sums[linear.label])
    if average.tokens == 0:
        return
    for linear in experts:
        own = sums[linear.label]
        if own.tokens < width:  # fewer tokens than inputs make no Gram matrix of full rank
            # A new object: the old one may serve another linear of the expert too.
            sums[linear.label] = InputSums(parts, width, device, own.chunks)
            sums[linear.label].merge(own)
            sums[linear.label].merge(average, (width - own.tokens) / average.tokens)


@contextmanager
def _failing_by_name(linear: Linear, width: int) -> Iterator[None]:
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
