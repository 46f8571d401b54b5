"""SparseGPT: choose and update column by column, so that later columns make up for what earlier ones lose.

Source: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774

The released code keeps one Hessian for every linear; here linears that read the same input share one and are
solved stacked. It removes one weight too many in every block of columns; here the count is exact.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Gram
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers import hessian, sparsegpt
from structprune.solvers.solution import Solution, Task


class Sparsegpt(WeightPruner):
    """Score a weight by W_ij^2 / [H^-1]_jj of the columns not yet decided, ranked per block of columns.

    Args:
        compare: Always "matrix": rows of a block of columns compete with each other.
        joint: Rank linears that read the same input together, not each on its own as in the paper.
        block: Columns ranked together.
    """

    compare: Literal["matrix"] = "matrix"
    joint: bool = False
    block: Annotated[int, Field(ge=1)] = 128

    statistic: ClassVar = Gram
    repairs: ClassVar = ("none", "least_squares")

    def score(self, weight: Tensor, stat: Gram) -> Tensor:
        """Return W^2 / [H^-1]_jj before any update, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            stat: Gram matrix of the input, shape [in, in].
        """
        factored = hessian.factor(stat.gram, self.damping)
        return (weight.float() / factored.upper.diagonal()).square()

    def solve(self, tasks: Sequence[Task], stat: Gram) -> list[Solution]:
        """Return masks and updated weights of the matrices that read the same input, solved stacked.

        Args:
            tasks: The matrices, each [out, in].
            stat: Gram matrix of their input, shape [in, in].
        """
        factored = hessian.factor(stat.gram, self.damping)
        amounts = [task.amount for task in tasks]
        weights = [task.weight for task in tasks]
        solved = sparsegpt.sparsegpt(weights, factored, amounts, block=self.block, joint=self.joint)
        return [
            Solution(mask, weight, facts={"error": loss, **factored.facts}) for mask, weight, loss in solved
        ]
