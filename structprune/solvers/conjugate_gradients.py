"""Refits the kept weights of all rows at once by conjugate gradients, where systems are too large to factor.

Every row has a system of its own, H restricted to the weights that it keeps; all of them iterate side by side
as products of whole matrices.
"""

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Far below what rounding a weight to bfloat16 costs (2^-9), and above what float32 products lose.
TOLERANCE = 1e-5
# A matrix that needs more is worse conditioned than its damping says; the facts and the log then tell so.
ITERATIONS = 300
# For what is said of a run before it runs; of matrices of language models they were 20 to 71.
USUAL_STEPS = 45


def solve_rows_by_conjugate_gradients(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    start: Tensor,
    *,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> tuple[Tensor, dict[str, Any]]:
    """Solve the systems of all rows at once, with the diagonal as preconditioner.

    Args:
        weight: The weights to come close to, shape [out, in], float32.
        mask: Shape [out, in], bool, True = kept.
        hessian: Positive definite, shape [in, in], float32.
        start: Where to begin, shape [out, in]; only its kept part counts.
        tolerance: Stop when no row's residual is larger, relative to its right-hand side.
        iterations: Stop after so many, and say so in the log and in the facts.

    Returns:
        The solution [out, in], zero where removed; and the facts `iterations`, `residual` (the largest,
        relative to its row's right-hand side, computed anew at the end) and `converged`.
    """
    kept = mask.to(weight.dtype)  # to multiply by: several times as fast as filling by a mask
    target = (weight @ hessian).mul_(kept)
    size = target.square().sum(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = hessian.diagonal().reciprocal()  # the preconditioner
    solution = start * kept
    residual = target - (solution @ hessian).mul_(kept)
    direction = residual * inverse
    product = (residual * direction).sum(1, keepdim=True)
    done = 0
    while done < iterations and bool((residual.norm(dim=1, keepdim=True) > tolerance * size).any()):
        image = (direction @ hessian).mul_(kept)
        # A row that is solved has a direction of zero; its step is then zero and not 0 / 0.
        step = product / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        before, product = product, (residual * scaled).sum(1, keepdim=True)
        direction.mul_(product / before.clamp_min(torch.finfo(torch.float32).tiny)).add_(scaled)
        done += 1
    left = target - (solution @ hessian).mul_(kept)
    relative = float((left.square().sum(1, keepdim=True).sqrt() / size).max())
    # Rounding keeps the true residual above the one that is carried along.
    converged = relative <= 10 * tolerance
    if not converged:
        logger.warning("the refit stopped after %d iterations with a residual of %.1e", done, relative)
    return solution, {"iterations": done, "residual": relative, "converged": converged}
