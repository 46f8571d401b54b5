"""Windows of an image, and the ranks of tokens inside them."""

import torch
from torch import Tensor

from structprune.pruners.token._scored import rank
from structprune.runtime.view import View


def windows(seen: View, across: int) -> Tensor:
    """Return in which window each token is, of as many across as down; long [images, tokens].

    The whole image and its stitched tiles have windows of their own; the end of a line belongs to its last.
    """
    part, row, column = seen.places.unbind(2)
    found = torch.zeros_like(part)
    for one in (0, 1):
        mine = seen.real & (part == one)
        height, width = (each.masked_fill(~mine, 0).amax(1, keepdim=True) + 1 for each in (row, column))
        inside = torch.where(column < 0, width - 1, column)
        place = row * across // height * across + inside * across // width
        found = torch.where(mine, one * across**2 + place, found)
    return found


def ordered(score: Tensor, window: Tensor, real: Tensor) -> Tensor:
    """Return places of tokens window by window, each by score; long [images, tokens].

    Args:
        score: Float32 [images, tokens]; of equal ones the first comes first.
        window: In which window each token is, long [images, tokens].
        real: Which tokens compete, bool [images, tokens]; the others come last.
    """
    order = rank(score, real).argsort(1)
    mine = torch.where(real, window, window.max() + 1).gather(1, order)
    return order.gather(1, torch.argsort(mine, dim=1, stable=True))


def ranks_inside(score: Tensor, window: Tensor, real: Tensor) -> Tensor:
    """Return how many tokens of its window come before each one; long [images, tokens].

    Args:
        score: Float32 [images, tokens]; of equal ones the first comes first.
        window: In which window each token is, long [images, tokens].
        real: Which tokens compete, bool [images, tokens]; what the others get means nothing.
    """
    sizes = torch.zeros(len(window), int(window.max()) + 1, dtype=torch.long, device=window.device)
    sizes.scatter_add_(1, window, real.long())
    before = (sizes.cumsum(1) - sizes).gather(1, window)
    return ordered(score, window, real).argsort(1) - before
