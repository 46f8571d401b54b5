"""A step of all three factors together: Gauss-Newton by conjugate gradients, on the core's present support.

Solving for one factor at a time creeps along valleys in which the factors must change together; the
linearised problem sees them. The exact solutions for the wrappers precondition it.

Source of the problem: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528
"""

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
    inner, mask = problem.rows(blockwise(right.mT, core)), core != 0
    outer = problem.columns((left @ problem.rows(core)).reshape(core.shape))
    left_inverse = inverted(inner @ problem.rows(problem.weighed(inner.reshape(core.shape))).mT)
    right_inverse = inverted(outer.mT @ outer)
    own = diagonal(left.mT @ left).reshape(-1, 1) * diagonal(right @ right.mT).reshape(-1)

    def ahead(step: Step) -> Tensor:
        turned = problem.rows(blockwise(right.mT, step[1]) + blockwise(step[2].mT, core))
        return (step[0] @ inner + left @ turned).reshape(core.shape)

    def back(residual: Tensor) -> Step:
        weighed = problem.rows(problem.weighed(residual))
        pulled = (left.mT @ weighed).reshape(core.shape)
        by_column = problem.columns(core).mT @ problem.columns(pulled)
        return weighed @ inner.mT, blockwise(right, pulled) * mask, by_column

    def eased(step: Step) -> Step:
        return step[0] @ left_inverse, step[1] / own, right_inverse @ step[2]

    residual = -state.residual
    pull = back(residual)
    toward = eased(pull)
    before = _dot(pull, toward)
    direction, total = toward, _plus(toward, -1.0, toward)
    for _ in range(steps):
        if before <= 0:  # nothing is left to gain
            break
        reach = ahead(direction)
        length = before / max(float((reach * problem.weighed(reach)).sum()), torch.finfo(reach.dtype).tiny)
        total = _plus(total, length, direction)
        residual = residual - length * reach
        pull = back(residual)
        toward = eased(pull)
        now = _dot(pull, toward)
        direction = _plus(toward, now / before, direction)
        before = now
    return total


def _plus(one: Step, factor: float, other: Step) -> Step:
    return one[0] + factor * other[0], one[1] + factor * other[1], one[2] + factor * other[2]


def _dot(one: Step, other: Step) -> float:
    return sum(float((a * b).sum()) for a, b in zip(one, other))


def inverted(normal: Tensor) -> Tensor:
    """Invert normal matrices [n, b, b], lifted off singularity."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    inverse: Tensor = torch.linalg.inv(normal + (RIDGE * mean + 1e-30) * identity)
    return inverse
