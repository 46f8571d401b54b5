"""Downsample: images are made smaller before the vision tower, the baseline that spares the tower too.

Source: Liao et al. 2025, https://arxiv.org/abs/2510.07143 (downsampling as a baseline)
An image becomes a square of fewer patches, so what is left is the nearest square number of tokens.
"""

from dataclasses import replace
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from structprune.errors import UsageError
from structprune.models.streamed import Model
from structprune.plan.plan import Plan
from structprune.pruners.forecast import Forecast
from structprune.pruners.token._family import TokenPruner
from structprune.runtime.drop import Drop
from structprune.runtime.tower import grid_places, smaller_images, square_of
from structprune.runtime.view import View


class Downsample(TokenPruner):
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

    def seen_by_tower(self, size: int, left: int) -> int:
        """Return how many patches of an image the vision tower computes: those that are left."""
        return left

    def tokens(self, model: Model) -> dict[int, Tensor]:
        """Return how many tokens are left, all of them before the first block."""
        return {0: torch.tensor(self.counts(model, square_of(model))[-1][1])}

    def drops(self, plan: Plan, model: Model) -> list[Drop]:
        """Return what the engine carries out on a model."""
        whole = self._in_memory(model)
        return [
            replace(drop, images=smaller_images(whole, int(drop.keep(torch.tensor(square_of(whole))))))
            for drop in super().drops(plan, model)
            if drop.tokens is not None
        ]

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens in whose place there are features of the smaller image.

        Returns:
            Bool, shape [images, tokens].

        Raises:
            UsageError: The features were not made by the tower as it runs here, or were dropped before.
        """
        chosen = torch.zeros_like(seen.real)
        kept = keep + seen.protected
        for image, (size, count) in enumerate(zip(seen.sizes.tolist(), kept.tolist(), strict=True)):
            marks = chosen.new_zeros(size)
            marks[grid_places(isqrt(count), isqrt(size)).to(marks.device)] = True
            # Only the last token of a prompt is no candidate, and only of the image that it ends with.
            chosen[image] = marks[: chosen.shape[1]]
        chosen &= seen.real
        whole = torch.equal(seen.left + seen.protected, seen.sizes)
        if not whole or bool(seen.features()[seen.real & ~chosen].any()):
            raise UsageError(
                f"{self.method()}: the features of an image are not those of a smaller one",
                hint=f"pass pixel_values, and let no other method drop tokens before {self.method()}",
            )
        return chosen
