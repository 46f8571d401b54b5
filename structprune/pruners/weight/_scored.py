"""Methods of the weight family that are a score: the lowest leave, and kept scores serve another sparsity."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from structprune.calibration.collect import BlockSums
from structprune.calibration.statistics import Statistics
from structprune.decide.answers import check_scores, unchanged
from structprune.decide.select import mask_lowest
from structprune.errors import UsageError
from structprune.models.arch import blocks
from structprune.models.identity import names_of
from structprune.models.streamed import Model
from structprune.models.walk import walk_weights
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.pruners.kept_scores import check_kept_scores
from structprune.pruners.seen import UNMEASURED
from structprune.pruners.weight._family import WeightPruner
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix
from structprune.solvers.plan_tensors import block_facts

# What may differ between the run that kept the scores and the one that uses them: no score depends on it.
FREE = frozenset({"sparsity", "keep_scores", "compare"})


class ScorePruner(WeightPruner):
    """A pruner that gives every weight a score and removes the lowest.

    Args:
        keep_scores: Keep the scores in the plan, so that another sparsity needs no calibration.
    """

    keep_scores: bool = False

    @abstractmethod
    def score(self, weight: Tensor, seen: Statistics) -> Tensor:
        """Return the importance of each weight, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            seen: Holds the parts that the method declares.
        """

    @final
    def solve(self, matrices: Sequence[MatrixToPrune], seen: Statistics) -> list[PrunedMatrix]:
        """Return the masks of the highest scores."""
        return [self._keep_highest(one, self._checked_score(one)) for one in matrices]

    def _checked_score(self, matrix: MatrixToPrune) -> Tensor:
        whose = self.called(matrix.label)
        with unchanged(matrix.weight, whose):
            found = self.score(matrix.weight, matrix.seen)
        return check_scores(found, matrix.weight.shape, whose)

    def _keep_highest(self, matrix: MatrixToPrune, score: Tensor) -> PrunedMatrix:
        # What is zero already leaves first, so that what was asked for is what is zero afterwards. Minus, not
        # filled in: a score that is not a number must stay one that the selection refuses.
        gone = matrix.weight == 0
        ranked = torch.where(gone, score - torch.inf, score) if bool(gone.any()) else score
        mask = mask_lowest(ranked, matrix.removed, pattern=matrix.pattern, compare=self.compare)
        return PrunedMatrix(mask, score=score if self.keep_scores else None)

    @property
    @final
    def reusable(self) -> bool:
        """Tell whether kept scores are all that another sparsity needs."""
        return self.one_look and self.repair is None and self.budget is None

    @final
    def reuse(self, plan: Plan, model: Model, writer: PlanWriter) -> Plan:
        """Decide from the scores that a run with another sparsity kept; needs no data."""
        self.check_scores(plan)
        self.check_sizes(model)
        names, leaving = names_of(model), self.decide(model, [UNMEASURED] * len(blocks(model)))
        for block in walk_weights(model, writer.finished):
            targets = self.target_linears(block.index, block.linears)
            found = {}
            for linear in targets:
                parts = {name: plan[Key(name, "score")] for name in names.stored_of[linear.name]}
                score = linear.view(names.to_module(parts)[linear.name])
                matrix = self.matrix_to_prune(linear, leaving, Statistics())
                found[linear.label] = self._keep_highest(matrix, score)
            writer.write(self.decided(model, targets, found), block_facts(found, BlockSums()))
        return self.finish(writer, model, leaving, {"scores_of": plan.id})

    @final
    def check_scores(self, plan: Plan) -> None:
        """Refuse a plan that this pruner cannot decide from: no scores, or made with other settings."""
        if not self.reusable:
            raise UsageError(
                "scores alone do not decide here",
                hint="only for a method that ranks scores, propagate=dense where it reads data, no repair",
            )
        check_kept_scores(self, plan, FREE)
