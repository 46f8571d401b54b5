"""Weights with which tokens are merged, or put in another order, as `TokenPruner.merge` returns them."""

import torch
from torch import Tensor


def means(chosen: Tensor, into: Tensor) -> Tensor:
    """Return the weights of a mean: each token that stays, with those that are merged into it.

    Args:
        chosen: Which tokens stay, bool [images, tokens].
        into: Which token of its image each one is merged into, long [images, tokens]; its own place where it
            is merged into none.

    Returns:
        Float32 [images, tokens, tokens].
    """
    found = torch.zeros(*chosen.shape, chosen.shape[1], device=chosen.device)
    found.scatter_(1, into[:, None], 1.0)
    return found / found.sum(2, keepdim=True).clamp(min=1)


def reordered(chosen: Tensor, order: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return weights that put tokens that stay, or what is merged into them, in another order.

    Args:
        chosen: Which tokens stay, bool [images, tokens].
        order: The places of tokens, those that stay first and in their new order, long [images, tokens].
        weights: What goes into each token that stays, float32 [images, tokens, tokens]; itself unless given.

    Returns:
        Float32 [images, tokens, tokens].
    """
    count = chosen.shape[1]
    if weights is None:
        weights = torch.eye(count, device=chosen.device).expand(len(chosen), -1, -1)
    slots = torch.argsort((~chosen).int(), dim=1, stable=True)
    # Row by row: the first place that stays gets the first of the order.
    taken = weights.gather(1, order[..., None].expand(-1, -1, count))
    return torch.zeros_like(taken).scatter(1, slots[..., None].expand(-1, -1, count), taken)
