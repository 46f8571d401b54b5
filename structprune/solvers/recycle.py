"""VFlowOpt's rules: how much patches vary, and which tokens stay and gather the others of their cell.

Source: Yang et al. 2025, https://arxiv.org/abs/2508.05211
"""

import torch
from torch import Tensor

LEVELS = 256
# How much red, green and blue weigh in what is seen as grey (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)


def entropy(patches: Tensor) -> Tensor:
    """Return the entropy of each patch's grey levels, in bits, float32 [..., patches].

    Args:
        patches: Colours in [0, 1], shape [..., patches, 3, pixels].
    """
    grey = torch.einsum("...cp,c->...p", patches.float(), torch.tensor(GREY, device=patches.device))
    levels = (grey * (LEVELS - 1)).round().clamp(0, LEVELS - 1).long()
    counts = torch.zeros(*levels.shape[:-1], LEVELS, device=patches.device)
    shares = counts.scatter_add(-1, levels, torch.ones_like(grey)) / levels.shape[-1]
    bits: Tensor = torch.special.entr(shares).sum(-1) / torch.log(torch.tensor(2.0))
    return bits


def recycled(importance: Tensor, cells: Tensor, real: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens stay, and which of them speaks for every token.

    The most important tokens stay as they are; the others of each cell become one, in the place of its
    strongest. As many stay as they are as leave room for one of every such cell; where there are more cells
    than room, the strongest cells stay.

    Args:
        importance: Float32 [images, tokens]; of equal ones the first is stronger.
        cells: In which cell a token is, long [images, tokens], below the number of tokens; -1 for none.
        real: Which entries are tokens, bool [images, tokens].
        keep: How many stay, shape [images].

    Returns:
        Bool [images, tokens], as many as `keep`; and long [images, tokens]: the token into which each one
        goes, itself where it stays as it is, -1 where it goes into none.
    """
    width, device = real.shape[1], real.device
    order = importance.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(width, device=device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, ranks)
    within = real & (cells >= 0)
    # A column more, for what is in no cell.
    cell = cells.masked_fill(~within, width)

    def of_cells(values: Tensor, which: str, start: int) -> Tensor:
        found = torch.full((len(cells), width + 1), start, device=device)
        return found.scatter_reduce(1, cell, values, which)

    # If the first k stay, the cells that still have others are those whose weakest has rank k or more.
    weakest = of_cells(rank.masked_fill(~within, -1), "amax", -1)[:, :width]
    ends = torch.zeros(len(cells), width + 1, dtype=torch.long, device=device)
    ends = ends.scatter_add(1, weakest.masked_fill(weakest < 0, width), (weakest >= 0).long())[:, :width]
    occupied = ends.flip(1).cumsum(1).flip(1)
    fits = ranks + occupied <= keep[:, None]
    alone = torch.where(fits, ranks, 0).amax(1, keepdim=True)
    gathered = within & (rank >= alone)
    strongest = of_cells(rank.masked_fill(~gathered, width), "amin", width).gather(1, cell)
    speaks = gathered & (strongest == rank)
    # Of those that stay, as many speakers as there is room for, the strongest first.
    speaker_rank = rank.masked_fill(~speaks, width).argsort(dim=1, stable=True).argsort(dim=1)
    chosen = real & ((rank < alone) | (speaks & (speaker_rank < keep[:, None] - alone)))
    there = torch.nn.functional.pad(order, (0, 1), value=-1)
    into = there.gather(1, strongest).masked_fill(~gathered, -1)
    own = torch.arange(width, device=device)
    return chosen, torch.where(chosen & (rank < alone), own, into)


def gathering(importance: Tensor, into: Tensor) -> Tensor:
    """Return how much of every token goes into each one: shares of its importance in what goes there.

    Args:
        importance: Float32 [images, tokens]; below zero counts as zero; where all is zero all count alike.
        into: The token into which each one goes, -1 for none; long [images, tokens].

    Returns:
        Float32 [images, tokens, tokens].
    """
    width = into.shape[1]
    same = into[:, None] == torch.arange(width, device=into.device)[:, None]
    weights = same * importance.clamp(min=0)[:, None]
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, same.float())
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
