"""Ramp: sparsities on a straight line from the first block to the last."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from structprune.decide.budgets.budget import Budget, bounded_share


class Ramp(Budget):
    """Remove ever more, or ever less, from the first block to the last.

    Args:
        name: "ramp".
        spread: Half the difference between the last block's sparsity and the first's; negative = falling.
    """

    name: Literal["ramp"] = "ramp"
    spread: Annotated[float, Field(gt=-0.5, lt=0.5)] = 0.08

    def shares(self, asked: Fraction, measured: Sequence[Tensor]) -> list[Fraction]:
        """Return one sparsity per block, on a line through the asked one."""
        last = max(len(measured) - 1, 1)
        spread = Fraction(str(self.spread))
        return [
            bounded_share(asked + spread * (Fraction(2 * block, last) - 1)) for block in range(len(measured))
        ]
