"""RIA: weigh each weight against its row and its column, and by the size of the activations it multiplies.

Source: Zhang et al. 2024, https://openreview.net/forum?id=Tr0lPx9woF (Plug-and-Play)

The channel permutation that the paper adds for N:M is not done: it would leave a gather in the model.
"""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.decide.counts import Compare
from structprune.pruners.weight._scored import ScorePruner


class Ria(ScorePruner):
    """Score a weight by (|W_ij| / its column's sum + |W_ij| / its row's sum) * ||X_j||^power.

    Args:
        compare: Which weights compete; the paper ranks the whole matrix.
        power: How much the activations count.
    """

    compare: Compare = "matrix"
    power: Annotated[float, Field(ge=0)] = 0.5

    parts: ClassVar[Parts] = frozenset({"norm"})

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return the relative importance, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: L2 norm of each input feature over all calibration tokens, shape [in].
        """
        size = weight.float().abs()
        # A row or column of zeros has a sum of zero, and nothing in it to be weighed.
        smallest = 1e-30
        columns, rows = size.sum(0).clamp_min(smallest), size.sum(1, keepdim=True).clamp_min(smallest)
        return (size / columns + size / rows) * seen.norm.pow(self.power)
