"""Thanos: choose block of columns by block, and let all that leaves a row at once be made up for at once.

Source: Ilin and Richtarik 2025, https://arxiv.org/abs/2504.05346
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from structprune.calibration.statistics import Parts, Statistics
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers.effort import Effort, effort_of_ranking, effort_of_updating
from structprune.solvers.hessian import DAMPING, Damping, factor_inverse
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix
from structprune.solvers.sparsegpt import BLOCK
from structprune.solvers.thanos import solve_thanos


class Thanos(WeightPruner):
    """Rank a weight by |W_ij| * ||X_j|| among all that have yet to be decided, and update the rest jointly.

    Args:
        compare: Always "matrix".
        block: Columns decided together.
        damping: Added to the diagonal of the Gram matrix, relative to its mean.
    """

    compare: Literal["matrix"] = "matrix"
    block: Annotated[int, Field(ge=1)] = BLOCK
    damping: Damping = DAMPING

    parts: ClassVar[Parts] = frozenset({"norm", "gram"})
    # Its own update is an "obs"; the exact refit still gains, because blocks only look to their right.
    repairs: ClassVar[tuple[str, ...]] = ("least_squares",)

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what the factor takes, per block a ranking of the rest, and per row and block a system."""
        steps = -(-inputs // self.block)
        # Half of a block leaves a row on average: a Cholesky factor of that many.
        systems, ranked = rows * steps * (self.block / 2) ** 3 / 3, rows * inputs * (steps - 1) / 2
        solved = effort_of_ranking(rows, inputs) + effort_of_updating(rows, inputs)
        return solved + Effort(systems, ranked)

    def solve(self, matrices: Sequence[MatrixToPrune], seen: Statistics) -> list[PrunedMatrix]:
        """Return masks and updated weights of the matrices that read the same input.

        Args:
            matrices: The matrices, each [out, in].
            seen: Norms, shape [in], and Gram matrix of their input, shape [in, in].
        """
        factored = factor_inverse(seen.gram, self.damping)
        solved = []
        for one in matrices:
            mask, weight, loss = solve_thanos(one.weight, seen.norm, factored, one.amount, block=self.block)
            solved.append(PrunedMatrix(mask, weight, facts={"error": loss, **factored.facts}))
        return solved
