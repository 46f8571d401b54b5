"""A step of all three factors together: Gauss-Newton by conjugate gradients, on the core's present support.

Solving for one factor at a time creeps along valleys in which the factors must change together; the
linearised problem sees them. The left wrapper is eliminated from it, because whatever the others do, it can
be solved for exactly (variable projection). Among the lengths of the step the one with the least true loss
is taken, because a direction that is good for the linearised loss may be too long.

Source of the problem: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528
"""

import torch
from torch import Tensor

from structprune.models.modules import blockwise
from structprune.solvers.armor.core import diagonal
from structprune.solvers.armor.problem import Problem, State
from structprune.solvers.armor.wrappers import solve_left

# Of the mean curvature, as for the exact solutions of the wrappers.
RIDGE = 1e-4
# From the whole step downwards, until it gets worse again.
LENGTHS = (1.0, 0.7, 0.5, 0.3, 0.15, 0.05)


def joint_step(problem: Problem, state: State, steps: int) -> State:
    """Return the state after a step of left, core and right together, or the same if none lowers the loss.

    Args:
        problem: The problem.
        state: Where to start.
        steps: Conjugate-gradient steps; few are a cautious direction, many the full Gauss-Newton step.
    """
    core, right = _direction(problem, state, steps)
    best = state
    for length in LENGTHS:
        moved = problem.state(state.left, state.core + length * core, state.right + length * right)
        moved = solve_left(problem, moved)
        if moved.loss < best.loss:
            best = moved
        elif best is not state:
            break
    return best


def _direction(problem: Problem, state: State, steps: int) -> tuple[Tensor, Tensor]:
    """Return the direction of core and right that conjugate gradients find for the linearised problem.

    The core's part is kept by block columns, [in / c, out, c], and turned once at the end.
    """
    left, core, right = state.left, problem.columns(state.core).contiguous(), state.right
    inner = problem.rows(blockwise(right.mT, state.core))
    outer = problem.columns((left @ problem.rows(state.core)).reshape(state.core.shape))
    left_inverse = inverse_of(inner @ problem.rows(problem.weighed(inner.reshape(state.core.shape))).mT)
    right_inverse = inverse_of(outer.mT @ outer)
    own = diagonal(left.mT @ left).reshape(1, -1, 1) * diagonal(right @ right.mT)[:, None]
    ease = (core != 0) / own  # zero off the support, where nothing may move

    def projected(residual: Tensor) -> Tensor:
        """Take away in place what the left wrapper can make up for."""
        rows = problem.rows(residual)
        rows.baddbmm_(problem.rows(problem.weighed(residual)) @ inner.mT @ left_inverse, inner, alpha=-1)
        return residual

    def ahead(core_step: Tensor, right_step: Tensor) -> Tensor:
        turned = torch.bmm(core_step, right).baddbmm_(core, right_step)
        return (left @ problem.rows(_by_rows(turned))).view(state.core.shape)

    def back(residual: Tensor) -> tuple[Tensor, Tensor]:
        pulled = left.mT @ problem.rows(problem.weighed(residual))
        by_column = problem.columns(pulled.view(state.core.shape))
        return torch.bmm(by_column, right.mT), torch.bmm(core.mT, by_column)

    residual = projected(-state.residual)
    pull = back(residual)
    toward = pull[0] * ease, right_inverse @ pull[1]
    before = _dot(pull[0], toward[0]) + _dot(pull[1], toward[1])
    direction, total = toward, (torch.zeros_like(toward[0]), torch.zeros_like(toward[1]))
    for _ in range(steps):
        if before <= 0:  # nothing is left to gain
            break
        reach = projected(ahead(*direction))
        length = before / max(_dot(reach, problem.weighed(reach)), torch.finfo(reach.dtype).tiny)
        for part, change in zip(total, direction):
            part.add_(change, alpha=length)
        pull = back(residual.sub_(reach, alpha=length))
        toward = pull[0] * ease, right_inverse @ pull[1]
        now = _dot(pull[0], toward[0]) + _dot(pull[1], toward[1])
        for change, fresh in zip(direction, toward):
            change.mul_(now / before).add_(fresh)
        before = now
    return _by_rows(total[0]), total[1]


def _by_rows(columns: Tensor) -> Tensor:
    """Turn [in / c, out, c] back into [out, in]."""
    return columns.transpose(0, 1).reshape(columns.shape[1], -1)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.reshape(-1), other.reshape(-1)))


def inverse_of(normal: Tensor) -> Tensor:
    """Invert normal matrices [n, b, b], lifted off singularity."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    inverse: Tensor = torch.linalg.inv(normal + (RIDGE * mean + 1e-30) * identity)
    return inverse
