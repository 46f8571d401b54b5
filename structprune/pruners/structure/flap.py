"""FLAP: remove the units whose inputs fluctuate least, and put what they added on average into a bias.

Source: An et al. 2023, https://arxiv.org/abs/2312.11983

The variance is exact over all tokens; the released code discards the first sequence and mixes its running
means. A key-value group has the mean of its channels' standardised scores, so that it may leave as a whole.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.decide.budgets.width_union import AnyWidthBudget
from structprune.decide.unit_counts import WidthUnit
from structprune.models.groups import BlockSizes
from structprune.pruners.structure._columns import ColumnPruner
from structprune.solvers.columns import AnyColumnRepair, BiasRepair


class Flap(ColumnPruner):
    """Score a column by its input's variance times its squared norm, standardised within its matrix.

    Args:
        budget: The paper lets all units of the model compete.
        repair: The paper adds the mean of what left to a bias; or "none", or "least_squares".
    """

    budget: AnyWidthBudget = "global"
    repair: AnyColumnRepair = Field(default_factory=BiasRepair)

    parts: ClassVar[Parts] = frozenset({"moments"})
    # A standardised score is no sum over weights: the paper ranks it as it is.
    per_parameter: ClassVar[bool] = False

    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return var(x_j) ||W_:j||^2: what removing column j costs once a bias has its mean, shape [in].

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: Variance of each input feature over all tokens, shape [in].
        """
        return seen.variance * weight.float().square().sum(dim=0)

    def comparable(self, columns: Tensor) -> Tensor:
        """Return scores with mean 0 and standard deviation 1 over the matrix, shape [in]."""
        return (columns - columns.mean()) / columns.std().clamp_min(1e-30)

    def unit_scores(self, kind: WidthUnit, columns: Tensor, sizes: BlockSizes) -> Tensor:
        """Return the mean over the columns of a key-value group's heads, shape [units]."""
        if kind == "channel":
            return columns
        return columns.view(sizes.heads if kind == "head" else sizes.kv_heads, -1).mean(dim=1)
