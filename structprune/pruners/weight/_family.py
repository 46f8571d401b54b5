"""The weight family: a score decides which weights become zero; shapes stay as they are.

A method is a score. How much leaves where (`budget`), and what makes up for it (`repair`), are chosen beside
it; calibration remembers of an input what score, budget and repair need together. A method whose choice and
update cannot be told apart overrides `solve`.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, final

from pydantic import Field, model_validator
from torch import Tensor

from structprune.calibration.collect import Collected, remembered_bytes
from structprune.calibration.notebook import Notebook
from structprune.calibration.statistics import InputNorm, widest
from structprune.decide.budgets.budget import AnyBudget, Compare, TargetParams
from structprune.decide.counts import counts
from structprune.decide.sparsity import Sparsity, fraction_of, pattern_of
from structprune.decide.targets import Choice
from structprune.errors import InputError, QualityError, UsageError
from structprune.models.arch import Linear, all_linears, blocks
from structprune.models.edit import left_of
from structprune.models.gradients import Norm
from structprune.models.identity import (
    names_of,
    names_of_matrix,
    skeleton,
    stored_dtypes,
    stored_names,
    weights_of,
)
from structprune.models.names import Names
from structprune.models.streamed import Batch, Model
from structprune.models.tensor_edit import Outline
from structprune.models.walk import Block
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.plan.promise import Gone, Promises, Removed, Reshaped
from structprune.pruners.blockwise import (
    Measured,
    measure,
    measure_gradients,
    solve_block,
    walk_data,
    walk_weights,
)
from structprune.pruners.forecast import Forecast
from structprune.pruners.pruner import Pruner
from structprune.solvers.plan_tensors import block_facts, plan_tensors
from structprune.solvers.solution import STATISTIC_OF, Repair, Solution, Task, repaired, select


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
        return bool(self.needs_data or self._statistic or (self.budget and self.budget.measures))

    @property
    @final
    def asked(self) -> float | str:
        """Return the sparsity, or how many parameters were to be left."""
        left = self.budget.parameters if isinstance(self.budget, TargetParams) else None
        return self.sparsity if left is None else f"{left} parameters"

    @property
    def _statistic(self) -> type[InputNorm] | None:
        return widest([self.needs, STATISTIC_OF[self.repair]])

    @property
    def needs(self) -> type[InputNorm] | None:
        """Return what the method remembers of an input with the fields as they are."""
        return self.statistic

    def remembered_bytes(self, model: Model) -> int:
        """Return at most how many bytes the Gram matrices and gradients of one block take."""
        gradients = self.gradients is not None
        return max(remembered_bytes(block, self._statistic, gradients) for block in self.all_chosen(model))

    @property
    def leaves_zeros(self) -> bool:
        """Tell whether the written matrices hold the zeros."""
        return True

    def fits(self, linear: Linear) -> bool:
        """Tell whether a linear is pruned rather than left dense for its sizes."""
        return self.indivisible == "refuse" or not self.misfit(linear)

    @final
    def all_chosen(self, model: Model) -> list[list[Linear]]:
        """Return, block by block, the linears that are to be pruned."""
        return [self.chosen(index, found) for index, found in enumerate(all_linears(model))]

    @final
    def forecast(self, model: Model) -> Forecast:
        """Return how many weights leave, and what is left of the model; every size rule is checked."""
        self._check(model)
        chosen = [linear for block in self.all_chosen(model) for linear in block]
        leaving = self._counts(model, [0.0] * len(blocks(model)))
        removed = sum(leaving.values()) if self.leaves_zeros else 0
        of = sum(linear.weight.numel() for linear in chosen)
        removes = self._removes_something
        outline = Outline(self._outline(names_of(model), chosen) if removes else {})
        patch = self._patch(chosen) if removes else {}
        return Forecast("weights", self.asked, removed, of, left_of(model, outline, patch))

    @final
    def with_goal(self, goal: float | str) -> Self:
        """Return the same pruner with another sparsity."""
        return type(self).model_validate({**self.model_dump(), "sparsity": goal})

    @property
    def _removes_something(self) -> bool:
        return bool(fraction_of(self.sparsity)) or self.budget is not None

    def _outline(self, names: Names, chosen: Sequence[Linear]) -> Mapping[Key, tuple[int, ...]]:
        """Return the shapes of what the plan will hold and no tensor of the model has."""
        return {}

    def _patch(self, chosen: Sequence[Linear]) -> dict[str, Any]:
        """Return what the plan changes in config.json."""
        return {}

    def _check(self, model: Model) -> None:
        chosen = [linear for block in self.all_chosen(model) for linear in block]
        if not chosen:
            raise UsageError("skip, include, exclude and indivisible leave no linear to prune")
        for linear in chosen:
            if reason := self.misfit(linear):
                raise UsageError(
                    f"{linear.label}: {reason}",
                    hint="--exclude it, --set indivisible=dense, or choose other sizes",
                )

    @final
    def calibrate(self, model: Model, batches: Sequence[Batch], plan: PlanWriter | None = None) -> Plan:
        """Measure where the decision needs the whole model, then decide block by block."""
        writer = plan or self.writer(None, model, weights_of(model))
        return self.calibrate_each(model, batches, [(self, writer)])[0]

    @final
    def calibrate_each(
        self, model: Model, batches: Sequence[Batch], wanted: Sequence[tuple[Self, PlanWriter]]
    ) -> list[Plan]:
        """Decide for several sparsities with one look at the model.

        Args:
            model: The dense model.
            batches: Calibration data.
            wanted: Pruners that differ from this one only in the sparsity, each with its plan's writer; more
                than one only where `one_look` says so.
        """
        for pruner, _ in wanted:
            pruner._check(model)
        going = [pair for pair in wanted if pair[0]._removes_something]
        facts = {id(writer): pruner._facts(model) for pruner, writer in wanted}
        leaving = self._decide(model, batches, going, facts) if going else {}
        return [
            pruner._finish(writer, model, facts[id(writer)], leaving.get(id(writer), {}))
            for pruner, writer in wanted
        ]

    def _finish(
        self, writer: PlanWriter, model: Model, facts: Mapping[str, Any], leaving: Mapping[str, int]
    ) -> Plan:
        chosen = [linear for block in self.all_chosen(model) for linear in block] if leaving else []
        return writer.finish(
            facts, promises=self._promises(model, chosen, leaving), patch=self._patch(chosen)
        )

    def _decide(
        self,
        model: Model,
        batches: Sequence[Batch],
        going: Sequence[tuple[Self, PlanWriter]],
        facts: Mapping[int, dict[str, Any]],
    ) -> dict[int, dict[str, int]]:
        """Decide every block for every goal; returns how many weights leave each linear, by writer."""
        writer = going[0][1]
        with (
            Notebook(writer.folder, "budget") as seen,
            Notebook(writer.folder, "gradients") as gradients,
        ):
            measured = [0.0] * len(blocks(model))
            if self.budget is not None and self.budget.measures:
                measured = measure(model, batches, self.chosen, self.budget, seen)
            if self.gradients is not None:
                measure_gradients(model, batches, self.chosen, self.gradients, gradients, spill=writer.folder)
            leaving = [pruner._counts(model, measured) for pruner, _ in going]
            if self.budget is not None:
                matrices = {one.label: one.matrix for block in self.all_chosen(model) for one in block}
                for (_, each), count in zip(going, leaving, strict=True):
                    shares = {matrix: count[label] for label, matrix in matrices.items()}
                    facts[id(each)].update(measured=measured, budget=shares)
            samples = sum(len(batch["input_ids"]) for batch in batches)
            for block, collected in self._walk(
                model, batches, min(going, key=lambda one: one[1].finished)[1]
            ):
                noted = gradients.read(block.index)
                for (pruner, each), count in zip(going, leaving, strict=True):
                    if block.index < each.finished:
                        continue
                    tasks = [
                        pruner._task(linear, count, noted.get(linear.label), samples)
                        for linear in self.chosen(block.index, block.linears)
                    ]
                    found = solve_block(tasks, collected.statistics, pruner._solve)
                    pruner._write(each, model, block, collected, found)
        return {id(each): count for (_, each), count in zip(going, leaving, strict=True)}

    @final
    def reuse(self, plan: Plan, model: Model, writer: PlanWriter) -> Plan:
        """Decide from the scores that a run with another sparsity kept; needs no data."""
        self.check_scores(plan)
        self._check(model)
        names, leaving = names_of(model), self._counts(model, [0.0] * len(blocks(model)))
        for block, nothing in walk_weights(model, writer.finished):
            found = {}
            for linear in self.chosen(block.index, block.linears):
                parts = {name: plan[Key(name, "score")] for name in names.stored_of[linear.name]}
                score = linear.view(names.to_module(parts)[linear.name])
                found[linear.label] = self._ranked(self._task(linear, leaving), score)
            self._write(writer, model, block, nothing, found)
        return self._finish(writer, model, self._facts(model) | {"scores_of": plan.id}, leaving)

    @final
    def check_scores(self, plan: Plan) -> None:
        """Refuse a plan that this pruner cannot decide from: no scores, or made with other settings."""
        if not self.reusable:
            raise UsageError(
                "scores alone do not decide here",
                hint="only for a method that ranks scores, propagate=dense where it reads data, no repair",
            )
        if not any(key.kind == "score" for key in plan):
            raise InputError("keeps no scores", hint="prune with --keep-scores first")
        free = ("sparsity", "keep_scores", "compare")
        config = {key: value for key, value in self.model_dump(mode="json").items() if key not in free}
        same = plan.method == self.method()
        differing = (
            [key for key in sorted(config) if config[key] != plan.config.get(key)] if same else ["method"]
        )
        if differing:
            raise UsageError(
                f"made with another {', '.join(differing)}",
                hint="only the sparsity may differ",
            )

    @property
    @final
    def reusable(self) -> bool:
        """Tell whether kept scores are all that another sparsity needs."""
        ranked = type(self).solve is WeightPruner.solve
        return ranked and self.one_look and self.repair == "none" and self.budget is None

    @property
    @final
    def one_look(self) -> bool:
        """Tell whether what calibration sees is the same for every sparsity."""
        return self._statistic is None or self.propagate == "dense"

    def _walk(self, model: Model, batches: Sequence[Batch], writer: PlanWriter) -> Iterator[Measured]:
        if self._statistic is None:
            return walk_weights(model, writer.finished)
        dense = self.propagate == "dense"
        return walk_data(model, batches, writer, self.chosen, self._statistic, dense=dense)

    def _ranked(self, task: Task, score: Tensor) -> Solution:
        return Solution(select(score, task, self.compare), score=score if self.keep_scores else None)

    def _solve(self, tasks: Sequence[Task], stat: InputNorm | None) -> list[Solution]:
        try:
            return [
                repaired(task, solution, stat, self.repair, self.damping)
                for task, solution in zip(tasks, self.solve(tasks, stat), strict=True)
            ]
        except (QualityError, UsageError) as error:
            names = ", ".join(task.label for task in tasks)
            hint = error.hint or "the weights or the activations overflowed"
            raise type(error)(f"{names}: {error.message}", hint=hint) from None

    def _task(
        self, linear: Linear, leaving: Mapping[str, int], gradient: Tensor | None = None, samples: int = 0
    ) -> Task:
        pattern = pattern_of(self.sparsity)
        return Task(linear.label, linear.weight, leaving[linear.label], pattern, gradient, samples)

    def _write(
        self,
        writer: PlanWriter,
        model: Model,
        block: Block,
        collected: Collected,
        found: Mapping[str, Solution],
    ) -> None:
        solved = [(linear, found[linear.label]) for linear in block.linears if linear.label in found]
        tensors = plan_tensors(solved, names_of(model), stored_dtypes(model))
        writer.write(tensors, block_facts(found, collected))

    def _facts(self, model: Model) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self.indivisible == "dense":
            named = [self.named(index, found) for index, found in enumerate(all_linears(model))]
            reasons = ((one.label, self.misfit(one)) for block in named for one in block)
            facts["left_dense"] = {label: reason for label, reason in reasons if reason}
        return facts

    def _promises(self, model: Model, chosen: Sequence[Linear], leaving: Mapping[str, int]) -> Promises:
        """Return what the files must show: how many weights leave every row, group or matrix."""
        names = names_of(model)
        removed = sum(leaving.values()) if self.leaves_zeros else 0
        of = sum(linear.weight.numel() for linear in chosen)
        stored = self._stored_promises(names, chosen, leaving) if self.leaves_zeros else []
        return Promises(unit="weights", asked=self.asked, removed=removed, of=of, stored=tuple(stored))

    def _stored_promises(
        self, names: Names, chosen: Sequence[Linear], leaving: Mapping[str, int]
    ) -> list[Removed | Reshaped | Gone]:
        pattern = pattern_of(self.sparsity)
        if pattern is None and (self.compare == "matrix" or self.budget is not None):
            return [
                Removed(
                    tensors=names_of_matrix(names, linear),
                    per="matrix",
                    removed=leaving[linear.label],
                    transposed=linear.transposed,
                    expert=linear.expert if len(names.stored_of[linear.name]) == 1 else None,
                )
                for linear in chosen
            ]
        alike: dict[tuple[int, bool], list[Linear]] = {}
        for linear in chosen:
            out = linear.weight.shape[0]
            each = pattern[1] - pattern[0] if pattern else leaving[linear.label] // out
            alike.setdefault((each, linear.transposed), []).append(linear)
        return [
            Removed(
                tensors=tuple(stored_names(names, found)),
                per="group" if pattern else "row",
                removed=each,
                of=pattern[1] if pattern else 0,
                transposed=transposed,
            )
            for (each, transposed), found in alike.items()
        ]

    def _counts(self, model: Model, measured: Sequence[float]) -> dict[str, int]:
        chosen = self.all_chosen(model)
        return counts(chosen, self.sparsity, self.compare, self.budget, skeleton(model), measured)
