"""Thanos: remove all the chosen weights of a block of columns at once, so that no order among them matters.

Source: Ilin and Richtarik 2025, https://arxiv.org/abs/2504.05346

SparseGPT passes an error on to the right only. Here what a row loses in a block is made up for by all of its
weights in the block and to its right together, which for the same mask of that block is never worse.
"""

import torch
from torch import Tensor

from structprune.decide.counts import removed_count
from structprune.decide.select import mask_groups, mask_matrix
from structprune.decide.sparsity import Amount, check_groups, pattern_of
from structprune.solvers.hessian import InverseFactor, read_weight
from structprune.solvers.sparsegpt import BLOCK, Solved

# Bytes of the small systems that are solved side by side: what a core's cache holds.
SYSTEMS = 2**22


def solve_thanos(
    weight: Tensor, norm: Tensor, factored: InverseFactor, sparsity: Amount, *, block: int = BLOCK
) -> Solved:
    """Choose by |W| * norm, block of columns by block, and update what stays in the block and to its right.

    For a fraction the whole rest of the matrix is ranked in every block, for as many as have yet to leave;
    the ones that lie in the block leave. N:M is ranked in its groups.

    Args:
        weight: Shape [out, in], any float dtype.
        norm: L2 norm of each input over all tokens, shape [in]; its scale does not matter.
        factored: The factor of the input's inverse Hessian.
        sparsity: How much leaves: a fraction of the matrix, "N:M" or (kept, of).
        block: Columns at a time; for N:M it is rounded down to whole groups, but holds at least one.

    Returns:
        Mask [out, in], bool, True = kept; new weight [out, in], zero where removed, in the factor's
        precision; and the loss, half of tr(dW H dW^T) with the damped H.

    Raises:
        UsageError: The inputs do not divide into groups of M.
        QualityError: A weight is NaN or infinite.
    """
    new = read_weight(weight, factored.upper.dtype).clone()
    shape = pattern_of(sparsity)
    if shape is not None:
        check_groups(tuple(weight.shape), shape[1])
        block = max(1, block // shape[1]) * shape[1]
        leaving = 0
    else:
        leaving = removed_count(new.numel(), sparsity)
    mask = torch.ones_like(new, dtype=torch.bool)
    loss = 0.0
    for first in range(0, new.shape[1], block):
        last = min(first + block, new.shape[1])
        if shape is not None:
            mask[:, first:last] = mask_groups(new[:, first:last].abs() * norm[first:last], *shape)
        else:
            mask[:, first:last] = mask_matrix(new[:, first:].abs() * norm[first:], leaving)[:, : last - first]
            # What was chosen to the right is chosen again later, with the weights as they are by then.
            leaving -= int((~mask[:, first:last]).sum())
        loss += _remove(new, mask, factored.upper, first, last)
    return mask, new, loss


def _remove(new: Tensor, mask: Tensor, upper: Tensor, first: int, last: int) -> float:
    """Remove what the mask says of the columns first to last, in place; return the loss."""
    # The inverse Hessian of what is left to decide, as far as this block needs it: rows of the block. Columns
    # to the left are done with; the rest of U^T U is the inverse of the Hessian without them.
    part = upper[first:last, first:last]
    inverse = part.T @ upper[first:last, first:]
    removed = ~mask[:, first:last]
    counts = removed.sum(1)
    order = counts.argsort(descending=True)
    loss, start = 0.0, 0
    while start < len(order) and (widest := int(counts[order[start]])):
        rows = order[start : start + max(1, SYSTEMS // (4 * widest**2))]
        # The removed inputs come first; a row that loses fewer is filled up with equations 1 * x = 0.
        inputs = removed[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :widest]
        real = torch.arange(widest, device=mask.device) < counts[rows, None]
        systems = inverse[inputs[:, :, None], inputs[:, None, :]]
        systems.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0)
        systems.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1)
        lost = new[rows, first:last].gather(1, inputs).masked_fill_(~real, 0)
        # Lagrange's multipliers of "these weights become zero": (H^-1 of the removed inputs)^-1 times them.
        force = torch.cholesky_solve(lost[..., None], torch.linalg.cholesky(systems))[..., 0]
        loss += float((force * lost).sum(dtype=torch.float64)) / 2
        forces = new.new_zeros(len(rows), last - first).scatter_add_(1, inputs, force)
        new[rows, first:] -= forces @ inverse
        start += len(rows)
    new[:, first:last].masked_fill_(removed, 0)  # exactly zero, where the update left rounding
    return loss
