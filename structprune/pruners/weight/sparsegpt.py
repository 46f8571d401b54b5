"""SparseGPT: choose and update column by column, so that later columns make up for what earlier ones lose.

Source: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774

The released code keeps one Hessian for every linear; here linears that read the same input share one and are
solved stacked. It removes one weight too many in every block of columns; here the count is exact.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from structprune.calibration.statistics import Parts, Statistics
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers.effort import Effort, effort_of_ranking, effort_of_updating
from structprune.solvers.hessian import DAMPING, Damping, factor_inverse
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix
from structprune.solvers.sparsegpt import BLOCK, solve_sparsegpt


class Sparsegpt(WeightPruner):
    """Rank a weight by W_ij^2 / [H^-1]_jj of the columns not yet decided, per block of columns.

    Args:
        compare: Always "matrix": rows of a block of columns compete with each other.
        joint: Rank linears that read the same input together, not each on its own as in the paper.
        block: Columns ranked together.
        damping: Added to the diagonal of the Gram matrix, relative to its mean.
    """

    compare: Literal["matrix"] = "matrix"
    joint: bool = False
    block: Annotated[int, Field(ge=1)] = BLOCK
    damping: Damping = DAMPING

    parts: ClassVar[Parts] = frozenset({"gram"})
    # Its update is that of "obs"; the exact refit still gains, because columns only look to their right.
    repairs: ClassVar[tuple[str, ...]] = ("least_squares",)

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what the factor, the sweep and its choices take."""
        return effort_of_ranking(rows, inputs) + effort_of_updating(rows, inputs)

    def solve(self, matrices: Sequence[MatrixToPrune], seen: Statistics) -> list[PrunedMatrix]:
        """Return masks and updated weights of the matrices that read the same input, solved stacked.

        Args:
            matrices: The matrices, each [out, in].
            seen: Gram matrix of their input, shape [in, in].
        """
        factored = factor_inverse(seen.gram, self.damping)
        amounts = [one.amount for one in matrices]
        weights = [one.weight for one in matrices]
        solved = solve_sparsegpt(weights, factored, amounts, block=self.block, joint=self.joint)
        return [
            PrunedMatrix(mask, weight, facts={"error": loss, **factored.facts})
            for mask, weight, loss in solved
        ]
