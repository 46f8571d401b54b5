"""Ranks by importance: a block that does more for the states may change more, at the same total.

Source: Wang et al. 2024, CFSP, https://arxiv.org/abs/2409.13199

A reconstruction: the paper speaks of ranks by importance, its released code has no recovery, and its formula
was not at hand. Here ranks are in proportion to the importance that shared out the sparsity, and alpha / rank
is the same everywhere, so that no block learns at a pace of its own.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import inf

from structprune.decide.counts import apportion
from structprune.decide.units import block_list
from structprune.errors import InputError
from structprune.models.arch import arch_of, blocks, linears
from structprune.models.identity import names_of
from structprune.models.members import new_names
from structprune.models.streamed import Model
from structprune.plan.plan import Plan
from structprune.recipe.options import RecoverOptions, no_importance


def spell_out(options: RecoverOptions, model: Model, plans: Sequence[Plan]) -> RecoverOptions:
    """Return the options with ranks by importance as patterns, each with the rank and alpha of a block.

    Args:
        options: How to train; returned as they are where they ask for other ranks.
        model: What was pruned; streamed or in memory.
        plans: What was decided on it, in order.

    Raises:
        UsageError: No plan tells the importance of the blocks.
        InputError: What a plan tells does not fit the blocks.
    """
    if options.ranks != "importance":
        return options
    ranks = proportional_ranks(block_importance(model, plans), options.rank)
    patterns = {f"{re.escape(prefix)}\\..*": rank for prefix, rank in ranks.items()}
    alphas = {pattern: rank * options.alpha / options.rank for pattern, rank in patterns.items()}
    return options.model_copy(update={"ranks": patterns, "alphas": alphas})


def proportional_ranks(importance: Mapping[str, Fraction], rank: int) -> dict[str, int]:
    """Return each block's rank in proportion to its importance: at least 1, and together blocks x rank.

    Args:
        importance: By block, none below 0 and some above.
        rank: The mean.
    """
    left, total = dict(importance), rank * len(importance)
    # Whoever is due less than 1 gets 1; that leaves less for the others, so that another may now be due less.
    while low := [name for name, weight in left.items() if weight * total < sum(left.values())]:
        total -= len(low)
        left = {name: weight for name, weight in left.items() if name not in low}
    ranks = dict.fromkeys(importance, 1)
    return ranks | apportion(total, left, dict.fromkeys(left, total + 1))


def block_importance(model: Model, plans: Sequence[Plan]) -> dict[str, Fraction]:
    """Return what the last plan that tells it says of the blocks that are still there, by their path.

    A block in which nothing is left to train has no part in it; one that its pruning skipped has.

    Args:
        model: What was pruned.
        plans: What was decided on it, in order.

    Raises:
        UsageError: No plan tells it.
        InputError: It is told of other blocks than these, or not in numbers.
    """
    number = max((index for index, plan in enumerate(plans) if "importance" in plan.facts), default=None)
    if number is None:
        raise no_importance([plan.method for plan in plans])
    arch, found = arch_of(model), blocks(model)
    listed = block_list(found, names_of(model))
    told = _checked(plans[number])
    stay = {f"{listed}.{index}.": weight for index, weight in enumerate(told)}
    for plan in plans[number + 1 :]:
        called = new_names(stay, plan)
        stay = {called[name]: weight for name, weight in stay.items() if name in called}
    if stay.keys() != {f"{listed}.{index}." for index in range(len(found))}:
        raise InputError(
            f"recover.ranks: the plan of {plans[number].method} tells the importance of {len(told)} blocks, "
            f"of which {len(stay)} are left; the model has {len(found)}",
            hint="give ranks by name: ranks: {'layers\\.0\\..*': 8, ...}",
        )
    weights = {
        prefix: stay[f"{listed}.{index}."]
        for index, (prefix, block) in enumerate(found)
        if any(linears(prefix, block, arch))
    }
    if not any(weights.values()):
        raise _unfit(plans[number])
    return weights


def _checked(plan: Plan) -> list[Fraction]:
    """Return the importance that a plan tells."""
    told = plan.facts["importance"]
    if not (isinstance(told, list) and all(isinstance(one, int | float) and 0 <= one < inf for one in told)):
        raise _unfit(plan)
    return [Fraction(one) for one in told]


def _unfit(plan: Plan) -> InputError:
    return InputError(
        f"recover.ranks: importance in the plan of {plan.method} is not a list of numbers, none below 0 and "
        "some above",
        hint="the file was changed; prune again, or give ranks by name",
    )
