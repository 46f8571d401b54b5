"""Wanda-sp: Wanda's score of single weights, added up over whole groups and channels.

Source: An et al. 2023 (the baseline of FLAP's comparison), https://arxiv.org/abs/2312.11983
"""

from typing import ClassVar

from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.pruners.structure._columns import ColumnPruner


class WandaSp(ColumnPruner):
    """Score a column by the mean size of its weights times the norm of its input."""

    parts: ClassVar[Parts] = frozenset({"norm"})

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return mean_r |W_rj| * ||X_j||, shape [in]; a key-value group has the sum over its columns.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: L2 norm of each input feature over all tokens, shape [in].
        """
        return weight.float().abs().mean(dim=0) * seen.norm
