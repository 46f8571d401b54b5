"""Optimal Brain Surgeon on a given mask: SparseGPT's update without its choice.

Source: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774
"""

from dataclasses import replace
from typing import ClassVar, Literal

from structprune.calibration.statistics import Parts
from structprune.solvers.effort import Effort, effort_of_updating
from structprune.solvers.hessian import DAMPING, Damping, factor_inverse
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix
from structprune.solvers.repairs.repair import Repair
from structprune.solvers.sparsegpt import update_by_obs


class Obs(Repair):
    """Let the weights to the right of a removed one make up for it, column by column.

    Args:
        name: "obs".
        damping: Added to the diagonal of the Gram matrix, relative to its mean.
    """

    name: Literal["obs"] = "obs"
    damping: Damping = DAMPING

    parts: ClassVar[Parts] = frozenset({"gram"})

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what the factor and the sweep take."""
        return effort_of_updating(rows, inputs)

    def _repair(self, matrix: MatrixToPrune, pruned: PrunedMatrix) -> PrunedMatrix:
        factored = factor_inverse(matrix.seen.gram, self.damping)
        updated = update_by_obs(matrix.weight.float(), pruned.mask, factored)
        return replace(pruned, weight=updated, facts={**pruned.facts, **factored.facts})
