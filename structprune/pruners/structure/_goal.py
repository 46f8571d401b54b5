"""How much leaves: a share of the units, or so much that a number of parameters or bytes is left."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Self, final

from pydantic import BeforeValidator, model_validator

from structprune.decide.budgets.unit_table import UnitTable
from structprune.decide.budgets.width_union import AnyWidthBudget
from structprune.decide.sparsity import fraction_of
from structprune.decide.unit_counts import UnitCounts
from structprune.errors import UsageError
from structprune.models.arch import blocks
from structprune.models.cost import parameters_of
from structprune.models.identity import names_of, skeleton, stored_dtypes, stored_layout
from structprune.models.streamed import Model
from structprune.models.walk import walk_weights
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.pruners.kept_scores import check_kept_scores
from structprune.pruners.seen import UNMEASURED, Seen
from structprune.pruners.structure._family import StructurePruner
from structprune.pruners.structure._width_block import WidthBlock
from structprune.storage.tensor_file import nbytes_of

_AMOUNT = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)
_PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _read_amount(value: object, units: dict[str, int], example: str) -> object:
    """Read a whole number, or one with a unit behind it."""
    match = _AMOUNT.fullmatch(str(value).strip().replace("_", "").replace(",", ""))
    if value is None:
        return value
    if isinstance(value, str | int | float) and not isinstance(value, bool) and match:
        amount = Fraction(match[1]) * units.get(match[2].lower(), 0)
        if amount > 0 and amount.denominator == 1:
            return int(amount)
    raise ValueError(f"found {value!r:.40}, expected a whole number above 0 such as {example}")


Parameters = Annotated[
    int | None, BeforeValidator(lambda value: _read_amount(value, _PARAMETERS, "100000000 or 100M"))
]
Bytes = Annotated[
    int | None, BeforeValidator(lambda value: _read_amount(value, _BYTES, "200000000, 200MB or 190MiB"))
]


# What may differ between the run that kept the scores and the one that uses them: no score depends on it.
FREE = frozenset(
    {"sparsity", "target_params", "target_memory", "keep_scores", "multiple", "kv_multiple", "native"}
)
ALONE = "scores alone do not decide with propagate: pruned, nor with repair: least_squares"


def score_key(prefix: str) -> Key:
    """Return the key of what is kept of a block, by its path."""
    return Key(prefix, "score")


class GoalPruner(StructurePruner):
    """A pruner that is told how much leaves, or how large what is left shall be, and how blocks share it.

    Args:
        target_params: How many parameters the whole model shall have, instead of a sparsity: 100M.
        target_memory: How many bytes its weights shall take as they are stored, instead of a sparsity: 200MB.
        budget: "uniform": every block loses the same share; "global": all units of the model compete;
            "sigmoid": blocks that turn the states less lose more; "table": sizes that blocks are to have, as
            `name:` with its fields, instead of a sparsity.
        keep_scores: Keep the scores in the plan, so that another size needs no calibration.
    """

    target_params: Parameters = None
    target_memory: Bytes = None
    budget: AnyWidthBudget = "uniform"
    keep_scores: bool = False

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        said = [*self._instead]
        if said and self.sparsity != type(self).model_fields["sparsity"].default:
            said.append("sparsity")
        if len(said) > 1:
            raise ValueError(
                f"{said[0]}: given beside {said[1]}; each says how much leaves, give one of them"
            )
        if self.keep_scores and not self.reusable:
            raise ValueError(f"keep_scores: {ALONE}")
        return self

    @property
    @final
    def reusable(self) -> bool:
        """Tell whether kept scores are all that another size needs."""
        return self.propagate == "dense" and "gram" not in self.solving

    @final
    def check_scores(self, plan: Plan) -> None:
        """Refuse a plan that this pruner cannot decide from: no scores, or made with other settings."""
        if not self.reusable:
            raise UsageError(ALONE, hint="calibrate again")
        check_kept_scores(self, plan, FREE)

    @final
    def reuse(self, plan: Plan, model: Model, writer: PlanWriter) -> Plan:
        """Decide from the scores that a run with another size kept; needs no data."""
        self.check_scores(plan)
        self.check_sizes(model)
        facts = {"scores_of": plan.id}
        if not self.removes_something:
            return self.finish(writer, model, {}, facts)
        keys = [score_key(prefix) for prefix, _ in blocks(skeleton(model))]
        leaving = self.decide(model, [plan.get(key, UNMEASURED) for key in keys])
        for block in walk_weights(model, writer.finished):
            writer.write(*self.solve_block(model, block, Seen(), leaving))
        return self.finish(writer, model, leaving, facts)

    @property
    @final
    def removes_something(self) -> bool:
        """Tell whether anything leaves."""
        return bool(self._instead) or super().removes_something

    @property
    @final
    def asked(self) -> float | str:
        """Return what was asked for, as people say it."""
        if isinstance(self.budget, UnitTable):
            return str(self.budget.asked)
        if self._target is None:
            return self.sparsity
        return f"{self._target:,} {'bytes' if self.target_params is None else 'parameters'} left"

    @final
    def with_goal(self, goal: float | str) -> Self:
        """Return the same pruner with another sparsity.

        Raises:
            UsageError: Something else says how much leaves, or it cannot be this one.
        """
        if self._instead:
            raise UsageError(
                f"{self._instead[0]}: it fixes what leaves, so no other share can",
                hint="give the shares alone",
            )
        return super().with_goal(goal)

    @property
    @final
    def asked_by(self) -> str:
        """Return what was asked for behind its key, as the beginning of an error."""
        return f"{[*self._instead, 'sparsity'][0]}: {self.asked}"

    @property
    def _instead(self) -> list[str]:
        """Return the fields that say how much leaves instead of the sparsity."""
        targets = [name for name in ("target_params", "target_memory") if getattr(self, name) is not None]
        return [*targets, "budget"] if isinstance(self.budget, UnitTable) else targets

    @property
    def _target(self) -> int | None:
        return self.target_memory if self.target_params is None else self.target_params

    def share_of(self, model: Model, found: Sequence[WidthBlock], least: UnitCounts) -> Fraction:
        """Return the share of the units that leaves, exactly what was asked for.

        Args:
            model: For its size; its weights may not be in memory.
            found: Its blocks, counted with the biases that they get.
            least: How many units of a block stay at least.

        Raises:
            UsageError: So much cannot be left; names the range.
        """
        if self._target is None:
            return fraction_of(self.sparsity)
        whole, each = parameters_of(skeleton(model)), [1] * len(found)
        if self.target_params is None:
            layout = stored_layout(model).values()
            whole = sum(nbytes_of(dtype, shape) for entries in layout for _, dtype, shape in entries)
            each = [_bytes_of_one(one, model) for one in found]
        pairs = list(zip(found, each, strict=True))
        whole += sum(one.new_biases * size for one, size in pairs)
        smallest = whole - sum(one.removable(least) * size for one, size in pairs)
        if not smallest <= self._target <= whole:
            raise UsageError(
                f"{self.asked_by} of {whole:,} cannot be reached",
                hint=f"{smallest:,} to {whole:,} can: at least one unit of a kind stays in every block",
            )
        of = sum(one.there.cost(one.costs) * size for one, size in pairs)
        return Fraction(whole - self._target, of)


def _bytes_of_one(known: WidthBlock, model: Model) -> int:
    """Return how many bytes a parameter of a block's units takes in the files."""
    path = next((path for path, _ in known.readers.values()), None)
    if path is None:
        return 0
    stored = names_of(model).stored_of[f"{known.prefix}.{path}.weight"][0]
    return stored_dtypes(model)[stored].itemsize
