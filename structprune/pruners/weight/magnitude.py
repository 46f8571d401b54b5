"""Magnitude: remove the smallest weights.

Source: Han et al. 2015, https://arxiv.org/abs/1506.02626

Released codes zero every weight up to the threshold, one too many and all its ties; here the count is exact.
"""

from typing import ClassVar, Literal

from torch import Tensor

from structprune.calibration.statistics import Statistics
from structprune.pruners.weight._scored import ScorePruner


class Magnitude(ScorePruner):
    """Score a weight by |W_ij|, ranked over the whole matrix.

    Args:
        compare: "matrix" as the papers' baseline does, or "row".
    """

    needs_data: ClassVar[bool] = False

    compare: Literal["row", "matrix"] = "matrix"

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return |W|, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: Nothing; the method needs no data.
        """
        return weight.float().abs()
