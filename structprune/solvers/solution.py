"""One matrix from question to answer: how much leaves it, which weights, and what becomes of the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

from torch import Tensor

from structprune.calibration.statistics import Gram, InputMoments, InputNorm, Sensitivity
from structprune.decide.budgets.budget import Compare
from structprune.decide.select import groups, matrix, rows
from structprune.solvers import hessian
from structprune.solvers.armor.descent import Factors
from structprune.solvers.repairs.repair import dsnot, least_squares
from structprune.solvers.sparsegpt import obs

Repair = Literal["none", "obs", "least_squares", "dsnot"]
STATISTIC_OF: Mapping[Repair, type[InputNorm] | None] = {
    "none": None,
    "obs": Gram,
    "least_squares": Gram,
    "dsnot": InputMoments,
}


@dataclass(frozen=True)
class Task:
    """A matrix to be pruned.

    Attributes:
        label: The linear's name.
        weight: Shape [out, in], in the model's dtype; never changed.
        removed: How many weights leave.
        pattern: (N, M) where N of every M consecutive inputs stay; then `removed` follows from it.
        gradient: What is remembered of the weights' gradient, shape [out, in]; None where nobody asked.
        samples: Calibration sequences.
    """

    label: str
    weight: Tensor
    removed: int
    pattern: tuple[int, int] | None = None
    gradient: Tensor | None = None
    samples: int = 0

    @property
    def amount(self) -> tuple[int, int] | Fraction:
        """Return how much leaves, as the solvers take it: the pattern, or the exact fraction."""
        return self.pattern or Fraction(self.removed, self.weight.numel())

    def seen(self, stat: InputNorm | None) -> InputNorm | Sensitivity | None:
        """Return what a score is told of this matrix: its input's statistic, and its gradient where known."""
        if self.gradient is None or stat is None:
            return stat
        return Sensitivity(stat.norm, self.gradient.to(self.weight.device), self.samples)


@dataclass(frozen=True)
class Solution:
    """What becomes of a matrix.

    Attributes:
        mask: Which weights stay (of the core, where there are factors), shape [out, in], bool.
        weight: New values of the kept weights, shape [out, in], float32; None where they stay as they are.
        factors: The matrix as a product; then `weight` is None.
        score: What the choice was made by, shape [out, in], float32; None where there is no such thing.
        facts: What was measured; plain JSON values.
    """

    mask: Tensor
    weight: Tensor | None = None
    factors: Factors | None = None
    score: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def select(score: Tensor, task: Task, compare: Compare) -> Tensor:
    """Return the mask of the highest scores: exactly as many leave as the task says.

    Args:
        score: Shape [out, in], float32.
        task: The matrix.
        compare: Whether the weights of a row compete with each other, or all of the matrix.

    Raises:
        QualityError: A score is NaN.
    """
    if task.pattern is not None:
        return groups(score, *task.pattern)
    if compare == "matrix":
        return matrix(score, task.removed)
    each, more = divmod(task.removed, score.shape[0])
    mask = rows(score, each)
    if more:  # what does not divide among the rows leaves the first ones
        mask[:more] = rows(score[:more], each + 1)
    return mask


def repaired(
    task: Task, solution: Solution, stat: InputNorm | None, repair: Repair, damping: float
) -> Solution:
    """Return a solution after something was done about what is lost.

    Args:
        task: The matrix.
        solution: Its mask, and new values where there are some already.
        stat: What is remembered of its input.
        repair: What to do.
        damping: Added to the diagonal of the Gram matrix, relative to its mean.
    """
    if repair == "none" or bool(solution.mask.all()):
        return solution
    weight = task.weight.float()
    if repair == "dsnot":
        assert isinstance(stat, InputMoments)
        # The paper's mean is that of the samples' sums, and its threshold holds in that scale.
        mean = stat.mean * (stat.tokens / max(task.samples, 1))
        mask = dsnot(weight, solution.mask, mean, stat.variance, stat.norm, pattern=task.pattern)
        return replace(solution, mask=mask)
    assert isinstance(stat, Gram)
    if repair == "least_squares":
        fitted, facts = least_squares(weight, solution.mask, stat.gram, damping)
    else:
        factored = hessian.factor(stat.gram, damping)
        fitted, facts = obs(weight, solution.mask, factored), factored.facts
    return replace(solution, weight=fitted, facts={**solution.facts, **facts})
