"""ToMe's bipartite soft matching, and how many patches each layer merges.

Source: Bolya et al. 2023, https://arxiv.org/abs/2210.09461
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def match(keys: Tensor, gone: int, protected: int) -> Tensor:
    """Return which token each one is merged into: every second one into the most similar of the others.

    Args:
        keys: What tokens are compared by, float32 [squares, tokens, size].
        gone: How many tokens of each square are merged into others; at most the half of those not protected.
        protected: How many of the first tokens are never merged: 0, or 1 for a class token.

    Returns:
        Long [squares, tokens]: the pairs of the highest cosine are merged, of equal ones the first; a token
        that stays names itself.
    """
    keys = normalize(keys, dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    scores[:, :protected] = -torch.inf
    best = scores.amax(-1, keepdim=True)
    others = torch.arange(scores.shape[2], device=keys.device)
    nearest = torch.where(scores == best, others, len(others)).amin(-1)
    edges = best[..., 0].argsort(dim=1, descending=True, stable=True)[:, :gone]
    into = torch.arange(keys.shape[1], device=keys.device).repeat(len(keys), 1)
    return into.scatter(1, 2 * edges, 2 * nearest.gather(1, edges) + 1)


def merge_counts(size: int, left: int, layers: int) -> list[int]:
    """Return how many patches leave each layer, about as many fewer in each; no layer merges more than half.

    Args:
        size: Patches at first.
        left: Those that shall be left, at least `least_left(size, layers)`.
        layers: How many there are.
    """
    return [
        min(size - (index * (size - left)) // layers, left * 2 ** (layers - index))
        for index in range(1, layers + 1)
    ]


def least_left(size: int, layers: int) -> int:
    """Return how many patches are left at least when every layer merges half of them."""
    return -(-size >> layers)
