"""The weight family: a score decides which weights become zero; shapes stay as they are.

A method is a score. How much leaves where (`budget`), and what makes up for it (`repair`), are chosen beside
it; calibration remembers of an input what score, budget and repair need together. A method whose choice and
update cannot be told apart overrides `solve`.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self, final

from pydantic import Field, model_validator
from torch import Tensor

from structprune.calibration.collect import Collected
from structprune.calibration.notebook import Notebook
from structprune.calibration.statistics import InputNorm, widest
from structprune.decide.budget import (
    AnyBudget,
    Compare,
    TargetParams,
    apportion,
    removed_count,
    removed_weights,
)
from structprune.decide.choice import Choice
from structprune.decide.record import record
from structprune.decide.solution import STATISTIC_OF, Repair, Solution, Task, repaired, select
from structprune.decide.sparsity import Sparsity, fraction_of, pattern_of
from structprune.errors import QualityError, UsageError
from structprune.models.arch import Linear, all_linears, blocks
from structprune.models.gradients import Norm
from structprune.models.identity import names_of, skeleton, stored_names, weights_of
from structprune.models.streamed import Batch, Model
from structprune.models.walk import Block
from structprune.plan import Plan, PlanWriter
from structprune.pruner import Pruner
from structprune.pruners.weight.passes import (
    Measured,
    measure,
    measure_gradients,
    solve_block,
    walk_data,
    walk_weights,
)

logger = logging.getLogger(__name__)


class WeightPruner(Choice, Pruner):
    """A pruner that gives every weight a score and removes the lowest.

    Args:
        sparsity: Fraction of weights removed, in [0, 1), or "N:M" (N of every M consecutive inputs kept).
        compare: Which weights compete for an unstructured sparsity: those of a row, or of the whole matrix.
        budget: How unequal the linears' shares are: "uniform", "owl", "ramp", "table" or "target_params",
            alone or as `name:` with its fields. The total stays exactly what was asked.
        repair: What makes up for the removed weights: "none"; "obs", SparseGPT's update; "least_squares", the
            exact refit of the kept weights; "dsnot", which swaps weights and updates none.
        damping: What `obs` and `least_squares` add to the diagonal of the Gram matrix, relative to its mean.
        propagate: Whether later blocks see the outputs of pruned or of dense blocks.
        indivisible: Whether a linear whose sizes do not divide as the method needs is refused or left dense.
        keep_scores: Keep the scores in the plan, so that another sparsity needs no calibration.
    """

    sparsity: Sparsity = 0.5
    compare: Compare = "row"
    budget: AnyBudget = None
    repair: Repair = "none"
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    propagate: Literal["pruned", "dense"] = "pruned"
    indivisible: Literal["refuse", "dense"] = "refuse"
    keep_scores: bool = False

    statistic: ClassVar[type[InputNorm] | None] = None
    repairs: ClassVar[tuple[str, ...]] = ("none", "obs", "least_squares", "dsnot")

    @abstractmethod
    def score(self, weight: Tensor, stat: Any) -> Tensor:
        """Return the importance of each weight, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            stat: What `statistic` remembers of the linear's input, or None when the method needs no data.
        """

    def solve(self, tasks: Sequence[Task], stat: Any) -> list[Solution]:
        """Return what becomes of each of the matrices that read the same input, before any repair.

        Args:
            tasks: The matrices.
            stat: What is remembered of their input, or None when nothing was looked at.
        """
        return [self._ranked(task, self.score(task.weight, task.seen(stat))) for task in tasks]

    @property
    def gradients(self) -> Norm | None:
        """Return how gradients are added up over samples, where the score looks at them."""
        return None

    def misfit(self, linear: Linear) -> str:
        """Return why a linear cannot be pruned as asked, "" when it can."""
        pattern, width = pattern_of(self.sparsity), linear.weight.shape[1]
        if pattern and width % pattern[1]:
            return f"{width} inputs are not divisible by {pattern[1]} (for {self.sparsity})"
        return ""

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.repair not in self.repairs:
            raise ValueError(f"repair: {self.method()} leaves nothing for {self.repair!r} to make up for")
        if self.budget is not None and pattern_of(self.sparsity):
            raise ValueError(f"budget: {self.sparsity} fixes the share of every group, none can be unequal")
        return self

    @property
    @final
    def looks_at_data(self) -> bool:
        """Tell whether score, budget or repair need calibration data."""
        return self.needs_data or self._statistic is not None

    @property
    @final
    def asked(self) -> float | str:
        """Return the sparsity field."""
        return self.sparsity

    @property
    def _statistic(self) -> type[InputNorm] | None:
        return widest([self.statistic, STATISTIC_OF[self.repair]])

    def fits(self, linear: Linear) -> bool:
        """Tell whether a linear is pruned rather than left dense for its sizes."""
        return self.indivisible == "refuse" or not self.misfit(linear)

    @final
    def all_chosen(self, model: Model) -> list[list[Linear]]:
        """Return, block by block, the linears that are to be pruned."""
        return [self.chosen(index, found) for index, found in enumerate(all_linears(model))]

    @final
    def removals(self, model: Model) -> dict[str, tuple[int, int]]:
        """Return how many weights of each chosen linear leave, as far as that is known without data."""
        sizes = {one.label: one.weight.numel() for block in self.all_chosen(model) for one in block}
        counts = self._counts(model, [0.0] * len(blocks(model)))
        return {label: (counts[label], size) for label, size in sizes.items()}

    @final
    def check(self, model: Model) -> None:
        """Check that some linear is chosen and that every chosen one can be pruned as asked."""
        chosen = [linear for block in self.all_chosen(model) for linear in block]
        if not chosen:
            raise UsageError("skip, include and exclude leave no linear to prune")
        for linear in chosen:
            if reason := self.misfit(linear):
                raise UsageError(
                    f"{linear.label}: {reason}",
                    hint="--exclude it, --set indivisible=dense, or choose other sizes",
                )
        self._counts(model, [0.0] * len(blocks(model)))

    @final
    def calibrate(self, model: Model, batches: Sequence[Batch], plan: PlanWriter | None = None) -> Plan:
        """Measure where the decision needs the whole model, then decide block by block."""
        self.check(model)
        writer = plan or self.writer(None, model, weights_of(model))
        facts = self._facts(model)
        if fraction_of(self.sparsity) == 0 and self.budget is None:
            return writer.finish(facts)
        with (
            Notebook(writer.folder, "budget") as seen,
            Notebook(writer.folder, "gradients") as gradients,
        ):
            measured = [0.0] * len(blocks(model))
            if self.budget is not None and self.budget.measures:
                measured = measure(model, batches, self.chosen, self.budget, seen)
            if self.gradients is not None:
                measure_gradients(model, batches, self.chosen, self.gradients, gradients)
            counts = self._counts(model, measured)
            if self.budget is not None:
                chosen = [linear for block in self.all_chosen(model) for linear in block]
                facts |= {"measured": measured, "budget": {one.matrix: counts[one.label] for one in chosen}}
            samples = sum(len(batch["input_ids"]) for batch in batches)
            for block, collected in self._walk(model, batches, writer):
                noted = gradients.read(block.index)
                tasks = [
                    self._task(linear, counts, noted.get(linear.label), samples)
                    for linear in self.chosen(block.index, block.linears)
                ]
                found = solve_block(tasks, collected.statistics, self._solve)
                self._write(writer, model, block, collected, found)
        return writer.finish(facts)

    @final
    def reuse(self, plan: Plan, model: Model, writer: PlanWriter) -> Plan:
        """Decide from the scores that a run with another sparsity kept; needs no data.

        Args:
            plan: Holds `score` tensors.
            model: The model it was made on.
            writer: Where to write the decisions.
        """
        self.check(model)
        names, counts = names_of(model), self._counts(model, [0.0] * len(blocks(model)))
        for block, nothing in walk_weights(model, writer.finished):
            found = {}
            for linear in self.chosen(block.index, block.linears):
                parts = {name: plan[f"{name}:score"] for name in names.stored_of[linear.name]}
                score = linear.view(names.to_module(parts)[linear.name])
                found[linear.label] = self._ranked(self._task(linear, counts), score)
            self._write(writer, model, block, nothing, found)
        return writer.finish(self._facts(model) | {"scores_of": plan.id})

    @property
    @final
    def reusable(self) -> bool:
        """Tell whether kept scores are all that another sparsity needs."""
        one_look = self._statistic is None or self.propagate == "dense"
        ranked = type(self).solve is WeightPruner.solve
        return ranked and one_look and self.repair == "none" and self.budget is None

    def _walk(self, model: Model, batches: Sequence[Batch], writer: PlanWriter) -> Iterator[Measured]:
        if self._statistic is None:
            return walk_weights(model, writer.finished)
        dense = self.propagate == "dense"
        return walk_data(model, batches, writer, self.chosen, self._statistic, dense=dense)

    def _ranked(self, task: Task, score: Tensor) -> Solution:
        kept = score if self.keep_scores else None
        try:
            return Solution(select(score, task, self.compare), score=kept)
        except QualityError as error:
            raise QualityError(
                f"{task.label}: {error.message}", hint="the weights or the activations overflowed"
            ) from None

    def _solve(self, tasks: Sequence[Task], stat: InputNorm | None) -> list[Solution]:
        solutions = self.solve(tasks, stat)
        return [
            repaired(task, solution, stat, self.repair, self.damping)
            for task, solution in zip(tasks, solutions, strict=True)
        ]

    def _task(
        self, linear: Linear, counts: Mapping[str, int], gradient: Tensor | None = None, samples: int = 0
    ) -> Task:
        pattern = pattern_of(self.sparsity)
        return Task(linear.label, linear.weight, counts[linear.label], pattern, gradient, samples)

    def _write(
        self,
        writer: PlanWriter,
        model: Model,
        block: Block,
        collected: Collected,
        found: Mapping[str, Solution],
    ) -> None:
        """Write a block's decision and what there is to report of it."""
        solved = [(linear, found[linear.label]) for linear in block.linears if linear.label in found]
        removed = {label: int(one.mask.numel() - one.mask.sum()) for label, one in found.items()}
        facts: dict[str, Any] = {"removed": removed}
        if measured := {label: dict(one.facts) for label, one in found.items() if one.facts}:
            facts["matrices"] = measured
        if collected.scarce:
            facts["scarce"] = dict(collected.scarce)
        if unseen := [label for label, tokens in collected.scarce.items() if tokens == 0]:
            logger.warning("%s: no calibration token reached it", ", ".join(unseen))
            facts["unseen"] = unseen
        writer.write(record(solved, names_of(model)), facts)

    def _facts(self, model: Model) -> dict[str, Any]:
        chosen = [linear for block in self.all_chosen(model) for linear in block]
        facts: dict[str, Any] = {"prunable": stored_names(names_of(model), chosen)}
        if self.indivisible == "dense":
            every = [
                one for index, found in enumerate(all_linears(model)) for one in self.named(index, found)
            ]
            facts["left_dense"] = {one.label: self.misfit(one) for one in every if self.misfit(one)}
        return facts

    def _counts(self, model: Model, measured: Sequence[float]) -> dict[str, int]:
        """Return how many weights leave each chosen linear; `measured`: the budget's number per block."""
        chosen = self.all_chosen(model)
        flat = [linear for block in chosen for linear in block]
        sizes = {linear.label: linear.weight.numel() for linear in flat}
        if self.budget is None:
            return {
                one.label: removed_weights(
                    (one.weight.shape[0], one.weight.shape[1]), self.sparsity, self.compare
                )
                for one in flat
            }
        total = removed_count(sum(sizes.values()), self.sparsity)
        if isinstance(self.budget, TargetParams):
            total = self.budget.removed(skeleton(model), sum(sizes.values()))
        shares = self.budget.shares(Fraction(total, sum(sizes.values())), measured)
        wanted = {
            linear.label: share * sizes[linear.label]
            for block, share in zip(chosen, shares, strict=True)
            for linear in block
        }
        return apportion(total, wanted, sizes)
