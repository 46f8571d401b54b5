"""ALPS: choose the support by ADMM on the reconstruction error, then refit the weights on it.

Source: Meng et al. 2024, https://arxiv.org/abs/2406.07831
"""

from collections.abc import Sequence
from typing import ClassVar

from structprune.calibration.statistics import Parts, Statistics
from structprune.decide.counts import Compare
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers.alps import effort_of_alps, solve_alps
from structprune.solvers.effort import Effort
from structprune.solvers.hessian import DAMPING, Damping
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix


class Alps(WeightPruner):
    """Minimise the output error over all supports of the asked size.

    Args:
        compare: Which weights compete; the paper ranks the whole matrix.
        damping: Added to the diagonal of the Gram matrix, relative to its mean.
    """

    compare: Compare = "matrix"
    damping: Damping = DAMPING

    parts: ClassVar[Parts] = frozenset({"gram"})
    repairs: ClassVar[tuple[str, ...]] = ()  # its last step is the exact refit already

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what the eigenvectors, the usual rounds and the refit take."""
        return effort_of_alps(rows, inputs)

    def solve(self, matrices: Sequence[MatrixToPrune], seen: Statistics) -> list[PrunedMatrix]:
        """Return masks and refitted weights of the matrices that read the same input.

        Args:
            matrices: The matrices, each [out, in].
            seen: Gram matrix of their input, shape [in, in].
        """
        solved = []
        for one in matrices:
            mask, weight, facts = solve_alps(
                one.weight, seen.gram, one.amount, compare=self.compare, damping=self.damping
            )
            solved.append(PrunedMatrix(mask, weight, facts=facts))
        return solved
