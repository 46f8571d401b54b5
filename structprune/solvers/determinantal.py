"""Greedy selection under a determinantal point process: tokens that matter and are unlike one another.

Source: Chen et al. 2018, https://arxiv.org/abs/1709.05135 (fast greedy MAP inference)
"""

import torch
from torch import Tensor

# Below this share of its kernel's diagonal a token lies in the span of those picked, up to rounding.
SPANNED = 1e-6


def determinantal(kernel: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """Return tokens picked one by one, each raising the determinant of the picked part of a kernel most.

    Every pick adds a column to an incremental Cholesky factor, images side by side. Where all that is left
    lies in the span of the picked tokens, those with the largest entries of the diagonal are picked.

    Args:
        kernel: Symmetric and positive semidefinite, float32 [images, tokens, tokens].
        real: Which entries are tokens, bool [images, tokens].
        keep: How many to pick, at most as many as are real, shape [images].

    Returns:
        Bool, shape [images, tokens]. Of equal tokens the first is picked.
    """
    images = torch.arange(len(kernel), device=kernel.device)
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    gains, free, chosen = diagonal.clone(), real.clone(), torch.zeros_like(real)
    most = int(keep.max())
    factor = kernel.new_zeros(len(kernel), most, kernel.shape[1])
    for taken in range(most):
        # Rounding takes gains below zero, and makes some of what is nothing.
        gains = torch.where(gains > SPANNED * diagonal, gains, 0)
        some = (gains.masked_fill(~free, 0) > 0).any(1, keepdim=True)
        pick = torch.where(some, gains, diagonal).masked_fill(~free, -torch.inf).argmax(1)
        wanted = taken < keep
        chosen[images[wanted], pick[wanted]] = True
        free[images, pick] = False
        column = factor[images, :taken, pick]
        row = kernel[images, pick] - torch.einsum("ik,ikt->it", column, factor[:, :taken])
        gain = gains[images, pick][:, None]
        row = torch.where(gain > 0, row / gain.sqrt(), 0)
        factor[:, taken] = row
        gains = gains - row**2
    return chosen
