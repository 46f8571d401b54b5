"""Max-sum selection: tokens whose distances from one another add up to as much as a greedy choice gets.

Source: Ravi et al. 1994, https://doi.org/10.1287/opre.42.2.299 (dispersion by greedy choice)
Unlike the largest least distance, the largest sum does not keep tokens from being picked that are alike.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def max_sum(features: Tensor, real: Tensor, keep: Tensor, first: Tensor) -> Tensor:
    """Return tokens picked one by one, each with the least sum of cosines with those picked before.

    Args:
        features: Shape [images, tokens, features], float32.
        real: Which of them are tokens, bool [images, tokens].
        keep: How many to pick, at least one, at most as many as are real, shape [images].
        first: The first pick, shape [images].

    Returns:
        Bool, shape [images, tokens]. Of equal sums the first token is picked.
    """
    unit = normalize(features, dim=-1)
    images = torch.arange(len(features), device=features.device)
    free, chosen, pick = real.clone(), torch.zeros_like(real), first
    sums = torch.zeros_like(features[..., 0])
    for taken in range(int(keep.max())):
        wanted = taken < keep
        chosen[images[wanted], pick[wanted]] = True
        free[images, pick] = False
        sums = sums + torch.einsum("itd,id->it", unit, unit[images, pick])
        pick = sums.masked_fill(~free, torch.inf).argmin(1)
    return chosen
