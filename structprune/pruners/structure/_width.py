"""What is common to pruners of width: key-value groups and channels leave, and the model is smaller.

A method is a score of a block's units, mostly of the columns of the matrices that read them
(`_columns.ColumnPruner`). How many units leave where (`budget`), and what makes up for them (`repair`), are
chosen beside it.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, final

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from structprune.calibration.states import Reduce, token_cosines
from structprune.calibration.statistics import NOTHING, Parts
from structprune.decide.budgets.sigmoid import SigmoidBudget, mean_distance
from structprune.decide.targets import split_words
from structprune.decide.unit_counts import Multiples, UnitCounts, WidthUnit
from structprune.decide.units import chosen_units, first_units, unit_tensors
from structprune.errors import UsageError
from structprune.models.arch import Linear, blocks
from structprune.models.edit import left_of
from structprune.models.identity import names_of
from structprune.models.streamed import Model
from structprune.models.tensor_edit import Outline
from structprune.models.walk import Block
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.plan.promise import Promises, Reshaped
from structprune.pruners.forecast import Forecast
from structprune.pruners.seen import UNMEASURED, Seen
from structprune.pruners.structure._family import check_named_once, check_untied, left_shapes
from structprune.pruners.structure._goal import GoalPruner, score_key
from structprune.pruners.structure._width_block import ATTENTION, NotedMean, WidthBlock, width_block
from structprune.pruners.structure._width_goal import UNEQUAL, Share, WidthGoal
from structprune.pruners.structure._width_left import (
    Columns,
    check_native,
    created_biases,
    padded,
    patch_of,
    repaired_tensors,
    with_biases,
    with_new_biases,
)
from structprune.solvers.columns import AnyColumnRepair

READ: Mapping[str, Sequence[WidthUnit]] = {"heads": ATTENTION, "channels": ("channel",)}


class WidthPruner(GoalPruner):
    """A pruner that removes whole key-value groups and channels.

    Args:
        units: Kinds of unit that leave: "kv_group", a key-value head with its query heads; "head", one query
            head of every key-value head; "channel" of the
            feed-forward.
        repair: What makes up for removed units: "none"; "bias", the mean of what they added; "least_squares",
            a refit of the columns that stay.
        multiple: Of what the number of channels that stay is a multiple; a block that has fewer stays whole.
        kv_multiple: Of what the number of key-value groups that stay is one.
        native: How all blocks become equally wide, so that the family's own configuration says it: "uniform",
            they lose the same share; "pad", zeros fill them up to the widest.

    Attributes:
        parts: What the score reads, whatever the fields.
        per_parameter: Whether competing units are ranked by score per parameter, as sums over weights are.
    """

    units: Annotated[tuple[WidthUnit, ...], BeforeValidator(split_words)] = Field(
        default=("kv_group", "channel"), min_length=1
    )
    repair: AnyColumnRepair = None
    multiple: Annotated[int, Field(ge=1, le=65536)] = 1
    kv_multiple: Annotated[int, Field(ge=1, le=1024)] = 1
    native: Literal["uniform", "pad"] | None = None
    propagate: Literal["pruned", "dense"] = "dense"
    parts: ClassVar[Parts] = NOTHING
    per_parameter: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _equal_shares(cls, data: Any) -> Any:
        """Let native: uniform choose the budget of a method whose own is another."""
        equal = isinstance(data, dict) and data.get("native") == "uniform"
        return {"budget": "uniform"} | data if equal else data

    @model_validator(mode="after")
    def _can_be_native(self) -> Self:
        check_named_once(self.units)
        if set(ATTENTION) <= set(self.units):
            raise ValueError("units: kv_group takes a head's whole group; choose one of the two")
        if self.native == "uniform" and self.unequal:
            raise ValueError(f"native: uniform does not go with budget {self.budget}; pad does")
        if self.native == "pad" and self.skip:
            raise ValueError("native: pad makes every block as wide as those that skip leaves whole")
        return self

    @abstractmethod
    def score_units(
        self, known: WidthBlock, readers: Mapping[WidthUnit, Linear], seen: Seen
    ) -> dict[WidthUnit, Tensor]:
        """Return the importance of a block's units by kind, shape [units] each; a higher one stays.

        Scores of one kind and of different kinds are on one scale, that of all blocks.

        Args:
            known: The block; its parameters are in memory.
            readers: The matrix that reads the units, of every kind that may leave.
            seen: Holds the parts that the method declares.
        """

    @property
    def needs(self) -> Parts:
        """Return what the score reads."""
        return self.parts

    @property
    @final
    def measuring(self) -> Parts:
        """Return what a budget for the whole model must see of every block first."""
        return self._read if self.looks_first else NOTHING

    @property
    @final
    def watching(self) -> Reduce | None:
        """Return what a budget reads of the states at both ends of a block."""
        return token_cosines if isinstance(self.budget, SigmoidBudget) else None

    @property
    @final
    def solving(self) -> Parts:
        """Return what is read block by block: only a Gram matrix is too large to be noted at a first look."""
        return self._read & {"gram"} if self.looks_first else self._read

    @property
    @final
    def weighs_blocks(self) -> bool:
        """Tell whether the budget finds what each block is worth."""
        return self.removes_something and isinstance(self.budget, SigmoidBudget)

    @property
    @final
    def unequal(self) -> bool:
        """Tell whether the budget compares the blocks."""
        return self.budget == "global" or isinstance(self.budget, SigmoidBudget)

    @property
    @final
    def looks_first(self) -> bool:
        """Tell whether all blocks are measured before one is decided."""
        return self.unequal or self.keep_scores

    def _goal(self, model: Model, found: Sequence[WidthBlock]) -> WidthGoal:
        """Return how much leaves of the units of a model.

        Raises:
            UsageError: What is to be left cannot be reached.
        """
        least = UnitCounts(self.kv_multiple, self.multiple)
        if self._adds_bias:
            found = with_new_biases(model, found, native=self.native is not None)
        share = self.share_of(model, found, least)
        return WidthGoal(self.asked_by, share, self.budget, Multiples(self.kv_multiple, self.multiple))

    @property
    def _read(self) -> Parts:
        return self.needs | (NOTHING if self.repair is None else self.repair.parts)

    @property
    def _adds_bias(self) -> bool:
        return self.repair is not None and bool(self.repair.adds_bias)

    @final
    def target_linears(self, index: int, found: Sequence[Linear]) -> list[Linear]:
        """Return the matrices of block `index` that read units which may leave."""
        if self.skips(index):
            return []
        return [linear for linear in found if self._read_by(linear)]

    def _read_by(self, linear: Linear) -> list[WidthUnit]:
        """Return the kind of unit that a matrix reads and that may leave, or none."""
        return [kind for kind in READ.get(linear.reads, ()) if kind in self.units]

    @final
    def check_sizes(self, model: Model) -> None:
        """Check that there are units to remove.

        Raises:
            UsageError: There are none, or they belong to tensors that are tied; what was asked rounds to
                none; or a block that is to be skipped is not there.
        """
        self.check_skipped(len(blocks(model)))
        found = self._blocks(model)
        if not any(known.readers for known in found):
            raise UsageError(
                f"units: no block that is not skipped has {' or '.join(self.units)}",
                hint="skip fewer blocks, or choose other units; a head is one of several on a key-value head",
            )
        for index, known in enumerate(found):
            if known.readers:
                check_untied(model, index)
        if self.removes_something:
            self._goal(model, found).check(found)
            if self.native is not None:
                check_native(model, found, self._before(model, found), self.native, bias=self._adds_bias)

    def _before(self, model: Model, found: Sequence[WidthBlock]) -> dict[int, Share]:
        return self._biased(model, found, self._goal(model, found).shares_before(found))

    def _blocks(self, model: Model) -> list[WidthBlock]:
        return [self._known(model, index) for index in range(len(blocks(model)))]

    def _known(self, model: Model, index: int) -> WidthBlock:
        return width_block(model, index, () if self.skips(index) else self.units)

    @final
    def readers(self, block: Block) -> dict[WidthUnit, Linear]:
        """Return the matrices of a block that read its units, by kind; none of one that is skipped."""
        targets = self.target_linears(block.index, block.linears)
        return {kind: one for one in targets for kind in self._read_by(one)}

    @final
    def measure(self, model: Model, block: Block, seen: Seen) -> Tensor:
        """Return how far a block turns the states, if asked for, and of each kind scores and means."""
        readers, rows = self.readers(block), []
        if seen.states is not None:
            rows.append(torch.tensor([mean_distance(seen.states)], dtype=torch.float64))
        scores = self.score_units(self._known(model, block.index), readers, seen)
        for kind, linear in readers.items():
            rows.append(scores[kind].double().cpu())
            if self._adds_bias:
                rows.append(seen.of(linear).mean.double().cpu())
        return torch.cat(rows)

    @final
    def decide(self, model: Model, measured: Sequence[Tensor]) -> dict[int, Share]:
        """Return how many units of each block stay, with what the first look saw of them."""
        found = self._blocks(model)
        if not any(one.ndim for one in measured):
            return self._before(model, found)
        shares = self._goal(model, found).shares(
            found, measured, means=self._adds_bias, per_parameter=self.per_parameter
        )
        shares = self._biased(model, found, shares)
        return padded(model, found, shares) if self.native == "pad" and self.unequal else shares

    def _biased(
        self, model: Model, found: Sequence[WidthBlock], shares: dict[int, Share]
    ) -> dict[int, Share]:
        native = self.native is not None
        return with_biases(model, found, shares, native=native) if self._adds_bias else shares

    @final
    def forecast(self, model: Model) -> Forecast:
        """Return how many parameters leave, and what is left; exact where all blocks lose the same share."""
        self.check_sizes(model)
        found = self._blocks(model)
        of = sum(one.there.cost(one.costs) for one in found)
        if not self.removes_something:
            return Forecast("parameters", self.asked, 0, of, left_of(model, Outline({}), {}))
        shares = self.decide(model, [UNMEASURED] * len(found))
        keeps = [first_units(one.sizes, shares[index].stored) for index, one in enumerate(found)]
        shapes: dict[Key, tuple[int, ...]] = {}
        for index, (one, keep) in enumerate(zip(found, keeps, strict=True)):
            tensors = unit_tensors(one.prefix, one.module, one.arch, keep, names_of(model))
            shapes |= {key: tuple(value.shape) for key, value in tensors.items()}
            new = created_biases(model, one, shares[index], keep)
            shapes |= {key: (rows,) for key, (_, rows) in new.items()}
        exact = not self.unequal
        left = left_of(
            model,
            Outline(shapes),
            patch_of(model, found, keeps, shares, listed=not (exact or self.native)),
        )
        removed = sum(self._removed(one, shares[index]) for index, one in enumerate(found))
        notes = () if exact or self.native else (UNEQUAL.format(method=self.method()),)
        return Forecast("parameters", self.asked, removed if exact else None, of, left, exact, notes=notes)

    def _removed(self, known: WidthBlock, share: Share) -> int:
        return known.there.cost(known.costs) - share.stored.cost(known.costs)

    @final
    def solve_block(
        self, model: Model, block: Block, seen: Seen, leaving: Mapping[int, Share]
    ) -> tuple[dict[Key, Tensor], dict[str, Any]]:
        """Return which units of a block stay, and what makes up for the others."""
        known, share = self._known(model, block.index), leaving[block.index]
        targets = self.readers(block)
        scores = share.scores or self.score_units(known, targets, seen)
        keep, stay = (chosen_units(known.sizes, one, scores) for one in (share.stored, share.stay))
        tensors = unit_tensors(block.prefix, block.module, known.arch, keep, names_of(model))
        for kind, linear in targets.items():
            kept = known.columns(kind, stay)
            if kept is not None and (self.repair is not None or share.room):
                noted = share.means.get(kind)
                one = seen.of(linear) if noted is None else NotedMean(noted=noted)
                columns = Columns(kept, known.columns(kind, keep))
                tensors |= repaired_tensors(model, linear, columns, self.repair, one)
        for key, (dtype, rows) in created_biases(model, known, share, keep).items():
            tensors.setdefault(key, torch.zeros(rows, dtype=dtype))
        if self.keep_scores and share.measured.ndim:
            tensors[score_key(block.prefix)] = share.measured
        left = share.stay
        numbers = {"kv_groups": left.kv_groups, "heads": left.heads * left.kv_groups}
        return tensors, {"kept": numbers | {"channels": left.channels}}

    @final
    def finish(
        self, writer: PlanWriter, model: Model, leaving: Mapping[int, Share], facts: Mapping[str, Any]
    ) -> Plan:
        """Return the finished plan: the shapes of what was cut or created are promised."""
        found = self._blocks(model)
        of = sum(one.there.cost(one.costs) for one in found)
        if not leaving:
            nothing = Promises(unit="parameters", asked=self.asked, removed=0, of=of)
            return writer.finish({}, promises=nothing)
        removed = sum(self._removed(one, leaving[index]) for index, one in enumerate(found))
        keeps = [first_units(one.sizes, leaving[index].stored) for index, one in enumerate(found)]
        patch = patch_of(model, found, keeps, leaving)
        shapes = left_shapes(writer, model)
        stored = tuple(Reshaped(tensors=tuple(names), shape=shape) for shape, names in shapes.items())
        promises = Promises(unit="parameters", asked=self.asked, removed=removed, of=of, stored=stored)
        kept = [one.facts.get("kept") for one in writer.blocks]
        # Without what was measured: that is as much as the model is wide.
        known = {name: value for name, value in facts.items() if name != "measured"} | {"kept": kept}
        if leaving[0].importance is not None:
            known["importance"] = [leaving[index].importance for index in range(len(found))]
        return writer.finish(known, promises=promises, patch=patch)
