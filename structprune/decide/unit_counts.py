"""How many units leave each block: what they cost, the nearest legal numbers, or all of a model competing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor, nn

from structprune.decide.sparsity import fraction_of
from structprune.models.arch import Arch
from structprune.models.groups import BlockKeep, BlockSizes, Cut, block_sizes, cuts, kv_groups

WidthUnit = Literal["kv_group", "channel"]


@dataclass(frozen=True)
class UnitCosts:
    """Parameters of one unit; 0 for a kind that the block lacks or that is not to be pruned.

    Attributes:
        kv_group: Of a key-value head with its query heads.
        channel: Of a channel of the feed-forward.
    """

    kv_group: int = 0
    channel: int = 0


@dataclass(frozen=True)
class UnitCounts:
    """How many units of a block there are, or stay."""

    kv_groups: int
    channels: int

    def cost(self, costs: UnitCosts) -> int:
        """Return their parameters."""
        return self.kv_groups * costs.kv_group + self.channels * costs.channel


@dataclass(frozen=True)
class Multiples:
    """Of what the numbers of units that stay are multiples."""

    kv_groups: int = 1
    channels: int = 1


def unit_costs(block: nn.Module, arch: Arch, kinds: Sequence[WidthUnit]) -> UnitCosts:
    """Return what one unit of each kind costs in parameters.

    Args:
        block: The block; its parameters may be on the meta device.
        arch: Its family's row.
        kinds: "kv_group" and "channel", or one of them.
    """
    sizes, shapes = block_sizes(block, arch), {name: one.shape for name, one in block.named_parameters()}
    first = torch.zeros(1, dtype=torch.int64)

    def parameters(keep: BlockKeep) -> int:
        cut = cuts(block, arch, keep)
        return sum(prod(shapes[one.path]) // shapes[one.path][one.axis] * len(one.indices) for one in cut)

    group = parameters(kv_groups(sizes, first)) if sizes.attention else 0
    channel = parameters(BlockKeep(channels=first)) if sizes.channels else 0
    return UnitCosts(group if "kv_group" in kinds else 0, channel if "channel" in kinds else 0)


def unit_places(block: nn.Module, arch: Arch, kind: WidthUnit) -> list[Cut]:
    """Return where the units of a kind stand in a block's parameters, each as often as it has rows.

    Args:
        block: The block; its parameters may be on the meta device.
        arch: Its family's row.
        kind: Which units.

    Returns:
        Of each parameter and axis on which they stand, the unit of every index, shape [length of the axis].
    """
    sizes = block_sizes(block, arch)
    if kind == "channel":
        every = cuts(block, arch, BlockKeep(channels=torch.arange(sizes.channels)))
        # A fused matrix holds several, one after another, with the channels in the same order.
        return [replace(one, indices=one.indices % sizes.channels) for one in every]
    single = [cuts(block, arch, kv_groups(sizes, torch.tensor([unit]))) for unit in range(sizes.kv_heads)]
    found = []
    for parts in zip(*single, strict=True):
        units = torch.empty(sum(len(part.indices) for part in parts), dtype=torch.int64)
        for unit, part in enumerate(parts):
            units[part.indices] = unit
        found.append(replace(parts[0], indices=units))
    return found


def counts_of(sizes: BlockSizes) -> UnitCounts:
    """Return how many units a block has."""
    return UnitCounts(sizes.kv_heads, sizes.channels)


def uniform_counts(
    there: UnitCounts, costs: UnitCosts, sparsity: float | Fraction, multiples: Multiples = Multiples()
) -> UnitCounts:
    """Return how many units of a block stay when a share of its units' parameters leaves.

    The attention takes the nearest number of groups, and channels make up the difference.

    Args:
        there: What the block has.
        costs: Of one unit.
        sparsity: Share of the parameters, in [0, 1).
        multiples: Of what the numbers that stay are multiples; a kind that has no such number stays whole.
    """
    asked = fraction_of(sparsity)
    groups, channels = there.kv_groups, there.channels
    if costs.kv_group:
        groups = _nearest(there.kv_groups * (1 - asked), there.kv_groups, multiples.kv_groups)
    if costs.channel:
        left = (1 - asked) * there.cost(costs) - groups * costs.kv_group
        channels = _nearest(left / costs.channel, there.channels, multiples.channels)
    return UnitCounts(groups, channels)


def uneven_counts(
    shares: Sequence[float],
    there: Sequence[UnitCounts],
    costs: Sequence[UnitCosts],
    multiples: Multiples = Multiples(),
) -> list[UnitCounts]:
    """Return how many units of each block stay when each loses a share of its own.

    What rounding left over in one block is asked of the next, so that the total is within half a unit.

    Args:
        shares: Share of the parameters of each block that may leave, in [0, 1].
        there: What each block has.
        costs: Of one unit of each block.
        multiples: Of what the numbers that stay are multiples.
    """
    counts, owed = [], Fraction(0)
    for share, one, cost in zip(shares, there, costs, strict=True):
        size = one.cost(cost)
        if not size:
            counts.append(one)
            continue
        owed += Fraction(share) * size
        counts.append(uniform_counts(one, cost, min(max(owed / size, Fraction(0)), Fraction(1)), multiples))
        owed -= size - counts[-1].cost(cost)
    return counts


def _nearest(wanted: Fraction, there: int, multiple: int) -> int:
    """Return the multiple in [1, there] that is nearest; `there` itself always counts as one."""
    steps = wanted / multiple
    # Where groups cannot leave as asked, less than no channel may be wanted.
    low = max(steps.numerator // steps.denominator, 0)
    legal = {low * multiple, (low + 1) * multiple, there}
    return min((one for one in legal if 0 < one <= there), key=lambda one: (abs(one - wanted), -one))


def global_counts(
    scores: Sequence[Mapping[WidthUnit, Tensor]],
    there: Sequence[UnitCounts],
    costs: Sequence[UnitCosts],
    sparsity: float | Fraction,
    multiples: Multiples = Multiples(),
) -> list[UnitCounts]:
    """Return how many units of each block stay when all units of the model compete.

    Units leave in the order of their scores, equal ones in the order of blocks, until the parameters that
    left are as near as possible to what was asked; one that would lead away from that stays, smaller ones
    may still leave. Where multiples are to stay, as many as lie between two of them leave together, with
    their mean score. The last unit or multiple of a kind in a block never leaves.

    Args:
        scores: Of each block the scores of the units that may leave, by kind; a higher one stays.
        there: What each block has.
        costs: Of one unit of each block.
        sparsity: Share of the parameters of all units, in [0, 1).
        multiples: Of what the numbers that stay are multiples.
    """
    target = fraction_of(sparsity) * sum(one.cost(cost) for one, cost in zip(there, costs, strict=True))
    ranked: list[tuple[float, int, WidthUnit, int, int]] = []
    for index, (block, cost) in enumerate(zip(scores, costs, strict=True)):
        for kind, units in block.items():
            each = cost.kv_group if kind == "kv_group" else cost.channel
            step = multiples.kv_groups if kind == "kv_group" else multiples.channels
            # Sorted within the block, so that its highest are what stays.
            for mean, count in _between(units.sort().values, step):
                ranked.append((mean, index, kind, count, count * each))
    ranked.sort(key=lambda one: (one[0], one[1]))
    # |removed + size - target| < |removed - target|, in whole numbers: a large model has a million units.
    limit = ceil(2 * target)
    removed, gone = 0, [dict[WidthUnit, int](kv_group=0, channel=0) for _ in there]
    stopped: set[tuple[int, WidthUnit]] = set()
    for _, index, kind, count, size in ranked:
        if (index, kind) in stopped:
            continue
        if 2 * removed + size >= limit:
            stopped.add((index, kind))
            continue
        removed += size
        gone[index][kind] += count
    return [
        UnitCounts(one.kv_groups - left["kv_group"], one.channels - left["channel"])
        for one, left in zip(there, gone, strict=True)
    ]


def _between(scores: Tensor, multiple: int) -> list[tuple[float, int]]:
    """Return mean score and number of units that leave together, lowest first: each time a multiple stays."""
    over = len(scores) % multiple
    if over == len(scores):
        return []
    first = [(float(scores[:over].mean()), over)] if over else []
    means: list[float] = scores[over:].view(-1, multiple)[:-1].mean(dim=1).tolist()
    return first + [(mean, multiple) for mean in means]


def legal_counts(there: int, multiple: int, most: int = 3) -> list[int]:
    """Return the largest numbers of units, below all that are there, that can stay, largest first."""
    first = (there - 1) // multiple * multiple
    return list(range(first, 0, -multiple))[:most]
