"""The paper's own search for a factorisation: Adam on all three factors; kept to compare with.

Source: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528
Where it deviates: the best state seen is what is returned, because Adam may end above it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from structprune.errors import UsageError
from structprune.models.modules import blockwise
from structprune.solvers.armor.core import best_values, support_inverses
from structprune.solvers.armor.problem import Problem, State

# The paper's.
RATE = 1e-4
# Steps between two looks at the loss, which a step itself does not need.
LOOK = 50


def descend_by_adam(
    problem: Problem,
    start: State,
    scale: Tensor,
    *,
    steps: int,
    seed: int,
    watch: Callable[[float], None] | None = None,
) -> tuple[State, list[float]]:
    """Take Adam steps on left, core and right together, each followed by one group update per block.

    Args:
        problem: With the diagonal proxy.
        start: The first state.
        scale: sqrt(D), shape [in]: Adam sees the right wrapper without it, as in the paper.
        steps: How many.
        seed: Chooses the groups.
        watch: Told the relative loss at every look.

    Returns:
        The best state seen, and the best loss so far at every look.

    Raises:
        UsageError: The proxy is a Gram matrix, for which the blocks cannot be updated side by side.
    """
    if problem.gram is not None:
        raise UsageError(
            'solver "adam" knows only the diagonal proxy', hint="--set proxy=diagonal, or another solver"
        )
    columns = scale.view(-1, 1, problem.sizes[1])
    generator = torch.Generator().manual_seed(seed)
    left, core, right = start.left.clone(), start.core.clone(), start.right / columns
    optimiser = torch.optim.Adam([left, core, right], lr=RATE, fused=True)
    best, losses, mask = start, [start.loss], core != 0
    for step in range(1, steps + 1):
        weighted = right * columns
        inner = problem.rows(blockwise(weighted.mT, core))
        residual = left @ inner - problem.rows(problem.target)
        pulled = (left.mT @ residual).reshape(core.shape)
        # By hand: autograd would keep every intermediate of [out, in].
        left.grad = 2 * residual @ inner.mT
        core.grad = 2 * blockwise(weighted, pulled) * mask
        right.grad = 2 * (problem.columns(core).mT @ problem.columns(pulled)) * columns
        optimiser.step()
        core *= mask  # momentum still moves what has left the support
        _update_groups(problem, left, core, right * columns, generator)
        mask = core != 0
        if step % LOOK == 0 or step == steps:
            state = problem.state(left.clone(), core.clone(), right * columns)
            best = state if state.loss < best.loss else best
            losses.append(best.loss)
            if watch is not None:
                watch(best.loss)
    return best, losses


def _update_groups(
    problem: Problem, left: Tensor, core: Tensor, right: Tensor, generator: torch.Generator
) -> None:
    """Update one group of every block of the core in place, drawn in proportion to its gradient."""
    of = problem.pattern[1]
    inner = problem.rows(blockwise(right.mT, core))
    residual = left @ inner - problem.rows(problem.target)
    gradient = blockwise(right, (left.mT @ residual).reshape(core.shape))
    blocks = problem.pairs(gradient)
    rows, columns, out, inputs = blocks.shape
    groups = blocks.reshape(rows * columns, -1, of)
    # As in the paper; the tiny number keeps a block at its optimum drawable.
    odds = groups.abs().sum(-1) + torch.finfo(core.dtype).tiny
    drawn = torch.multinomial(odds, 1, generator=generator)[:, 0].view(rows, columns)
    line, first = drawn // (inputs // of), drawn % (inputs // of) * of
    block_row, block_column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    own = left.square().sum(1)[block_row, line][..., None]
    at = first[..., None] + torch.arange(of)
    wrapped = right[block_column[..., None], at]
    curvature = wrapped @ wrapped.mT
    row, column = (block_row * out + line)[..., None], block_column[..., None] * inputs + at
    linear = gradient[row, column] / own - (core[row, column][..., None, :] @ curvature)[..., 0, :]
    inverses = support_inverses(curvature, problem.pattern).flatten(0, 1)
    core[row, column] = best_values(linear.view(-1, 1, of), inverses).view(rows, columns, of)
