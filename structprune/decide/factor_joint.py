"""A step of all three factors together: Gauss-Newton by conjugate gradients, on the core's present support.

Solving for one factor at a time creeps along valleys in which the factors must change together; the
linearised problem sees them. The exact solutions for the wrappers precondition it.

Source of the problem: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from structprune.decide.core import diagonal
from structprune.decide.factor_problem import Problem, State
from structprune.models.modules import blockwise

Step = tuple[Tensor, Tensor, Tensor]

# Of the mean curvature, as for the exact solutions of the wrappers.
RIDGE = 1e-4
# A direction is good for the linearised loss; for the true one it may be too long.
LENGTHS = (1.0, 0.5, 0.2, 0.05)


def joint_step(problem: Problem, state: State, steps: int) -> State:
    """Return the state after a step of left, core and right together, or the same if none lowers the loss.

    Args:
        problem: The problem.
        state: Where to start.
        steps: Conjugate-gradient steps; few are a cautious direction, many the full Gauss-Newton step.
    """
    direction = _direction(problem, state, steps)
    for length in LENGTHS:
        parts = zip((state.left, state.core, state.right), direction)
        moved = problem.state(*(old + length * change for old, change in parts))
        if moved.loss < state.loss:
            return moved
    return state


def _direction(problem: Problem, state: State, steps: int) -> Step:
    """Return the direction that conjugate gradients find for the linearised problem."""
    left, core, right = state.left, state.core, state.right
    inner = problem.rows(blockwise(right.mT, core))
    outer = problem.columns((left @ problem.rows(core)).reshape(core.shape))
    left_inverse = inverted(inner @ problem.rows(problem.weighed(inner.reshape(core.shape))).mT)
    right_inverse = inverted(outer.mT @ outer)
    own = diagonal(left.mT @ left).reshape(-1, 1) * diagonal(right @ right.mT).reshape(-1)
    ease = (core != 0) / own  # zero off the support, where nothing may move

    def ahead(step: Step) -> Tensor:
        turned = problem.rows(blockwise(right.mT, step[1]) + blockwise(step[2].mT, core))
        return (step[0] @ inner + left @ turned).reshape(core.shape)

    def back(residual: Tensor) -> Step:
        weighed = problem.rows(problem.weighed(residual))
        pulled = (left.mT @ weighed).reshape(core.shape)
        by_column = problem.columns(core).mT @ problem.columns(pulled)
        return weighed @ inner.mT, blockwise(right, pulled), by_column

    def eased(step: Step) -> Step:
        return step[0] @ left_inverse, step[1] * ease, right_inverse @ step[2]

    residual = -state.residual
    pull = back(residual)
    toward = eased(pull)
    before = _dot(pull, toward)
    direction = toward
    total = torch.zeros_like(left), torch.zeros_like(core), torch.zeros_like(right)
    for _ in range(steps):
        if before <= 0:  # nothing is left to gain
            break
        reach = ahead(direction)
        length = before / max(_dot((reach,), (problem.weighed(reach),)), torch.finfo(reach.dtype).tiny)
        for part, change in zip(total, direction):
            part.add_(change, alpha=length)
        residual.sub_(reach, alpha=length)
        pull = back(residual)
        toward = eased(pull)
        now = _dot(pull, toward)
        for change, fresh in zip(direction, toward):
            change.mul_(now / before).add_(fresh)
        before = now
    return total


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum(float(torch.dot(a.reshape(-1), b.reshape(-1))) for a, b in zip(one, other))


def inverted(normal: Tensor) -> Tensor:
    """Invert normal matrices [n, b, b], lifted off singularity."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    inverse: Tensor = torch.linalg.inv(normal + (RIDGE * mean + 1e-30) * identity)
    return inverse
