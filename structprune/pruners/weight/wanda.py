"""Wanda: weigh each weight by the size of the activations it multiplies.

Source: Sun et al. 2023, https://arxiv.org/abs/2306.11695

The released code averages the squared norm over sequences; that scale changes no mask and is left out.
"""

from typing import ClassVar

from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.pruners.weight._scored import ScorePruner


class Wanda(ScorePruner):
    """Score a weight by |W_ij| * ||X_j||, ranked inside each output row.

    Args:
        compare: Which weights compete; the paper ranks each output row on its own.
    """

    parts: ClassVar[Parts] = frozenset({"norm"})

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return |W| * ||X||, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: L2 norm of each input feature over all calibration tokens, shape [in].
        """
        # float32 because bfloat16 keeps 8 bits: thousands of scores would tie, and the
        # position of a weight, not its importance, would then decide.
        return weight.float().abs() * seen.norm
