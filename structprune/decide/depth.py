"""Which blocks leave, or which attentions and feed-forwards: lowest scores, neighbours, or least harm."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from structprune.calibration.states import angular_distance
from structprune.decide.sparsity import share_below
from structprune.errors import QualityError, UsageError
from structprune.models.arch import Arch
from structprune.models.groups import BlockKeep, BlockSizes, block_sizes

logger = logging.getLogger(__name__)

DepthKind = Literal["block", "attention", "mlp"]


@dataclass(frozen=True, order=True)
class DepthUnit:
    """A block, its attention or its feed-forward.

    Attributes:
        block: Index of the block.
        kind: Which of them.
        parameters: How many it has.
    """

    block: int
    kind: DepthKind
    parameters: int = field(compare=False)


@dataclass(frozen=True)
class DepthGoal:
    """How much is to leave.

    Attributes:
        target: A number of parameters, or of units where these are `counted`.
        counted: Whether units count alike, whatever their parameters.
        most: At most so many units leave.
    """

    target: Fraction
    counted: bool
    most: int

    def check(self, asked: str, units: Sequence[DepthUnit]) -> None:
        """Check that whole units can leave, and as many as the target asks for.

        Args:
            asked: What was asked for, behind its key.
            units: Those that may leave.

        Raises:
            UsageError: They cannot; names a share that can.
        """
        sizes = sorted(1 if self.counted else unit.parameters for unit in units)
        most, whole = sum(sizes[-self.most :]), sum(sizes)
        if not any(self.wants([], unit) for unit in units):
            # Once all that may leave do, a count says it, but no share can.
            shares = [sum(sizes[:few]) / whole for few in range(1, min(self.most, 3) + 1)]
            near = ", ".join(f"{share:.3g}" for share in shares if share < 1)
            hint = f"ask for {near} or more, or for count: 1" if near else "ask for count: 1"
            raise UsageError(f"{asked} rounds to none", hint=hint)
        if self.target > most + Fraction(sizes[0], 2):
            raise UsageError(
                f"{asked} rounds to all of them, and one has to stay",
                hint=f"ask for at most {share_below(most, whole)}",
            )

    def miss(self, gone: Sequence[DepthUnit]) -> Fraction:
        """Return how far from the target a model without some units is."""
        return abs(sum(1 if self.counted else unit.parameters for unit in gone) - self.target)

    def wants(self, gone: Sequence[DepthUnit], unit: DepthUnit) -> bool:
        """Tell whether one more unit brings the model nearer to the target; of two as near, more stays."""
        return len(gone) < self.most and self.miss([*gone, unit]) < self.miss(gone)


def depth_units(
    found: Sequence[tuple[str, nn.Module]], arch: Arch, kinds: Sequence[DepthKind]
) -> list[DepthUnit]:
    """Return the units of a model, block by block; what is gone already is none.

    Args:
        found: Every block with its path; parameters may be on the meta device.
        arch: The family's row.
        kinds: Which units.

    Raises:
        UsageError: The family's parts are not known.
    """
    units: list[DepthUnit] = []
    for index, (_, block) in enumerate(found):
        sizes = block_sizes(block, arch)
        there = {"block": True, "attention": sizes.attention, "mlp": sizes.mlp}
        parts: dict[DepthKind, list[str]] = {
            "block": [""],
            "attention": [arch.attention],
            "mlp": [arch.mlp] if arch.mlp else [arch.up, arch.down],
        }
        for kind in kinds:
            if there[kind]:
                modules = [block.get_submodule(path) for path in parts[kind]]
                size = sum(one.numel() for module in modules for one in module.parameters())
                units.append(DepthUnit(index, kind, size))
    return units


def keeps_without(gone: Sequence[DepthUnit]) -> dict[int, BlockKeep]:
    """Return what stays of the blocks that lose something, by index of the block."""
    keeps: dict[int, BlockKeep] = {}
    for unit in gone:
        off: dict[str, Any] = {unit.kind: False}
        keeps[unit.block] = replace(keeps.get(unit.block, BlockKeep()), **off)
    return keeps


def sizes_without(sizes: BlockSizes, keep: BlockKeep) -> BlockSizes:
    """Return what a block has once its attention or its feed-forward is skipped."""
    if not keep.attention:
        sizes = replace(sizes, heads=0, kv_heads=0, attention=False)
    if not keep.mlp:
        sizes = replace(sizes, channels=0, experts=0, expert_width=0, mlp=False)
    return sizes


def lowest_units(scores: Mapping[DepthUnit, float], goal: DepthGoal) -> list[DepthUnit]:
    """Return the units of the lowest scores, lowest first; of equal ones the first leaves.

    Args:
        scores: Of every unit that may leave.
        goal: How much does.
    """
    gone: list[DepthUnit] = []
    for unit in sorted(scores, key=lambda unit: (scores[unit], unit)):
        if not goal.wants(gone, unit):
            break
        gone.append(unit)
    return gone


def span_distance(states: Sequence[Tensor], first: int, count: int) -> float:
    """Return the mean angular distance between what enters one block and what leaves another.

    Source: Gromov et al. 2024, https://arxiv.org/abs/2403.17887

    Args:
        states: What enters each block, then what leaves the last one, shape [sequences, hidden] each.
        first: The block that is entered.
        count: How many blocks lie between.
    """
    before, after = (states[index].double() for index in (first, first + count))
    return float(angular_distance(cosine_similarity(before, after, dim=-1)).mean())


def nearest_span(
    units: Sequence[DepthUnit], distance: Callable[[int, int], float], goal: DepthGoal
) -> tuple[list[DepthUnit], float]:
    """Return the consecutive blocks that change the states least, and by how much.

    Args:
        units: The blocks that may leave, ascending.
        distance: Between what enters a block and what leaves so many blocks later.
        goal: How much leaves.
    """
    best: tuple[list[DepthUnit], float] = ([], 0.0)
    for count in range(1, goal.most + 1):
        spans = [units[start : start + count] for start in range(len(units) - count + 1)]
        whole = [span for span in spans if span[-1].block - span[0].block == count - 1]
        if not whole:
            break
        found = [(distance(span[0].block, count), number) for number, span in enumerate(whole)]
        value, number = min(found)
        if goal.miss(whole[number]) < goal.miss(best[0]):
            best = list(whole[number]), value
    return best


def least_harm(
    units: Sequence[DepthUnit], loss: Callable[[Mapping[int, BlockKeep]], float], goal: DepthGoal
) -> dict[DepthUnit, float]:
    """Return which units leave, one after another, and the loss of the model without it and those before.

    Args:
        units: Those that may leave.
        loss: Of a model of which only some stays.
        goal: How much leaves.

    Raises:
        QualityError: No unit can leave without the loss being infinite.
    """
    gone: dict[DepthUnit, float] = {}
    rest = list(units)
    while any(goal.wants([*gone], unit) for unit in rest):
        losses = [loss(keeps_without([*gone, unit])) for unit in rest]
        lowest = min(losses)
        if not math.isfinite(lowest):
            raise QualityError(
                f"the loss is not finite whichever {rest[0].kind} leaves after {len(gone)} others",
                hint="ask for less, or compute in another dtype",
            )
        unit = rest[losses.index(lowest)]
        if not goal.wants([*gone], unit):
            break
        logger.info("%s of block %d leaves: the loss is %.5g without it", unit.kind, unit.block, lowest)
        rest.remove(unit)
        gone[unit] = lowest
    return gone


def random_scores(units: Sequence[DepthUnit], seed: int) -> dict[DepthUnit, float]:
    """Return a score of every unit that only chance decides."""
    drawn = torch.rand(len(units), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dict(zip(units, drawn.tolist(), strict=True))
