"""Farthest-point selection: tokens of which the two nearest are as far apart as a greedy choice gets."""

import torch
from torch import Tensor


def farthest(features: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """Return tokens picked one by one, each the farthest from those picked before, by cosine distance.

    The first is the one whose nearest neighbour is farthest. One vector operation a pick, images side by
    side, instead of the minimum over all picked ones again: the picks are the same.

    Args:
        features: Shape [images, tokens, features], float32.
        real: Which of them are tokens, bool [images, tokens].
        keep: How many to pick, at most as many as are real, shape [images].

    Returns:
        Bool, shape [images, tokens].
    """
    # A zero vector has no direction: it is as far from everything as a right angle.
    unit = torch.nn.functional.normalize(features, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    free = real.clone()
    others = distance.masked_fill(~real[:, None], torch.inf)
    others.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = others.amin(2)
    # The only token of an image has no neighbour.
    pick = nearest.masked_fill(~free, -torch.inf).argmax(1)
    least = torch.full_like(nearest, torch.inf)
    images = torch.arange(len(features), device=features.device)
    chosen = torch.zeros_like(real)
    for taken in range(int(keep.max())):
        wanted = taken < keep
        chosen[images[wanted], pick[wanted]] = True
        free[images, pick] = False
        least = torch.minimum(least, distance[images, pick])
        pick = least.masked_fill(~free, -torch.inf).argmax(1)
    return chosen
