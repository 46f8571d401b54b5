"""Which units leave, found by trying random subsets of them.

Source: Wu et al. 2024, https://arxiv.org/abs/2403.15226
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Subsets that compete in a step; their mean reward is what each is held against.
COMPETING = 3
SHARPNESS = 10.0


@dataclass(frozen=True)
class Search:
    """How long is searched, and how.

    Attributes:
        steps: Each tries three subsets.
        rate: How far a reward moves the preferences.
        seed: Draws the subsets.
    """

    steps: int
    rate: float
    seed: int


def subset_preferences(
    count: int, size: int, reward: Callable[[int, Sequence[int]], float], search: Search
) -> Tensor:
    """Return how much better than others subsets were that held each unit, shape [count], float64.

    Args:
        count: How many units there are.
        size: How many a subset holds.
        reward: Of a step's number and a subset's indices: a higher one is better.
        search: How it is searched.
    """
    generator = torch.Generator().manual_seed(search.seed)
    preferences = torch.zeros(count, dtype=torch.float64)
    for step in range(search.steps):
        chances = (SHARPNESS * preferences).softmax(dim=0)
        # Where a preference has become so strong that others vanish, they may still be drawn to fill up.
        drawn = [chances.clamp_min(1e-12).multinomial(size, generator=generator) for _ in range(COMPETING)]
        subsets = [sorted(one.tolist()) for one in drawn]
        rewards = [reward(step, subset) for subset in subsets]
        usual = sum(rewards) / COMPETING
        for subset, found in zip(subsets, rewards, strict=True):
            chance = chances[subset]
            preferences[subset] += search.rate * (found - usual) * chance * (1 - chance)
    return preferences
