"""Magnitude of units: remove the groups and channels that are read with the smallest weights.

Source: Li et al. 2016, https://arxiv.org/abs/1608.08710 (filters by their L1 norm)
"""

from typing import ClassVar

from torch import Tensor

from structprune.calibration.statistics import Statistics
from structprune.pruners.structure._columns import ColumnPruner


class MagnitudeUnits(ColumnPruner):
    """Score a column by the sum of its weights' sizes; needs no data unless the repair does."""

    needs_data: ClassVar[bool] = False

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return sum_r |W_rj|, shape [in]; a key-value group has the sum over its columns.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: Not looked at.
        """
        return weight.float().abs().sum(dim=0)
