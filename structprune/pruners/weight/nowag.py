"""NoWag-P: weigh each weight, with the sizes of its row and column normalised away, by its activations.

Source: Liu et al. 2025, https://arxiv.org/abs/2504.14569
"""

from typing import ClassVar, Literal

from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.decide.counts import Compare
from structprune.pruners.weight._scored import ScorePruner
from structprune.solvers.nowag import normalise_weight


class Nowag(ScorePruner):
    """Score a weight by the square of the normalised weight times the mean square of its input.

    Args:
        compare: Which weights compete; the released code ranks the whole matrix.
        propagate: Whether later blocks see the outputs of pruned or of dense blocks; the paper's see
            dense ones.
    """

    compare: Compare = "matrix"
    propagate: Literal["pruned", "dense"] = "dense"

    parts: ClassVar[Parts] = frozenset({"norm"})

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return the normalised weight's share of the output error, shape [out, in]; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: L2 norm of each input feature over all calibration tokens, shape [in].
        """
        return normalise_weight(weight).score(seen.norm)
