"""What makes up for the weights that left: an exact refit of those that stay, or a better choice of them.

`least_squares` is the best that any update on a mask can reach. `dsnot` changes the mask and no weight.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from structprune.errors import QualityError
from structprune.solvers.hessian import DAMPING, damped, read_weight

logger = logging.getLogger(__name__)

# Bytes of the systems that are solved side by side: what a core's cache holds. Beyond it, at 362 weights kept
# in a row, iterating is faster: 768 x 768 at half sparsity takes a fifth of the time that factoring takes.
SYSTEMS = 2**22
# Systems so large that fewer fit are solved by iterating over all rows at once.
FEWEST = 8
TOLERANCE = 1e-5
ITERATIONS = 300

Facts = dict[str, Any]


def least_squares(
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
    found = damped(gram, damping)
    # A mean of 1, so that squares of tiny activations' residuals do not underflow and look solved.
    hessian = found.hessian.div_(found.mean)
    dense = read_weight(weight)
    widest = int(mask.sum(1).max()) if mask.numel() else 0
    facts: Facts = {"error_before": found.mean * _error(dense.masked_fill(mask, 0), hessian)}
    if 4 * widest**2 * FEWEST <= limit:
        new, facts["method"] = _factor_rows(dense, mask, hessian, limit), "cholesky"
    else:
        facts["method"] = "conjugate_gradients"
        new, iterating = conjugate_gradients(dense, mask, hessian, dense)
        facts |= iterating
    facts["error"] = found.mean * _error(new - dense, hessian)
    return new, facts


def conjugate_gradients(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    start: Tensor,
    *,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> tuple[Tensor, Facts]:
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
    target = (weight @ hessian).masked_fill_(~mask, 0)
    size = target.square().sum(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = hessian.diagonal().reciprocal()
    solution = start.masked_fill(~mask, 0)
    residual = target - (solution @ hessian).masked_fill_(~mask, 0)
    direction = residual * inverse
    product = (residual * direction).sum(1, keepdim=True)
    done = 0
    while done < iterations and bool(
        (residual.square().sum(1, keepdim=True).sqrt() > tolerance * size).any()
    ):
        image = (direction @ hessian).masked_fill_(~mask, 0)
        # A row that is solved has a direction of zero; its step is then zero and not 0 / 0.
        step = product / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        solution += step * direction
        residual -= step * image
        scaled = residual * inverse
        before, product = product, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + product / before.clamp_min(torch.finfo(torch.float32).tiny) * direction
        done += 1
    left = target - (solution @ hessian).masked_fill_(~mask, 0)
    relative = float((left.square().sum(1, keepdim=True).sqrt() / size).max())
    # Rounding keeps the true residual above the one that is carried along.
    converged = relative <= 10 * tolerance
    if not converged:
        logger.warning("the refit stopped after %d iterations with a residual of %.1e", done, relative)
    return solution, {"iterations": done, "residual": relative, "converged": converged}


def _error(change: Tensor, hessian: Tensor) -> float:
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


def dsnot(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    *,
    rounds: int = 50,
    power: float = 1.0,
    threshold: float = 0.1,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """Swap kept for removed weights, row by row, until the expected output is what it was; no weight changes.

    A row misses e = sum of W_j * mean_j over what it removed. In a round the removed weight that brings most
    of it back, relative to the variance of its input, returns; for it the least important kept weight leaves
    whose own part of the expected output has the other sign, so that it helps too. A row stops when |e| is
    small, when e changes its sign, or when a swap would make |e| larger, which is then not made.

    Source: Zhang et al. 2023, https://arxiv.org/abs/2310.08915

    Args:
        weight: Shape [out, in], any float dtype.
        mask: Shape [out, in], bool, True = kept.
        mean: Mean of each input over tokens, shape [in].
        variance: Variance of each input over tokens, shape [in].
        norm: L2 norm of each input, shape [in]; with |W| it gives the importance.
        rounds: How many swaps a row may make.
        power: Exponent of the variance.
        threshold: |e| that is small enough, in units of the output.
        pattern: (kept, of) of the mask, if it has one: swaps then stay inside groups.

    Returns:
        The new mask, with as many kept weights in every row (and group) as before.
    """
    dense = weight.detach().float()
    new = mask.clone()
    part = dense * mean
    value = part / variance.clamp_min(torch.finfo(torch.float32).tiny).pow(power)
    importance = dense.abs() * norm
    missing = part.masked_fill(mask, 0).sum(1)
    active = (missing.abs() >= threshold).nonzero()[:, 0]
    for _ in range(rounds):
        if not len(active):
            break
        sign = missing[active].sign()[:, None]
        back, out, possible = _best_swap(
            sign * value[active],
            importance[active].masked_fill(sign * part[active] >= 0, torch.inf),
            new[active],
            pattern[1] if pattern else weight.shape[1],
        )
        active, back, out = active[possible], back[possible], out[possible]
        left = missing[active] - part[active, back] + part[active, out]
        better = left.abs() <= missing[active].abs()
        active, back, out, left = active[better], back[better], out[better], left[better]
        new[active, back], new[active, out] = True, False
        goes_on = (left.abs() >= threshold) & (left.sign() == missing[active].sign())
        missing[active] = left
        active = active[goes_on]
    return new


def _best_swap(value: Tensor, importance: Tensor, kept: Tensor, of: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row which weight returns, which leaves for it, and whether there are such two.

    Args:
        value: What the return of each weight is worth, shape [rows, in]; only above zero helps.
        importance: What stays last, shape [rows, in]; infinite where a weight must not leave.
        kept: The mask now, shape [rows, in].
        of: How many consecutive inputs form a group that both must belong to.
    """
    lowest, leaves = importance.masked_fill(~kept, torch.inf).view(len(kept), -1, of).min(2)
    blocked = lowest.isinf().repeat_interleave(of, dim=1)
    best, returns = value.masked_fill(kept | blocked, 0).max(1)
    group = returns // of
    return returns, leaves.gather(1, group[:, None])[:, 0] + group * of, best > 0
