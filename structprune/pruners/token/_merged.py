"""Weights with which tokens are merged, or put in another order, as `TokenPruner.merge` returns them."""

import torch
from torch import Tensor


def means(into: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the weights of means: into each token those tokens go that name its place.

    Args:
        into: Into which token of its image each one goes, long [images, tokens]; its own place where it stays
            itself.
        counted: Which tokens go anywhere, bool [images, tokens]; all unless given.

    Returns:
        Float32 [images, tokens, tokens], with rows of zeros where no token goes.
    """
    found = torch.zeros(*into.shape, into.shape[1], device=into.device)
    going = torch.ones_like(into) if counted is None else counted
    found.scatter_(1, into[:, None], going[:, None].to(found))
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
