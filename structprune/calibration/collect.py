"""Collects the statistics of a block's inputs: one object per distinct input, not one per linear."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structprune.calibration.dispatch import ExpertDispatch, Weigh, count_products, owners_of
from structprune.calibration.routing import RoutingSums
from structprune.calibration.statistics import InputSums, Parts, gradient_means, pair_bytes
from structprune.errors import EnvironmentFailure
from structprune.models.arch import Linear
from structprune.models.walk import Block
from structprune.ranks import Ranks


@dataclass(frozen=True)
class BlockSums:
    """What calibration remembers of the inputs of a block's linears.

    Attributes:
        inputs: By label; linears that read the same input share one object.
        scarce: Tokens of the experts that fewer tokens reached than they have inputs, by label.
        routing: What a mixture sent to each of its experts; None unless asked.
        owners: Which process of the run has the Gram matrix of a linear's input, and solves it, by label.
    """

    inputs: Mapping[str, InputSums] = field(default_factory=dict)
    scarce: Mapping[str, int] = field(default_factory=dict)
    routing: RoutingSums | None = None
    owners: Mapping[str, int] = field(default_factory=dict)


def collect_inputs(
    block: Block,
    observed: Sequence[Linear],
    parts: Parts,
    *,
    advance: bool,
    weigh: Weigh = count_products,
) -> BlockSums:
    """Run the calibration data through a block and remember what some of its linears read.

    Of several processes each sees its own batches; all get the sums, but of a Gram matrix only the one that
    solves what reads the input. An expert that fewer tokens reached than it has inputs borrows the missing
    ones from the average of the block's experts.

    Args:
        block: The current block of a walk.
        observed: Linears of the block.
        parts: What is remembered of each input.
        advance: Also make the block's outputs the inputs of the next block.
        weigh: Tells what solving takes, by which processes divide it.

    Raises:
        EnvironmentFailure: A statistic does not fit the memory; names the linear and the size.
    """
    sums: dict[str, InputSums] = {}
    feeding: dict[str, InputSums] = {}  # the linears whose turn it is to add what they read
    previous: list[tuple[Tensor, InputSums]] = []

    batches = block.batches
    experts = [linear for linear in observed if linear.expert is not None]
    dispatch = ExpertDispatch(experts if "gram" in parts else [], batches, weigh)

    def observe(position: int, linear: Linear, inputs: Tensor) -> None:
        # In the first batch it shows who reads the same tensor: the first of them adds it, for all batches.
        # Only neighbours can, so that remembering the last tensor is enough.
        if linear.label not in sums:
            if previous and previous[0][0] is inputs:
                sums[linear.label] = previous[0][1]
                return
            with _failing_by_name(linear, inputs.shape[-1]):
                pairs = dispatch.keeps(linear)
                made = InputSums(parts, inputs.shape[-1], inputs.device, batches.chunks, pairs=pairs)
            sums[linear.label] = feeding[linear.label] = made
            previous[:] = [(inputs, made)]
        if linear.label in feeding:
            with _failing_by_name(linear, inputs.shape[-1]):
                feeding[linear.label].add_features(inputs, batches.chunk(position))
                dispatch.add_pairs(linear, inputs, feeding)

    routing: RoutingSums | None = None
    if "routing" in parts and experts:
        whole = experts[0].whole
        routing = RoutingSums.nothing(len(whole), whole.device, batches.chunks)

    def routed(position: int, expert: int, outputs: Tensor, weights: Tensor) -> None:
        assert routing is not None
        routing.add(batches.chunk(position), expert, outputs, weights)

    block.observe(observe, list(observed), advance=advance, routed=routed if routing else None)
    dispatch.finish(feeding)
    if routing is not None:
        batches.ranks.add_apart(routing.chunks)
    return _add_up(observed, sums, routing, dispatch.owners, batches.ranks, weigh)


def _add_up(
    observed: Sequence[Linear],
    sums: Mapping[str, InputSums],
    routing: RoutingSums | None,
    owners: Mapping[str, int],
    ranks: Ranks,
    weigh: Weigh,
) -> BlockSums:
    """Return the sums of all processes.

    Args:
        observed: Linears, in the order of the block: which expert is reached first may differ.
        sums: Of this process, by label.
        routing: What a mixture sent to its experts.
        owners: Which process has the Gram matrix of what an expert reads already.
        ranks: Those who share the run.
        weigh: Tells what solving takes.
    """
    groups: dict[int, list[Linear]] = {}
    for linear in observed:
        groups.setdefault(id(sums[linear.label]), []).append(linear)
    for linear, *_ in groups.values():
        sums[linear.label].add_up_features(ranks)
    experts = [linear for linear in observed if linear.expert is not None]
    tokens = {linear.label: sums[linear.label].tokens for linear in experts}
    scarce = {one.label: tokens[one.label] for one in experts if tokens[one.label] < one.weight.shape[1]}
    lenders = {
        name: _average([sums[one.label] for one in experts if one.name == name], ranks)
        for name in sorted({one.name for one in experts if one.label in scarce})
    }
    for linear in experts:
        if linear.label in scarce:
            sums[linear.label].fill_up(lenders[linear.name])
    whole = [group for group in groups.values() if group[0].label not in owners]
    owners = {**owners, **owners_of(whole, ranks, weigh)}
    for linear, *_ in whole:
        sums[linear.label].add_up_pairs(ranks, owners[linear.label])
    return BlockSums(sums, scarce, routing, owners)


def remembered_bytes(
    observed: Sequence[Linear],
    found: Sequence[Linear],
    parts: Parts,
    ranks: int = 1,
    weigh: Weigh = count_products,
) -> int:
    """Return at most how many bytes Gram matrices and gradients of a block take.

    Args:
        observed: The linears whose inputs are remembered.
        found: All of the block: a walk backward makes the gradients of each.
        parts: What is remembered.
        ranks: In each of so many processes, which divide the experts' Gram matrices among them.
        weigh: Tells what solving takes.
    """
    pairs = [0] * ranks
    owners = owners_of([[one] for one in observed if one.expert is not None], Ranks(0, ranks), weigh)
    for linear in observed if "gram" in parts else ():
        for number in range(ranks):
            if owners.get(linear.label, number) == number:
                pairs[number] += pair_bytes(linear.weight.shape[1])
    gradients = 4 * len(gradient_means(parts)) * sum(linear.weight.numel() for linear in found)
    return max(pairs) + gradients


def _average(every: Sequence[InputSums], ranks: Ranks) -> InputSums:
    """Return the sums over all experts of a projection; all processes get those of pairs, too."""
    first = every[0]
    average = InputSums(first.parts, first.width, first.device, first.chunks)
    for one in every:
        average.merge(one)
    average.add_up_pairs(ranks)
    return average


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
            f"(a Gram matrix of {width} x {width} takes {pair_bytes(width) / 2**30:.2f} GiB)",
            hint="hold less beside it: --stream, a smaller batch_size or fewer samples; or --exclude it",
        ) from None
