"""Random choices that keep their own account: every draw adds its -log p, so a text knows its entropy."""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Draw at random and add up what the draws were worth.

    Only `Random.random()` is used, because it is the one draw whose sequence Python promises to keep for a
    seed; `choice` and `sample` have changed between versions.

    Args:
        seed: Any integer; the same seed gives the same draws on every platform.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.nats = 0.0

    def pick(self, items: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """Return one item, with probability proportional to its weight (all equal when not given)."""
        return items[self._index([1.0] * len(items) if weights is None else weights)]

    def several(self, items: Sequence[T], count: int, weights: Sequence[float] | None = None) -> list[T]:
        """Return `count` different items in the order drawn; the texts show that order, so it is counted."""
        left = list(items)
        left_weights = [1.0] * len(left) if weights is None else list(weights)
        drawn = []
        for _ in range(count):
            index = self._index(left_weights)
            drawn.append(left.pop(index))
            left_weights.pop(index)
        return drawn

    def number(self, low: int, high: int) -> int:
        """Return a whole number from low to high, both included."""
        return low + self._index([1.0] * (high - low + 1))

    def happens(self, probability: float) -> bool:
        """Return True with the given probability, in (0, 1)."""
        return self._index([1.0 - probability, probability]) == 1

    def _index(self, weights: Sequence[float]) -> int:
        total = math.fsum(weights)
        point = self._random.random() * total
        index = 0
        while index < len(weights) - 1 and point >= weights[index]:
            point -= weights[index]
            index += 1
        self.nats -= math.log(weights[index] / total)
        return index
