"""Table: the blocks' sparsities as somebody gives them."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from structprune.decide.budgets.budget import Budget
from structprune.errors import UsageError, counted

Share = Annotated[float, Field(ge=0, lt=1)]


class Table(Budget):
    """Remove from each block in proportion to a given number.

    Args:
        name: "table".
        blocks: One sparsity per block, first to last.
    """

    name: Literal["table"] = "table"
    blocks: tuple[Share, ...] = Field(min_length=1)

    def shares(self, asked: Fraction, measured: Sequence[Tensor]) -> list[Fraction]:
        """Return the given sparsities.

        Raises:
            UsageError: There are more or fewer of them than blocks.
        """
        if len(self.blocks) != len(measured):
            raise UsageError(
                f"budget.blocks: {counted(len(self.blocks), 'number')} for {counted(len(measured), 'block')}",
                hint="give one for every decoder block, 0 for those left dense",
            )
        # repr is the decimal number that was written.
        return [Fraction(repr(share)) for share in self.blocks]
