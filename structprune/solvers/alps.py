"""ALPS: choose which weights stay by ADMM on the reconstruction error, then refit them.

Source: Meng et al. 2024, https://arxiv.org/abs/2406.07831

Two copies of a matrix are pulled together: one that is free to reconstruct the output, one that has zeros.
The pull grows as the support (where the second copy is not zero) settles. We deviate from the released code
in one way: the refit runs until its residual is small, not for ten steps whatever is left.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structprune.decide.counts import Compare, removed_count
from structprune.decide.select import mask_groups, mask_matrix, mask_rows
from structprune.decide.sparsity import Amount, pattern_of
from structprune.solvers.conjugate_gradients import solve_rows_by_conjugate_gradients
from structprune.solvers.effort import VALUE_BYTES, Effort, effort_of_ranking
from structprune.solvers.hessian import DAMPING, damp_hessian, read_weight

# The paper's schedule: the pull at the start, how often it is adapted, and by how much for which share of
# changes in the support.
PULL = 0.1
EVERY = 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# A support that the very first check finds settled was frozen by too strong a pull, which is then weakened.
WEAKENING = 5.0
# Of the support, what may still change: that the error shows by less than one part in ten thousand.
SETTLED = 0.0005
# The pull is by then weaker than the damping: the support has settled, and nothing has frozen it.
RESTARTS = 3
# Over all restarts; the fact `settled` says whether they were enough.
ROUNDS = 300

# How far the refit goes: the error is then at most 0.03% above where going on would end, which costs twice
# as many steps (linears of a language model at 50%, 70% and 2:4).
RESIDUAL = 1e-3

# For what is said of a run before it runs: rounds until a support settles and steps of the refit (27 to 42
# and 11 to 50 on linears of a language model), what an inverse takes in units of in^3, and as how many
# rankings a round counts: one it does, and it goes over its matrices eight times between two products.
USUAL_ROUNDS, REFIT_STEPS, INVERSE, RANKINGS = 32, 20, 3, 4

Project = Callable[[Tensor], Tensor]


def effort_of_alps(rows: int, inputs: int) -> Effort:
    """Return what is to be expected of a matrix [rows, inputs]; how soon it settles, the data decides."""
    # A round multiplies by an inverse, found anew as the pull changes; a step of the refit by the Hessian.
    inverses = INVERSE * USUAL_ROUNDS // EVERY * inputs**3
    products = inverses + 2 * (USUAL_ROUNDS + REFIT_STEPS) * rows * inputs**2
    once = effort_of_ranking(rows, inputs)
    ranked = RANKINGS * USUAL_ROUNDS * once.ranked
    return Effort(products, ranked, once.told_bytes + VALUE_BYTES * rows * inputs)


def solve_alps(
    weight: Tensor,
    gram: Tensor,
    sparsity: Amount,
    *,
    compare: Compare = "matrix",
    damping: float = DAMPING,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Choose the mask and the weights that reconstruct the output best.

    Args:
        weight: Shape [out, in], any float dtype.
        gram: X^T X over all tokens, shape [in, in]; its scale does not matter.
        sparsity: How much leaves: a fraction, "N:M" or (kept, of).
        compare: Whether a fraction is taken of the matrix, as in the paper, or of each row.
        damping: Above 0, in units of the Gram matrix's mean diagonal.
        rounds: Rounds of ADMM at most, over all restarts.

    Returns:
        Mask [out, in], bool, True = kept; new weight [out, in], float32, zero where removed; and the facts:
        `rounds`, `restarts`, `settled` (whether the support stood still at the end), `pull`, `error` (half of
        tr(dW H dW^T) with the damped H), and of the refit `iterations`, `residual` and `converged`.

    Raises:
        UsageError: The inputs do not divide into groups of M.
        QualityError: A value is NaN or infinite.
    """
    found = damp_hessian(gram, damping)
    dense = read_weight(weight)
    # Inputs are scaled to a Hessian with a diagonal of ones, where size tells what a weight is worth.
    scale = found.hessian.diagonal().sqrt()
    hessian = found.hessian / scale / scale[:, None]
    aim = dense * scale
    if not bool(found.dead.all()):
        aim[:, found.dead] = 0  # they leave first; where all are dead, size decides
    mask, start, facts = _search(aim, hessian, _projection(aim.shape, sparsity, compare), rounds)
    new, refit = solve_rows_by_conjugate_gradients(aim, mask, hessian, start, tolerance=RESIDUAL)
    facts |= refit
    new /= scale
    # Nothing else reaches a dead input: what stays of it stays as it was.
    new[:, found.dead] = (dense * mask)[:, found.dead]
    change = new - dense
    facts["error"] = float((change @ found.hessian).mul_(change).sum(dtype=torch.float64)) / 2
    return mask, new, facts


def _projection(shape: tuple[int, ...], sparsity: Amount, compare: Compare) -> Project:
    """Return what turns scores [out, in] into the mask that an amount allows."""
    shape_of_groups = pattern_of(sparsity)
    if shape_of_groups is not None:
        kept, of = shape_of_groups
        return lambda scores: mask_groups(scores, kept, of)
    each, whole = removed_count(shape[1], sparsity), removed_count(shape[0] * shape[1], sparsity)
    if compare == "row":
        return lambda scores: mask_rows(scores, each)
    return lambda scores: mask_matrix(scores, whole)


def _inverse(hessian: Tensor, shift: float) -> Tensor:
    """Return (H + shift I)^-1, shape [in, in]; the damping and the shift bound its condition."""
    shifted = hessian.clone()
    shifted.diagonal().add_(shift)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _search(
    aim: Tensor, hessian: Tensor, project: Project, rounds: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Run ADMM until the support settles; return the mask, the sparse copy and the facts.

    Args:
        aim: The dense weights, shape [out, in].
        hessian: Positive definite with a diagonal of ones, shape [in, in].
        project: Turns scores into a mask.
        rounds: Rounds at most.
    """
    target = aim @ hessian
    begin, restarts, done = PULL, 0, 0
    while True:
        pull, settled, checks = begin, False, 0
        mask = project(aim.abs())
        # The multipliers are kept in units of the pull: what the last projection took away.
        sparse, taken = aim * mask, torch.zeros_like(aim)
        before, inverse = mask, _inverse(hessian, pull)
        while done < rounds and not settled:
            # The free copy minimises the error with the pull; the sparse one is its nearest allowed point.
            free = (sparse - taken).mul_(pull).add_(target) @ inverse
            wanted = free.add_(taken)
            mask = project(wanted.abs())
            sparse = wanted * mask
            taken = wanted.sub_(sparse)
            done += 1
            if done % EVERY == 0:
                changed = int((mask & ~before).sum()) / max(1, int(mask.sum()))
                settled, before, checks = changed <= SETTLED, mask, checks + 1
                growth = 1.0 if settled else next(growth for share, growth in GROWTH if changed > share)
                pull, inverse = pull * growth, _inverse(hessian, pull * growth)
                taken /= growth
        if not settled or checks > 1 or restarts == RESTARTS:
            facts = {"rounds": done, "restarts": restarts, "settled": settled, "pull": pull}
            return mask, sparse, facts
        # Settled at the very first look: begin again, with a pull too weak to freeze it.
        begin, restarts = begin / WEAKENING, restarts + 1
