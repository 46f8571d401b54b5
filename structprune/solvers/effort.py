"""What it takes to solve a matrix, in formulas of its sizes alone: how long a run will be, before it runs."""

from dataclasses import dataclass
from typing import Self

# In the time in which one number is ranked a processor does so many operations of a product of matrices; an
# order of magnitude, which tells the parts of a block's work apart.
RANKING = 500.0
# Of an answer every weight's place in the mask is told, and its new value where there is one.
MASK_BYTES, VALUE_BYTES = 1, 4


@dataclass(frozen=True)
class Effort:
    """What solving takes.

    Attributes:
        products: Operations of products of matrices in float32, two per multiply-add.
        ranked: Numbers that are scored and ranked.
        told_bytes: What the other processes of a run are told of the answer.
    """

    products: float = 0.0
    ranked: float = 0.0
    told_bytes: float = 0.0

    @property
    def cost(self) -> float:
        """Return how long it takes, in operations; a ranked number counts as so many that take as long."""
        return self.products + RANKING * self.ranked

    def __add__(self, other: Self) -> "Effort":
        """Return what both take, one after the other."""
        return Effort(
            self.products + other.products,
            self.ranked + other.ranked,
            self.told_bytes + other.told_bytes,
        )


def effort_of_ranking(rows: int, inputs: int) -> Effort:
    """Return what one ranking of a matrix takes, the answer a mask.

    Args:
        rows: Outputs.
        inputs: Inputs.
    """
    return Effort(ranked=rows * inputs, told_bytes=MASK_BYTES * rows * inputs)


def effort_of_updating(rows: int, inputs: int) -> Effort:
    """Return what SparseGPT's sweep takes: the factor of the Hessian, and an update by each column.

    Source: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, section 3.2: O(in^3 + out in^2)

    Args:
        rows: Outputs of all matrices that read the same input.
        inputs: Inputs.
    """
    # A Cholesky factor and the inverse of a triangle take a third of in^3 each, twice as many operations with
    # multiply-adds in halves; a column changes those to its right, half of the matrix on average.
    return Effort(
        products=4 / 3 * inputs**3 + rows * inputs**2,
        told_bytes=VALUE_BYTES * rows * inputs,
    )
