"""How a count is divided among parts that have room for so many each."""

import torch
from torch import Tensor


def quotas(weights: Tensor, room: Tensor, total: Tensor) -> Tensor:
    """Return how many each part gets: in proportion to its weight, as far as it has room.

    What some have no room for goes to the others, by their weights; what is lost by rounding down goes to the
    largest remainders, of equal ones to the first.

    Args:
        weights: At least zero, shape [images, parts]; parts of weight zero get some when others are full.
        room: The most that each part can get, long [images, parts].
        total: What is divided, at most all the room, long [images].

    Returns:
        Long [images, parts], whose sums are `total`.
    """
    weights, full = weights.double(), room == 0
    while True:
        left = total - (room * full).sum(1)
        share = weights * ~full
        share = torch.where(share.sum(1, keepdim=True) > 0, share, (~full).double())
        share = share / share.sum(1, keepdim=True).clamp(min=1e-300) * left[:, None]
        over = ~full & (share > room)
        if not bool(over.any()):
            break
        full |= over
    # A rounding that takes 0.29 * 100 for 29.
    share = torch.where(full, room.double(), share).round(decimals=9)
    whole = share.floor().long()
    remainder = (share - share.floor()).masked_fill(whole >= room, -1)
    ranks = torch.argsort(remainder, dim=1, descending=True, stable=True).argsort(1)
    return whole + (ranks < (total - whole.sum(1))[:, None]).long()
