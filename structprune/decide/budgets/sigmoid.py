"""Sigmoid: blocks that turn their input little keep less, and none loses nothing or everything.

Source: Wang et al. 2024, CFSP, https://arxiv.org/abs/2409.13199

The paper's code adds up angular distances over tokens and divides by a constant, so that twice the data
doubles the contrast. Here the distance is the mean over tokens; the default gain is the code's at its
128 x 1024 tokens.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from structprune.calibration.states import angular_distance

# At its cap the block that keeps most still loses this much less than the mean: 1 - p + p / CAP of it stays.
CAP = 1.05


class SigmoidBudget(BaseModel):
    """Keep of each block in proportion to the sigmoid of how far it turns the states, against the mean.

    Args:
        name: "sigmoid".
        gain: Per unit of angular distance, where 1 is the opposite direction; 0 makes all blocks equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["sigmoid"] = "sigmoid"
    gain: Annotated[float, Field(ge=0, le=1e6)] = 128 * 1024 / 1e4

    def importance(self, distances: Sequence[float]) -> list[float]:
        """Return each block's sigmoid(gain * (distance - mean distance)), between 0 and 1.

        Args:
            distances: Mean angular distances between the blocks' input and output.
        """
        found = torch.tensor(distances, dtype=torch.float64)
        return (self.gain * (found - found.mean())).sigmoid().tolist()

    def shares(self, importance: Sequence[float], sizes: Sequence[int], asked: float) -> list[float]:
        """Return the share that leaves each block; together, weighted by size, what was asked.

        Args:
            importance: As returned above.
            sizes: Parameters that may leave each block; 0 where nothing does.
            asked: Share that leaves altogether, in (0, 1).
        """
        found = torch.tensor(importance, dtype=torch.float64)
        weights = torch.tensor(sizes, dtype=torch.float64)
        mean = (found * weights).sum() / weights.sum()
        apart = (found / mean - 1) * (1 - asked)
        most = float(apart[weights > 0].max())
        if most >= asked:  # a block would keep all or more: everybody moves towards the mean
            apart *= asked / (most * CAP)
        return ((asked - apart) * (weights > 0)).tolist()


def mean_distance(cosines: Tensor) -> float:
    """Return the mean angular distance of tokens of which the cosines between two states are given."""
    return float(angular_distance(cosines.double()).mean())
