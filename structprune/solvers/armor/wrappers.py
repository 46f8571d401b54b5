"""The wrappers of a factored weight, each solved for exactly while the rest stands still.

Source: Liu et al. 2025, ARMOR, https://arxiv.org/abs/2510.05528 (the problem; the paper takes gradient steps)
"""

import torch
from torch import Tensor

from structprune.errors import QualityError
from structprune.models.modules import blockwise
from structprune.solvers.armor.problem import Problem, State

# Relative to the mean diagonal: 1e-6 is some ten units in the last place of float32, 1e-2 what SparseGPT
# damps with. What is solved for is the step from the present value: a ridge shortens it; it still descends.
RIDGES = (1e-6, 1e-4, 1e-2)


def solve_left(problem: Problem, state: State) -> State:
    """Solve for the left wrapper exactly: least squares with one normal matrix per block."""
    inner = blockwise(state.right.mT, state.core)
    regressors, weighed = problem.rows(inner), problem.rows(problem.weighed(inner))
    # The residual's correction is solved for, so that the ridge pulls towards the present value.
    answer = solve_normal_equations(regressors @ weighed.mT, weighed @ problem.rows(state.residual).mT)
    return problem.state(state.left - answer.mT, state.core, state.right)


def solve_right(problem: Problem, state: State) -> State:
    """Solve for the right wrapper exactly, with a Gram matrix one block after the other.

    With O = left @ core (its block column k) and the residual R, the loss is least in the step d where
    O^T O d H_kk = O^T (R H)_k: so first H_kk is taken out on the right, then O^T O on the left.
    """
    outer = torch.bmm(state.left, problem.rows(state.core)).reshape(state.core.shape)
    right, residual = state.right.clone(), state.residual.clone()
    for part in problem.parts:
        span = problem.span(part)
        regressors = problem.columns(outer)[part]
        answers = regressors.mT @ problem.columns(problem.weighed(residual, span))
        between = problem.between(part)
        if between is not None:
            # Definite, because the correlations were damped off their diagonal of ones.
            answers = torch.linalg.solve(between, answers, left=False)
        step = solve_normal_equations(regressors.mT @ regressors, answers)
        right[part] -= step
        if between is not None:
            # The next block column sees what this one left, as H couples them; `problem.state` computes the
            # residual anew, so that no rounding adds up.
            residual[:, span] -= (regressors @ step)[0]
    return problem.state(state.left, state.core, right)


def solve_normal_equations(normal: Tensor, answers: Tensor) -> Tensor:
    """Solve normal equations [n, b, b] x = answers [n, b, c], all blocks damped as little as works for each.

    Cholesky reads the lower triangles only, so rounding that makes a product unsymmetric does not matter.

    Raises:
        QualityError: No damping makes them definite: something is not finite.
    """
    mean = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    for ridge in RIDGES:
        # The tiny number serves a block that is zero altogether, where any answer is as good.
        factor, failed = torch.linalg.cholesky_ex(normal + (ridge * mean + 1e-30) * identity)
        if not failed.any():
            return torch.cholesky_solve(answers, factor)
    raise QualityError(
        f"normal equations of {list(normal.shape)} are not definite",
        hint="look for NaN in the weights or in the calibration statistics",
    )
