"""Random units: the baseline that every other score of units must beat.

Source: Ma et al. 2023, https://arxiv.org/abs/2305.11627 (random units as the baseline to report)
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from structprune.decide.unit_counts import WidthUnit
from structprune.models.arch import Linear
from structprune.pruners.seen import Seen
from structprune.pruners.structure._width import WidthPruner
from structprune.pruners.structure._width_block import WidthBlock


class RandomUnits(WidthPruner):
    """Remove groups and channels by chance; needs no data unless the repair does.

    Args:
        seed: Draws the scores; a recipe's seed unless given.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    needs_data: ClassVar[bool] = False
    per_parameter: ClassVar[bool] = False

    def score_units(
        self, known: WidthBlock, readers: Mapping[WidthUnit, Linear], seen: Seen
    ) -> dict[WidthUnit, Tensor]:
        """Return independent uniform numbers by kind, shape [units] each.

        Args:
            known: The block.
            readers: The matrix that reads the units of each kind; its name is part of the seed.
            seen: Not looked at.
        """
        return {kind: self._draw(linear, known.units(kind)) for kind, linear in readers.items()}

    def _draw(self, linear: Linear, count: int) -> Tensor:
        digest = hashlib.sha256(linear.label.encode()).digest()
        draw = int.from_bytes(digest[:4], "little") ^ self.seed
        # Drawn on the CPU, so that every device gets the same ones.
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(draw))
        return drawn.to(linear.weight.device)
