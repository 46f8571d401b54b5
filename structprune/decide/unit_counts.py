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

WidthUnit = Literal["kv_group", "head", "channel"]
"""A key-value head with its query heads; one query head of every key-value head; a feed-forward's channel."""


KINDS: tuple[WidthUnit, ...] = ("kv_group", "head", "channel")


@dataclass(frozen=True)
class UnitCosts:
    """Parameters of one unit; 0 for a kind that the block lacks or that is not to be pruned.

    Attributes:
        kv_group: Of a key-value head with its query heads.
        channel: Of a channel of the feed-forward.
        head: Of one query head of every key-value head.
    """

    kv_group: int = 0
    channel: int = 0
    head: int = 0

    def of(self, kind: WidthUnit) -> int:
        """Return what a unit of a kind costs."""
        each: int = getattr(self, kind)
        return each


@dataclass(frozen=True)
class UnitCounts:
    """How many units of a block there are, or stay; heads are query heads of each key-value head."""

    kv_groups: int
    channels: int
    heads: int = 1

    def of(self, kind: WidthUnit) -> int:
        """Return how many units there are of a kind."""
        count: int = getattr(self, f"{kind}s")
        return count

    def cost(self, costs: UnitCosts) -> int:
        """Return their parameters."""
        return sum(self.of(kind) * costs.of(kind) for kind in KINDS)


@dataclass(frozen=True)
class Multiples:
    """Of what the numbers of units that stay are multiples."""

    kv_groups: int = 1
    channels: int = 1

    def of(self, kind: WidthUnit) -> int:
        """Return the multiple of a kind of unit; heads have none."""
        return {"kv_group": self.kv_groups, "channel": self.channels, "head": 1}[kind]


def unit_costs(
    block: nn.Module, arch: Arch, kinds: Sequence[WidthUnit], biases: Sequence[str] = ()
) -> UnitCosts:
    """Return what one unit of each kind costs in parameters.

    Args:
        block: The block; its parameters may be on the meta device.
        arch: Its family's row.
        kinds: Those that may leave.
        biases: Linears that are counted with a bias though they have none, by their path.
    """
    sizes, shapes = block_sizes(block, arch), {name: one.shape for name, one in block.named_parameters()}
    first = torch.zeros(1, dtype=torch.int64)

    def parameters(keep: BlockKeep) -> int:
        cut = cuts(block, arch, keep)
        rows = [one.indices for one in cut if one.axis == 0 and one.path.removesuffix(".weight") in biases]
        each = [prod(shapes[one.path]) // shapes[one.path][one.axis] * len(one.indices) for one in cut]
        return sum(each) + sum(map(len, rows))

    costs = UnitCosts()
    if sizes.attention and "kv_group" in kinds:
        costs = replace(costs, kv_group=parameters(kv_groups(sizes, first)))
    if sizes.heads > sizes.kv_heads and "head" in kinds:
        # Fused with keys and values, the rows of queries are the difference.
        one = parameters(_first_heads(sizes, 2)) - parameters(_first_heads(sizes, 1))
        costs = replace(costs, head=one)
    if sizes.channels and "channel" in kinds:
        costs = replace(costs, channel=parameters(BlockKeep(channels=first)))
    return costs


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
    if kind == "head":
        # Keys and values stay, so what does not grow with the queries is no part of a head.
        return _head_places(block, arch, sizes)
    single = [cuts(block, arch, kv_groups(sizes, torch.tensor([unit]))) for unit in range(sizes.kv_heads)]
    found = []
    for parts in zip(*single, strict=True):
        units = torch.empty(sum(len(part.indices) for part in parts), dtype=torch.int64)
        for unit, part in enumerate(parts):
            units[part.indices] = unit
        found.append(replace(parts[0], indices=units))
    return found


def _head_places(block: nn.Module, arch: Arch, sizes: BlockSizes) -> list[Cut]:
    """Return where query heads stand: -1 at what is no head's."""
    each = sizes.heads // sizes.kv_heads
    # Of every key-value head the same query head stays, so what differs from place to place is theirs.
    slots = [cuts(block, arch, _first_heads(sizes, 1, slot)) for slot in range(each)]
    whole, found = cuts(block, arch, _first_heads(sizes, each)), []
    for number, one in enumerate(whole):
        units = torch.full((len(one.indices),), -1, dtype=torch.int64)
        for slot, parts in enumerate(slots):
            others = torch.cat([other[number].indices for at, other in enumerate(slots) if at != slot])
            mine = parts[number].indices[~torch.isin(parts[number].indices, others)]
            for group, rows in enumerate(mine.view(sizes.kv_heads, -1)):
                units[rows] = group * each + slot
        if bool((units >= 0).any()):
            found.append(replace(one, indices=units))
    return found


def _first_heads(sizes: BlockSizes, count: int, first: int = 0) -> BlockKeep:
    """Return a keep of so many query heads of every key-value head."""
    starts = torch.arange(0, sizes.heads, sizes.heads // sizes.kv_heads)
    return BlockKeep(heads=(starts[:, None] + torch.arange(first, first + count)).flatten())


def counts_of(sizes: BlockSizes) -> UnitCounts:
    """Return how many units a block has."""
    return UnitCounts(sizes.kv_heads, sizes.channels, sizes.heads // max(sizes.kv_heads, 1))


def uniform_counts(
    there: UnitCounts, costs: UnitCosts, sparsity: float | Fraction, multiples: Multiples = Multiples()
) -> UnitCounts:
    """Return how many units of a block stay when a share of its units' parameters leaves.

    The attention takes the nearest number of groups or heads, and channels make up the difference.

    Args:
        there: What the block has.
        costs: Of one unit.
        sparsity: Share of the parameters, in [0, 1).
        multiples: Of what the numbers that stay are multiples; a kind that has no such number stays whole.
    """
    asked = fraction_of(sparsity)
    stay = there
    if costs.kv_group:
        groups = _nearest(there.kv_groups * (1 - asked), there.kv_groups, multiples.kv_groups)
        stay = replace(stay, kv_groups=groups)
    if costs.head:
        stay = replace(stay, heads=_nearest(there.heads * (1 - asked), there.heads, 1))
    if costs.channel:
        left = (1 - asked) * there.cost(costs) - replace(stay, channels=0).cost(costs)
        channels = _nearest(left / costs.channel, there.channels, multiples.channels)
        stay = replace(stay, channels=channels)
    return stay


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
            # Sorted within the block, so that its highest are what stays.
            for mean, count in _between(units.sort().values, multiples.of(kind)):
                ranked.append((mean, index, kind, count, count * cost.of(kind)))
    ranked.sort(key=lambda one: (one[0], one[1]))
    # |removed + size - target| < |removed - target|, in whole numbers: a large model has a million units.
    limit = ceil(2 * target)
    removed, gone = 0, [dict[WidthUnit, int](kv_group=0, head=0, channel=0) for _ in there]
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
        replace(one, **{f"{kind}s": one.of(kind) - left[kind] for kind in KINDS})
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
