"""Facility location: tokens that stand for all others, picked greedily.

Source: Nemhauser et al. 1978, https://doi.org/10.1007/BF01588971 (at least 1 - 1/e of the best choice)
"""

import torch
from torch import Tensor


def facility(alike: Tensor, bonus: Tensor, keep: int) -> Tensor:
    """Return which tokens to keep so that every token is like one of them.

    Maximises the sum over all tokens of how much each is like the one kept that it is most like, and of the
    bonus of those kept. Of equal gains the first token is picked.

    Args:
        alike: How much each token is like another, from 0 to 1, float32 [tokens, tokens].
        bonus: What it is worth to keep each, not below 0, shape [tokens].
        keep: How many to pick, at most as many as there are.

    Returns:
        Their numbers in the order in which they were picked, long [keep].
    """
    # Doubles, because what a pick takes from the gains is taken off one by one.
    gain = alike.sum(0, dtype=torch.float64) + bonus.double()
    served = alike.new_zeros(len(alike))
    found = []
    for _ in range(keep):
        pick = gain.argmax()
        found.append(pick)
        # Only tokens that the pick serves better make others gain less: fewer with every pick.
        better = (alike[:, pick] > served).nonzero()[:, 0]
        rows, before, after = alike[better], served[better], alike[better, pick]
        lost = (rows - before[:, None]).clamp(min=0).minimum((after - before)[:, None])
        gain -= lost.sum(0, dtype=torch.float64)
        gain[pick] = -torch.inf
        served[better] = after
    return torch.stack(found)
