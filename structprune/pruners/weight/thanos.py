"""Thanos: choose block of columns by block, and let all that leaves a row at once be made up for at once.

Source: Ilin and Richtarik 2025, https://arxiv.org/abs/2504.05346
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from structprune.calibration.statistics import Gram
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers import hessian
from structprune.solvers.solution import Solution, Task
from structprune.solvers.thanos import thanos


class Thanos(WeightPruner):
    """Score a weight by |W_ij| * ||X_j|| among all that have yet to be decided, and update the rest jointly.

    Args:
        compare: Always "matrix".
        block: Columns decided together.
    """

    compare: Literal["matrix"] = "matrix"
    block: Annotated[int, Field(ge=1)] = 128

    statistic: ClassVar = Gram
    repairs: ClassVar = ("none", "least_squares")

    def score(self, weight: Tensor, stat: Gram) -> Tensor:
        """Return |W| * ||X|| before any update, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            stat: Gram matrix of the input, shape [in, in].
        """
        return weight.float().abs() * stat.norm

    def solve(self, tasks: Sequence[Task], stat: Gram) -> list[Solution]:
        """Return masks and updated weights of the matrices that read the same input.

        Args:
            tasks: The matrices, each [out, in].
            stat: Gram matrix of their input, shape [in, in].
        """
        factored = hessian.factor(stat.gram, self.damping)
        solutions = []
        for task in tasks:
            mask, weight, loss = thanos(task.weight, stat.norm, factored, task.amount, block=self.block)
            solutions.append(Solution(mask, weight, facts={"error": loss, **factored.facts}))
        return solutions
