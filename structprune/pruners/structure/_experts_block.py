"""What is known of a block's mixture before any data: its experts, what one costs, how many must stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, prod

import torch
from torch import Tensor

from structprune.decide.sparsity import fraction_of, share_below
from structprune.decide.units import UnitBlock, unit_blocks
from structprune.errors import UsageError
from structprune.models.arch import TABLE, arch_of
from structprune.models.groups import BlockKeep, cuts
from structprune.models.identity import names_of, skeleton
from structprune.models.streamed import Model
from structprune.pruners.forecast import WholeUnits


@dataclass(frozen=True)
class ExpertBlock(UnitBlock):
    """One block.

    Attributes:
        experts: How many experts may leave but for the least: all of the block's, or 0 in one that is skipped
            or has no mixture.
        cost: Parameters of one expert and its part of the router.
        least: As many as a token is routed to.
        router: Name of the router's weight in the files.
    """

    experts: int = 0
    cost: int = 0
    least: int = 0
    router: str = ""


def expert_blocks(model: Model, skipped: Sequence[bool]) -> list[ExpertBlock]:
    """Return what is known of every block.

    Args:
        model: In memory, streamed, or a twin.
        skipped: Per block, whether nothing may leave.

    Raises:
        UsageError: The family has no mixture of experts that is known.
    """
    module = skeleton(model)
    if not arch_of(module).experts:
        known = ", ".join(sorted(kind for row in TABLE if row.experts for kind in row.model_types))
        raise UsageError(
            f"model type {module.config.model_type!r} has no mixture of experts that is known",
            hint=f"experts leave from {known}; from other models heads, channels or blocks can",
        )
    pairs = zip(unit_blocks(model), skipped, strict=True)
    return [_expert_block(model, one, skip=skip) for one, skip in pairs]


def _expert_block(model: Model, found: UnitBlock, *, skip: bool) -> ExpertBlock:
    prefix, block, arch, sizes = found.prefix, found.module, found.arch, found.sizes
    if skip or not sizes.experts:
        return ExpertBlock(prefix, block, arch, sizes)
    shapes = {name: one.shape for name, one in block.named_parameters()}
    one = cuts(block, arch, BlockKeep(experts=torch.zeros(1, dtype=torch.int64)))
    cost = sum(prod(shapes[cut.path]) // shapes[cut.path][cut.axis] for cut in one)
    least = int(skeleton(model).config.get_text_config().num_experts_per_tok)
    (router,) = names_of(model).stored_of[f"{prefix}.{arch.routers[0]}.weight"]
    return ExpertBlock(prefix, block, arch, sizes, sizes.experts, cost, least, router)


def whole_experts(found: Sequence[ExpertBlock], *, pooled: bool) -> WholeUnits:
    """Return how many experts can leave.

    Args:
        found: The blocks.
        pooled: Whether blocks may lose unequal numbers, so that all experts of the model are one pool.
    """
    if pooled:
        every = sum(one.experts for one in found)
        return WholeUnits("experts", every - sum(one.least for one in found), every)
    # Every block loses the same share: the one that can lose the smallest tells how much.
    pools = [one for one in found if one.experts] or [found[0]]
    tight = max(pools, key=lambda one: Fraction(one.least, one.experts or 1))
    return WholeUnits("experts of a block", tight.experts - tight.least, tight.experts)


def check_share(found: Sequence[ExpertBlock], sparsity: float, *, pooled: bool) -> None:
    """Check that a share of the experts can leave.

    Args:
        found: The blocks.
        sparsity: Share of the experts' parameters, in [0, 1).
        pooled: Whether blocks may lose unequal numbers.

    Raises:
        UsageError: There are no experts, none would leave, or a token is routed to more than would stay.
    """
    pools = [(one.prefix, one.experts, one.least) for one in found if one.experts]
    if not pools:
        raise UsageError("skip: every block with a mixture of experts is skipped", hint="skip fewer blocks")
    if pooled:
        pools = [("the model", sum(one.experts for one in found), sum(one.least for one in found))]
    if not sparsity:
        return
    for where, experts, least in pools:
        if (count := _nearest(experts, sparsity)) < least:
            most = min(Fraction(there - few, there) for _, there, few in pools)
            raise UsageError(
                f"sparsity: {sparsity} would leave {count} of the {experts} experts of {where}, and a token "
                f"is routed to {least}",
                hint=f"ask for at most {share_below(*most.as_integer_ratio())}",
            )
    if all(_nearest(experts, sparsity) == experts for _, experts, _ in pools):
        where, experts, least = max(pools, key=lambda pool: pool[1])
        raise UsageError(
            f"sparsity: {sparsity} of the {experts} experts of {where} is less than half an expert",
            hint=f"ask for {_legal(experts, least)}",
        )


def _nearest(experts: int, sparsity: float) -> int:
    """Return the nearest number that stay; of two equally near ones the higher."""
    return floor(experts * (1 - fraction_of(sparsity)) + Fraction(1, 2))


def _legal(experts: int, least: int) -> str:
    """Return the shares at which whole experts leave, and how many stay then; of many the first ones."""
    shares = [f"{(experts - stay) / experts:.4g} ({stay} stay)" for stay in range(experts - 1, least - 1, -1)]
    return " or ".join(shares if len(shares) < 5 else [*shares[:3], f"more, up to {shares[-1]}"])


def uniform_stay(found: Sequence[ExpertBlock], sparsity: float) -> list[int]:
    """Return how many experts of each block stay when every block loses the same share, as near as it can.

    Args:
        found: The blocks.
        sparsity: Share of the experts' parameters, in [0, 1).
    """
    return [max(_nearest(one.experts, sparsity), one.least) for one in found]


def global_stay(found: Sequence[ExpertBlock], scores: Sequence[Tensor], sparsity: float) -> list[int]:
    """Return how many experts of each block stay when all experts of the model compete.

    Experts leave in the order of their scores, equal ones in the order of blocks, until what left is as near
    as possible to what was asked; no block keeps fewer than a token is routed to.

    Args:
        found: The blocks.
        scores: Of each block's experts, shape [experts]; a higher one stays.
        sparsity: Share of the experts' parameters, in [0, 1).
    """
    target = fraction_of(sparsity) * sum(one.experts * one.cost for one in found)
    ranked: list[tuple[float, int]] = []
    for index, (one, block) in enumerate(zip(found, scores, strict=True)):
        ranked += [(score, index) for score in block.sort().values[: one.experts - one.least].tolist()]
    removed, stay = 0, [one.experts for one in found]
    for _, index in sorted(ranked):
        cost = found[index].cost
        if abs(removed + cost - target) >= abs(removed - target):
            return stay
        removed += cost
        stay[index] -= 1
    return stay
