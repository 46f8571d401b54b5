"""One matrix from question to answer: how much leaves it, which weights, and what becomes of the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor

from structprune.calibration.statistics import Statistics
from structprune.solvers.armor.descent import ArmorFactors


@dataclass(frozen=True)
class MatrixToPrune:
    """A matrix, how much leaves it, and what is known of it.

    Attributes:
        label: The linear's name.
        weight: Shape [out, in], in the model's dtype; never changed.
        removed: How many weights leave.
        pattern: (N, M) where N of every M consecutive inputs stay; then `removed` follows from it.
        seen: What was collected: the sums of its input, and its gradient where somebody asked.
    """

    label: str
    weight: Tensor
    removed: int
    pattern: tuple[int, int] | None = None
    seen: Statistics = field(default_factory=Statistics)

    @property
    def amount(self) -> tuple[int, int] | Fraction:
        """Return how much leaves, as the solvers take it: the pattern, or the exact fraction."""
        return self.pattern or Fraction(self.removed, self.weight.numel())


@dataclass(frozen=True)
class PrunedMatrix:
    """What becomes of a matrix.

    Attributes:
        mask: Which weights stay (of the core, where there are factors), shape [out, in], bool.
        weight: New values of the kept weights, shape [out, in], float32; None where they stay as they are.
        factors: The matrix as a product; then `weight` is None.
        score: What the choice was made by, shape [out, in], float32; None unless it is to be kept.
        facts: What was measured; plain JSON values.
    """

    mask: Tensor
    weight: Tensor | None = None
    factors: ArmorFactors | None = None
    score: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
