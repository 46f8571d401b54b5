"""The exact refit of the weights that stay: the best that any update on a mask can reach."""

from dataclasses import replace
from math import inf
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from structprune.calibration.statistics import Parts
from structprune.errors import QualityError
from structprune.solvers.conjugate_gradients import USUAL_STEPS, solve_rows_by_conjugate_gradients
from structprune.solvers.effort import VALUE_BYTES, Effort
from structprune.solvers.hessian import DAMPING, Damping, damp_hessian, read_weight
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix
from structprune.solvers.repairs.repair import Repair

# Bytes of the systems that are solved side by side: what a core's cache holds. Beyond it, at 362 weights kept
# in a row, iterating is faster: 768 x 768 at half sparsity takes a fifth of the time that factoring takes.
SYSTEMS = 2**22
# Systems so large that fewer fit are solved by iterating over all rows at once.
FEWEST = 8

Facts = dict[str, Any]


class LeastSquares(Repair):
    """Refit the kept weights of every row to what the dense row computed.

    Args:
        name: "least_squares".
        damping: Added to the diagonal of the Gram matrix, relative to its mean.
    """

    name: Literal["least_squares"] = "least_squares"
    damping: Damping = DAMPING

    parts: ClassVar[Parts] = frozenset({"gram"})

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what the systems of the rows take where half of the weights stay, or the usual steps."""
        factors = rows * (inputs / 2) ** 3 / 3 if inputs**2 * FEWEST <= SYSTEMS else inf
        products = min(factors, 2 * USUAL_STEPS * rows * inputs**2)
        return Effort(products=products, told_bytes=VALUE_BYTES * rows * inputs)

    def _repair(self, matrix: MatrixToPrune, pruned: PrunedMatrix) -> PrunedMatrix:
        fitted, facts = refit_by_least_squares(
            matrix.weight.float(), pruned.mask, matrix.seen.gram, self.damping
        )
        return replace(pruned, weight=fitted, facts={**pruned.facts, **facts})


def refit_by_least_squares(
    weight: Tensor, mask: Tensor, gram: Tensor, damping: float = DAMPING, *, limit: int = SYSTEMS
) -> tuple[Tensor, Facts]:
    """Refit the weights that stay: minimise tr((W - V) H (W - V)^T) over the V that are zero where removed.

    H is damped, so this is a ridge towards the weights as they were, not towards zero: a direction that no
    token showed keeps its weights. Each row is a system of its own, [kept, kept]. Rows are factored in
    batches that fit `limit`; larger systems are solved by conjugate gradients over all rows at once.

    Args:
        weight: Shape [out, in], any float dtype.
        mask: Shape [out, in], bool, True = kept.
        gram: X^T X over all tokens, shape [in, in]; its scale does not matter.
        damping: At least 0, in units of the Gram matrix's mean diagonal.
        limit: Bytes for a batch of systems.

    Returns:
        The new weight [out, in], float32, zero where removed; and the facts: `error_before` and `error`, half
        of tr(dW H dW^T) without and with the refit, `method`, and the `residual` where it iterated.

    Raises:
        QualityError: A value is NaN or infinite, or a system is singular without more damping.
    """
    found = damp_hessian(gram, damping)
    # A mean of 1, so that squares of tiny activations' residuals do not underflow and look solved.
    hessian = found.hessian.div_(found.mean)
    dense = read_weight(weight)
    widest = int(mask.sum(1).max()) if mask.numel() else 0
    facts: Facts = {"error_before": found.mean * _error(dense.masked_fill(mask, 0), hessian)}
    if 4 * widest**2 * FEWEST <= limit:
        new, facts["method"] = _factor_rows(dense, mask, hessian, limit), "cholesky"
    else:
        facts["method"] = "conjugate_gradients"
        new, iterating = solve_rows_by_conjugate_gradients(dense, mask, hessian, dense)
        facts |= iterating
    facts["error"] = found.mean * _error(new - dense, hessian)
    return new, facts


def _error(change: Tensor, hessian: Tensor) -> float:
    """Return half of tr(dW H dW^T), summed in float64."""
    return float((change @ hessian).mul_(change).sum(dtype=torch.float64)) / 2


def _factor_rows(weight: Tensor, mask: Tensor, hessian: Tensor, limit: int) -> Tensor:
    """Refit every row by a Cholesky of its own part of the Hessian, in batches of like size."""
    new = weight.masked_fill(~mask, 0)
    # What the removed weights did to the gradient of those that stay.
    pull = (weight - new) @ hessian
    counts = mask.sum(1)
    order = counts.argsort(descending=True)
    first = 0
    while first < len(order) and (widest := int(counts[order[first]])):
        rows = order[first : first + max(1, limit // (4 * widest**2))]
        # The kept inputs come first; a row that keeps fewer is filled up with equations 1 * x = 0.
        inputs = mask[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :widest]
        real = torch.arange(widest, device=mask.device) < counts[rows, None]
        right = pull[rows].gather(1, inputs).masked_fill_(~real, 0)
        new[rows] = new[rows].scatter_add(1, inputs, _solve_rows(hessian, inputs, real, right))
        first += len(rows)
    return new


def _solve_rows(hessian: Tensor, inputs: Tensor, real: Tensor, right: Tensor) -> Tensor:
    """Solve H[S, S] x = b for the inputs S of each row: [rows, kept] each, and so is the result."""
    # Rows of a badly conditioned Hessian that float32 finds indefinite are often solved in float64.
    for precision in (torch.float32, torch.float64):
        systems = hessian[inputs[:, :, None], inputs[:, None, :]].to(precision)
        if not bool(real.all()):
            systems.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0)
            systems.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1)
        lower, failed = torch.linalg.cholesky_ex(systems)
        if not bool(failed.any()):
            return torch.cholesky_solve(right[..., None].to(precision), lower)[..., 0].float()
    raise QualityError(
        f"the refit of {len(inputs)} rows met a singular system, also in float64",
        hint="raise the damping, or use more calibration tokens",
    )
