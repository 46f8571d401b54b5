"""What may be chosen of a pruner of width, and what it must see of a model for that."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, final

from pydantic import BeforeValidator, Field, model_validator

from structprune.calibration.states import Reduce, token_cosines
from structprune.calibration.statistics import NOTHING, Parts
from structprune.decide.budgets.sigmoid import SigmoidBudget
from structprune.decide.targets import split_words
from structprune.decide.unit_counts import WidthUnit
from structprune.models.arch import Linear
from structprune.models.walk import Block
from structprune.pruners.demand import efforts_of
from structprune.pruners.structure._family import check_named_once
from structprune.pruners.structure._goal import GoalPruner
from structprune.pruners.structure._width_block import ATTENTION
from structprune.solvers.columns import AnyColumnRepair
from structprune.solvers.effort import Effort

READ: Mapping[str, Sequence[WidthUnit]] = {"heads": ATTENTION, "channels": ("channel",)}


class WidthFields(GoalPruner):
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
            named = getattr(self.budget, "name", self.budget)
            raise ValueError(f"native: uniform does not go with budget {named}; pad does")
        if self.native == "pad" and self.skip:
            raise ValueError("native: pad makes every block as wide as those that skip leaves whole")
        return self

    @property
    def needs(self) -> Parts:
        """Return what the score reads."""
        return self.parts

    @property
    @final
    def measuring(self) -> Parts:
        """Return what a budget for the whole model must see of every block first: no repair's Gram matrix."""
        return self.needs | (self._read - {"gram"}) if self.looks_first else NOTHING

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

    @property
    def _read(self) -> Parts:
        return self.needs | (NOTHING if self.repair is None else self.repair.parts)

    @property
    @final
    def adds_bias(self) -> bool:
        """Tell whether matrices that lose columns get a bias."""
        return self.repair is not None and bool(self.repair.adds_bias)

    @final
    def target_linears(self, index: int, found: Sequence[Linear]) -> list[Linear]:
        """Return the matrices of block `index` that read units which may leave."""
        if self.skips(index):
            return []
        return [linear for linear in found if self._read_by(linear)]

    @final
    def efforts(self, groups: Sequence[Sequence[Linear]]) -> list[Effort]:
        """Return what the repairs of a block take; beside them, ranking its units takes next to nothing."""
        return efforts_of(groups, [] if self.repair is None else [self.repair.effort])

    def _read_by(self, linear: Linear) -> list[WidthUnit]:
        """Return the kind of unit that a matrix reads and that may leave, or none."""
        return [kind for kind in READ.get(linear.reads, ()) if kind in self.units]

    @final
    def readers(self, block: Block) -> dict[WidthUnit, Linear]:
        """Return the matrices of a block that read its units, by kind; none of one that is skipped."""
        targets = self.target_linears(block.index, block.linears)
        return {kind: one for one in targets for kind in self._read_by(one)}
