"""OWL: remove less from blocks in which more scores are outliers.

Source: Yin et al. 2023, https://arxiv.org/abs/2310.05175
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Parts, Statistics
from structprune.decide.budgets.budget import Budget, bounded_share


class Owl(Budget):
    """Remove less where more scores are outliers: more than `outlier` times the block's mean score.

    Args:
        name: "owl".
        spread: Half the range of the blocks' sparsities (the paper's lambda).
        outlier: How many times the mean makes an outlier (the paper's M).
    """

    name: Literal["owl"] = "owl"
    spread: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    outlier: Annotated[float, Field(gt=1)] = 5.0

    parts: ClassVar[Parts] = frozenset({"norm"})

    def measure(self, weights: Sequence[Tensor], seen: Sequence[Statistics]) -> Tensor:
        """Return the share of outliers among the block's scores |W| * ||X||, shape [], float64."""
        # Wanda's score, whatever score decides later: the paper's measure of what a block carries.
        scores = [weight.float().abs() * one.norm for weight, one in zip(weights, seen, strict=True)]
        size = sum(score.numel() for score in scores)
        if not size:
            return super().measure(weights, seen)
        # float64, because float32 sums of millions of scores depend on how they are split.
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / size
        outliers = sum(int((score > self.outlier * mean).sum()) for score in scores)
        return torch.tensor(outliers / size, dtype=torch.float64)

    def shares(self, asked: Fraction, measured: Sequence[Tensor]) -> list[Fraction]:
        """Return one sparsity per block: the outlier shares scaled to the spread, around their mean."""
        found = [Fraction(float(value)) for value in measured]
        low, high = min(found), max(found)
        if low == high:  # nothing tells the blocks apart
            return [asked] * len(found)
        kept = [(value - low) / (high - low) * 2 * Fraction(str(self.spread)) for value in found]
        mean = sum(kept, Fraction(0)) / len(kept)
        # Around the mean of what is kept more, so that the blocks' mean sparsity is the asked one.
        return [bounded_share(asked - (value - mean)) for value in kept]
