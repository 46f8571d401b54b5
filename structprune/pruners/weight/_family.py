"""The weight family: which weights of a matrix become zero; shapes stay as they are.

A method is a score (`_scored.ScorePruner`), or where choice and update cannot be told apart, a `solve`. How
much leaves where (`budget`), and what makes up for it (`repair`), are chosen beside it; calibration remembers
of an input what method, budget and repair declare together.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, final

from pydantic import model_validator
from torch import Tensor

from structprune.calibration.dispatch import owners_of
from structprune.calibration.statistics import NOTHING, Parts, Statistics
from structprune.decide.budgets.union import AnyBudget
from structprune.decide.counts import Compare, reached_near, removed_weights
from structprune.decide.sparsity import Sparsity, fraction_of, pattern_of
from structprune.decide.targets import Targets
from structprune.errors import UsageError
from structprune.models.arch import Linear, all_linears, blocks
from structprune.models.edit import left_of
from structprune.models.identity import names_of, skeleton, stored_dtypes, stored_names, zeros_found
from structprune.models.names import Names
from structprune.models.streamed import Model
from structprune.models.tensor_edit import Outline
from structprune.models.walk import Block
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.plan.promise import Promises
from structprune.pruners.blockwise import BlockwisePruner
from structprune.pruners.demand import efforts_of
from structprune.pruners.forecast import Forecast
from structprune.pruners.seen import UNMEASURED, Seen
from structprune.pruners.weight._keys import check_keys
from structprune.pruners.weight._promises import Promise, removed_promises
from structprune.pruners.weight._side_by_side import solve_on_ranks
from structprune.ranks import Ranks
from structprune.solvers.effort import Effort, effort_of_ranking
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix, check_pruned, naming
from structprune.solvers.plan_tensors import block_facts, plan_tensors
from structprune.solvers.repairs.union import AnyRepair


class WeightPruner(Targets, BlockwisePruner):
    """A pruner that sets single weights to zero.

    Args:
        sparsity: Fraction of weights removed, in [0, 1), or "N:M" (N of every M consecutive inputs kept).
        compare: Which weights compete for an unstructured sparsity: those of a row, or of the whole matrix.
        budget: How unequal the linears' shares are: "uniform", "owl", "ramp", "table" or "target_params",
            alone or as `name:` with its fields. The total stays exactly what was asked.
        repair: What makes up for the removed weights: "none"; "obs", SparseGPT's update; "least_squares", the
            exact refit of the kept weights; "dsnot", which swaps weights and updates none; alone or as
            `name:` with its fields.
        indivisible: Whether a linear whose sizes do not divide as the method needs is refused or left dense.

    Attributes:
        parts: What the method reads of a matrix's statistics, whatever its fields.
        repairs: Which repairs find something to make up for after it.
    """

    sparsity: Sparsity = 0.5
    compare: Compare = "row"
    budget: AnyBudget = None
    repair: AnyRepair = None
    indivisible: Literal["refuse", "dense"] = "refuse"

    parts: ClassVar[Parts] = NOTHING
    repairs: ClassVar[tuple[str, ...]] = ("obs", "least_squares", "dsnot")

    @abstractmethod
    def solve(self, matrices: Sequence[MatrixToPrune], seen: Statistics) -> list[PrunedMatrix]:
        """Return what becomes of each of the matrices that read the same input, before any repair.

        Args:
            matrices: The matrices, each [out, in].
            seen: What was collected of their input; a gradient stands in each matrix's own.
        """

    @property
    def needs(self) -> Parts:
        """Return what the method reads of a matrix's statistics, with the fields as they are."""
        return self.parts

    def effort(self, rows: int, inputs: int) -> Effort:
        """Return what solving matrices takes that read the same input; unless told otherwise, ranking them.

        Args:
            rows: Their outputs together.
            inputs: How many they read.
        """
        return effort_of_ranking(rows, inputs)

    @final
    def efforts(self, groups: Sequence[Sequence[Linear]]) -> list[Effort]:
        """Return what solving a block takes, group by group, with the repair."""
        each = [self.effort, *([] if self.repair is None else [self.repair.effort])]
        return efforts_of(groups, each)

    @property
    def leaves_zeros(self) -> bool:
        """Tell whether the written matrices hold the zeros."""
        return True

    def misfit(self, linear: Linear) -> str:
        """Return why a linear cannot be pruned as asked, "" when it can."""
        pattern, width = pattern_of(self.sparsity), linear.weight.shape[1]
        if pattern and width % pattern[1]:
            return f"{width} inputs are not divisible by {pattern[1]} (for {self.sparsity})"
        return ""

    def outline(self, names: Names, targets: Sequence[Linear]) -> Mapping[Key, tuple[int, ...]]:
        """Return the shapes of what the plan will hold and no tensor of the model has."""
        return {}

    def config_patch(self, targets: Sequence[Linear]) -> dict[str, Any]:
        """Return what the plan changes in config.json."""
        return {}

    def stored_promises(
        self, names: Names, targets: Sequence[Linear], leaving: Mapping[str, int]
    ) -> list[Promise]:
        """Return what the files must show of single tensors."""
        by_matrix = self.compare == "matrix" or self.budget is not None
        return removed_promises(names, targets, leaving, pattern_of(self.sparsity), by_matrix=by_matrix)

    def stage_facts(self, model: Model) -> dict[str, Any]:
        """Return what is to be told of the stage as a whole, before anything is measured."""
        if self.indivisible == "refuse":
            return {}
        named = [self.matching_linears(index, found) for index, found in enumerate(all_linears(model))]
        reasons = ((one.label, self.misfit(one)) for block in named for one in block)
        return {"left_dense": {label: reason for label, reason in reasons if reason}}

    @model_validator(mode="before")
    @classmethod
    def _know_keys_that_moved(cls, data: object) -> object:
        """Refuse keys of older recipes by name, and scores of a method that has none."""
        if isinstance(data, Mapping):
            check_keys(cls.method(), cls.model_fields, data)
        return data

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.repair is not None and self.repair.name not in self.repairs:
            raise ValueError(
                f"repair: {self.method()} leaves nothing for {self.repair.name!r} to make up for"
            )
        if self.budget is not None and pattern_of(self.sparsity):
            raise ValueError(f"budget: {self.sparsity} fixes the share of every group, none can be unequal")
        return self

    @property
    @final
    def solving(self) -> Parts:
        """Return what method and repair read together."""
        return self.needs | (NOTHING if self.repair is None else self.repair.parts)

    @property
    @final
    def measuring(self) -> Parts:
        """Return what the budget reads of the dense model."""
        return NOTHING if self.budget is None else self.budget.parts

    @property
    @final
    def asked(self) -> float | str:
        """Return the sparsity, or what the budget was asked for instead."""
        return self.sparsity if self.budget is None else self.budget.asked(self.sparsity)

    @property
    @final
    def removes_something(self) -> bool:
        """Tell whether anything leaves."""
        return bool(fraction_of(self.sparsity)) or self.budget is not None

    @final
    def with_goal(self, goal: float | str) -> Self:
        """Return the same pruner with another sparsity.

        Raises:
            UsageError: It cannot be this one.
        """
        return self.with_field("sparsity", goal)

    @final
    def fits(self, linear: Linear) -> bool:
        """Tell whether a linear is pruned rather than left dense for its sizes."""
        return self.indivisible == "refuse" or not self.misfit(linear)

    @final
    def check_sizes(self, model: Model) -> None:
        """Check that every target can be pruned as asked, and that there is one.

        Raises:
            UsageError: It cannot; names the linear.
        """
        self.check_skipped(len(blocks(model)))
        targets = [linear for block in self.all_targets(model) for linear in block]
        if not targets:
            raise UsageError(
                "skip, include, exclude and indivisible leave no linear to prune",
                hint="skip fewer blocks, or loosen include, exclude or indivisible",
            )
        for linear in targets:
            if reason := self.misfit(linear):
                raise UsageError(
                    f"{linear.label}: {reason}",
                    hint="--exclude it, --set indivisible=dense, or choose other sizes",
                )

    @final
    def measure(self, model: Model, block: Block, seen: Seen) -> Tensor:
        """Return what the budget remembers of a block."""
        targets = self.target_linears(block.index, block.linears)
        found = [seen.of(one) for one in targets]
        measured: Tensor = self.budget.measure([one.weight for one in targets], found)
        return measured

    @final
    def decide(self, model: Model, measured: Sequence[Tensor]) -> dict[str, int]:
        """Return how many weights leave each target, by label."""
        targets = self.all_targets(model)
        if self.budget is None:
            every = [(one.label, one.weight) for block in targets for one in block]
            asked = self.sparsity, self.compare
            return {label: removed_weights((len(one), one.shape[1]), *asked) for label, one in every}
        sizes = [{one.label: one.weight.numel() for one in block} for block in targets]
        counts: dict[str, int] = self.budget.counts(sizes, self.sparsity, skeleton(model), measured)
        return counts

    @final
    def forecast(self, model: Model) -> Forecast:
        """Return how many weights leave, and what is left of the model; every size rule is checked."""
        self.check_sizes(model)
        targets = [linear for block in self.all_targets(model) for linear in block]
        # Before any data a budget knows its total, if not yet who gives how much.
        leaving = self.decide(model, [UNMEASURED] * len(blocks(model)))
        shapes = [(len(linear.weight), linear.weight.shape[1]) for linear in targets]
        changed = targets if self.removes_something else []
        outline, patch = Outline(self.outline(names_of(model), changed)), self.config_patch(changed)
        return Forecast(
            "weights",
            self.asked,
            self._removed(leaving),
            sum(out * inputs for out, inputs in shapes),
            left_of(model, outline, patch),
            found=zeros_found(model, stored_names(names_of(model), targets)),
            # A budget hands out its total to the last weight.
            near=reached_near(shapes, self.sparsity, self.compare) if self.budget is None else (),
            by_rounding=self.leaves_zeros,
        )

    @final
    def solve_block(
        self, model: Model, block: Block, seen: Seen, leaving: Mapping[str, int]
    ) -> tuple[dict[Key, Tensor], dict[str, Any]]:
        """Return what becomes of a block's matrices; those that read the same input are solved together."""
        targets = self.target_linears(block.index, block.linears)
        groups: dict[object, list[MatrixToPrune]] = {}
        for linear in targets:
            matrix = self.matrix_to_prune(linear, leaving, seen.of(linear))
            sums = matrix.seen.inputs
            groups.setdefault(linear.label if sums is None else id(sums), []).append(matrix)
        ranks = Ranks.here()
        owners = seen.sums.owners or owners_of([[linear] for linear in targets], ranks, self.costs)
        found = solve_on_ranks(self._solve_and_repair, list(groups.values()), owners, ranks)
        # In the order of the block, whichever was solved first: the same plan whoever solved them.
        pruned = {linear.label: found[linear.label] for linear in targets}
        return self.decided(model, targets, pruned), block_facts(pruned, seen.sums)

    @final
    def decided(
        self, model: Model, targets: Sequence[Linear], pruned: Mapping[str, PrunedMatrix]
    ) -> dict[Key, Tensor]:
        """Return what becomes of some linears as tensors of a plan."""
        pairs = [(linear, pruned[linear.label]) for linear in targets]
        return plan_tensors(pairs, names_of(model), stored_dtypes(model))

    @final
    def matrix_to_prune(self, linear: Linear, leaving: Mapping[str, int], seen: Statistics) -> MatrixToPrune:
        """Return the question that a linear poses."""
        pattern = pattern_of(self.sparsity)
        return MatrixToPrune(linear.label, linear.weight, leaving[linear.label], pattern, seen)

    def _solve_and_repair(self, matrices: Sequence[MatrixToPrune]) -> dict[str, PrunedMatrix]:
        """Return what becomes of matrices that read the same input, by label."""
        with naming(self.method(), matrices):
            found = check_pruned(self.method(), self.solve(matrices, matrices[0].seen), matrices)
            solved = zip(matrices, found, strict=True)
            if self.repair is None:
                return {matrix.label: pruned for matrix, pruned in solved}
            return {matrix.label: self.repair.repair(matrix, pruned) for matrix, pruned in solved}

    @final
    def finish(
        self, writer: PlanWriter, model: Model, leaving: Mapping[str, int], facts: Mapping[str, Any]
    ) -> Plan:
        """Return the finished plan: how many weights leave every row, group or matrix is promised."""
        targets = [linear for block in self.all_targets(model) for linear in block] if leaving else []
        stored = self.stored_promises(names_of(model), targets, leaving) if self.leaves_zeros else []
        of = sum(linear.weight.numel() for linear in targets)
        promises = Promises(
            unit="weights", asked=self.asked, removed=self._removed(leaving), of=of, stored=tuple(stored)
        )
        shares = (
            {} if self.budget is None else {"budget": {one.matrix: leaving[one.label] for one in targets}}
        )
        told = {**self.stage_facts(model), **facts, **shares}
        return writer.finish(told, promises=promises, patch=self.config_patch(targets))

    def _removed(self, leaving: Mapping[str, int]) -> int:
        return sum(leaving.values()) if self.leaves_zeros else 0
