"""How many weights leave each linear of a model: a sparsity and a budget, in whole numbers."""

from collections.abc import Sequence
from fractions import Fraction

from torch import nn

from structprune.decide.budgets.budget import (
    Budget,
    Compare,
    TargetParams,
    apportion,
    removed_count,
    removed_weights,
)
from structprune.models.arch import Linear


def counts(
    chosen: Sequence[Sequence[Linear]],
    sparsity: float | str,
    compare: Compare,
    budget: Budget | None,
    model: nn.Module,
    measured: Sequence[float],
) -> dict[str, int]:
    """Return how many weights leave each linear, by label.

    Args:
        chosen: The linears to prune, block by block.
        sparsity: Fraction removed, or "N:M".
        compare: Where a uniform budget rounds down: in each row, or once for the matrix.
        budget: How unequal the shares are; None for uniform ones.
        model: All parameters, for a budget that counts them.
        measured: What the budget measured, one number per block.

    Raises:
        UsageError: The budget does not fit the model.
    """
    sizes = {linear.label: linear.weight.numel() for block in chosen for linear in block}
    if budget is None:
        shapes = {one.label: (one.weight.shape[0], one.weight.shape[1]) for block in chosen for one in block}
        return {label: removed_weights(shape, sparsity, compare) for label, shape in shapes.items()}
    total = removed_count(sum(sizes.values()), sparsity)
    if isinstance(budget, TargetParams):
        total = budget.removed(model, sum(sizes.values()))
    shares = budget.shares(Fraction(total, sum(sizes.values())), measured)
    wanted = {
        linear.label: share * sizes[linear.label]
        for block, share in zip(chosen, shares, strict=True)
        for linear in block
    }
    return apportion(total, wanted, sizes)
