"""ALPS: choose the support by ADMM on the reconstruction error, then refit the weights on it.

Source: Meng et al. 2024, https://arxiv.org/abs/2406.07831
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from structprune.calibration.statistics import Gram
from structprune.decide.budgets.budget import Compare
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers.alps import alps
from structprune.solvers.solution import Solution, Task


class Alps(WeightPruner):
    """Minimise the output error over all supports of the asked size.

    Args:
        compare: Which weights compete; the paper ranks the whole matrix.
    """

    compare: Compare = "matrix"

    statistic: ClassVar = Gram
    repairs: ClassVar = ("none",)

    def score(self, weight: Tensor, stat: Gram) -> Tensor:
        """Return |W| * ||X||, where the search starts, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            stat: Gram matrix of the input, shape [in, in].
        """
        return weight.float().abs() * stat.norm

    def solve(self, tasks: Sequence[Task], stat: Gram) -> list[Solution]:
        """Return masks and refitted weights of the matrices that read the same input.

        Args:
            tasks: The matrices, each [out, in].
            stat: Gram matrix of their input, shape [in, in].
        """
        solutions = []
        for task in tasks:
            mask, weight, facts = alps(
                task.weight, stat.gram, task.amount, compare=self.compare, damping=self.damping
            )
            solutions.append(Solution(mask, weight, facts=facts))
        return solutions
