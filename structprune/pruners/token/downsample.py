"""Downsample: images are made smaller before the vision tower, the baseline that spares the tower too.

Source: Liao et al. 2025, https://arxiv.org/abs/2510.07143 (downsampling as a baseline)
An image becomes a square of fewer patches, so what is left is the nearest square number of tokens.
"""

from dataclasses import replace
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from structprune.models.streamed import Model
from structprune.plan.plan import Plan
from structprune.pruners.forecast import Forecast
from structprune.pruners.token._tower import TowerPruner
from structprune.runtime.drop import Drop
from structprune.runtime.flops import tower_counts
from structprune.runtime.tower import smaller_images, square_of


class Downsample(TowerPruner):
    """Show the vision tower smaller images; what it returns takes the place of all tokens of an image."""

    paper_positions: ClassVar = "compact"

    def forecast(self, model: Model) -> Forecast:
        """Return how many pairs of a visual token and a block are not computed.

        Raises:
            UsageError: As for every method; or the tower takes no smaller images.
        """
        found = super().forecast(model)
        square_of(model)
        return found

    def counts(self, model: Model, size: int) -> list[tuple[int, int]]:
        """Return of every block how many tokens it computes: the square nearest to what is asked for."""
        counts = super().counts(model, size)
        asked = counts[-1][1]
        side = min(range(1, isqrt(size) + 1), key=lambda one: abs(one**2 - asked))
        return [(side**2, side**2)] * len(counts)

    def seen_by_tower(self, config: PreTrainedConfig, size: int, left: int) -> list[tuple[int, int]]:
        """Return of every layer of the tower how many patches it computes: those that are left."""
        return tower_counts(config, left)

    def tokens(self, model: Model) -> dict[int, Tensor]:
        """Return how many tokens are left, all of them before the first block."""
        return {0: torch.tensor(self.counts(model, square_of(model))[-1][1])}

    def drops(self, plan: Plan, model: Model) -> list[Drop]:
        """Return what the engine carries out: images get smaller, shape [images, 3, side, side]."""
        whole = self._in_memory(model)
        return [
            replace(drop, images=smaller_images(whole, int(drop.keep(torch.tensor(square_of(whole))))))
            for drop in super().drops(plan, model)
            if drop.tokens is not None
        ]
