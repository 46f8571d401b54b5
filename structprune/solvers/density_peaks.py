"""Clusters around density peaks: a centre is a token with near neighbours, far from whatever is denser.

Source: Du et al. 2016, https://doi.org/10.1016/j.knosys.2016.02.001 (DPC-KNN)
Papers of token pruning add noise against equal densities; of two the first counts as denser here.
"""

import torch
from torch import Tensor

NEIGHBOURS = 5


def density_peaks(features: Tensor, clusters: int, neighbours: int = NEIGHBOURS) -> Tensor:
    """Return to which cluster each token belongs.

    Args:
        features: Of one image, shape [tokens, features], float32.
        clusters: How many there shall be, from 1 to as many as there are tokens.
        neighbours: How many of the nearest say how dense it is around a token, fewer where there are fewer.

    Returns:
        Number of the cluster, long [tokens]; every cluster has a token.
    """
    count = len(features)
    distance = torch.cdist(features, features) / features.shape[1] ** 0.5
    others = distance.clone().fill_diagonal_(torch.inf)
    near = others.topk(max(min(neighbours, count - 1), 0), dim=1, largest=False).values
    # The logarithm of the density: it orders alike, and far tokens do not all get zero.
    density = -near.square().mean(1) if near.shape[1] else features.new_zeros(count)
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(count, device=order.device))
    denser = rank[None] < rank[:, None]
    apart = distance.masked_fill(~denser, torch.inf).amin(1)
    apart[order[0]] = distance.max()
    centres = (density.exp() * apart).argsort(descending=True, stable=True)[:clusters]
    found: Tensor = distance[:, centres].argmin(1)
    # Of equal tokens that are centres both, each is its own.
    found[centres] = torch.arange(clusters, device=found.device)
    return found
