"""How much of a model's depth leaves: a share, a number, or a list of its blocks or of their parts."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Literal, Self, final

from pydantic import BeforeValidator, Field, model_validator

from structprune.decide.depth import DepthGoal, DepthKind, DepthUnit, depth_units
from structprune.decide.sparsity import fraction_of
from structprune.decide.targets import Blocks, block_numbers, check_blocks, split_words
from structprune.errors import UsageError
from structprune.models.arch import arch_of, blocks
from structprune.models.identity import skeleton
from structprune.models.streamed import Model
from structprune.pruners.structure._family import StructurePruner, check_named_once, check_untied

Kinds = Annotated[tuple[DepthKind, ...], BeforeValidator(split_words)]
NAMES: Mapping[DepthKind, str] = {"block": "blocks", "attention": "attentions", "mlp": "feed-forwards"}


class DepthGoalPruner(StructurePruner):
    """A pruner that is told how many blocks leave, or how many of their attentions or feed-forwards.

    Args:
        units: What leaves: "block"; or "attention", "mlp" or both, which then compete.
        count: How many of them leave, instead of a share of their parameters.
        drop: Blocks that leave whatever their scores, "20-24,27"; no data is looked at then.
    """

    units: Kinds = Field(default=("block",), min_length=1)
    count: Annotated[int, Field(ge=1)] | None = None
    drop: Blocks = ()
    # What is looked at is the dense model, once.
    propagate: Literal["dense"] = "dense"

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        check_named_once(self.units)
        if "block" in self.units and len(self.units) > 1:
            raise ValueError(
                "units: a block cannot leave beside its own parts; choose block, or attention and mlp"
            )
        said = [name for name in ("count", "drop") if getattr(self, name)]
        if self.sparsity != type(self).model_fields["sparsity"].default:
            said.append("sparsity")
        if len(said) > 1:
            raise ValueError(
                f"{said[0]}: given beside {said[1]}; each says how much leaves, give one of them"
            )
        return self

    @property
    @final
    def removes_something(self) -> bool:
        """Tell whether anything leaves."""
        return bool(self.sparsity or self.count or self.drop)

    @final
    def with_goal(self, goal: float | str) -> Self:
        """Return the same pruner with another sparsity.

        Raises:
            UsageError: What leaves is not said as a share.
        """
        if self.count or self.drop:
            field = "count" if self.count else "drop"
            raise UsageError(
                f"{field}: it fixes what leaves, so no other share can", hint="give the shares alone"
            )
        return super().with_goal(goal)

    @property
    @final
    def asked(self) -> float | str:
        """Return what was asked for, as people say it."""
        if self.drop:
            return f"{self.several} {','.join(self.drop)}"
        return f"{self.count} {self.several}" if self.count else self.sparsity

    @property
    @final
    def several(self) -> str:
        """Return what leaves, in words."""
        return " and ".join(NAMES[kind] for kind in self.units)

    @final
    def candidates(self, model: Model) -> list[DepthUnit]:
        """Return what may leave of a model: all but what is in skipped blocks."""
        return [one for one in self._all_units(model) if not self.skips(one.block)]

    def _all_units(self, model: Model) -> list[DepthUnit]:
        module = skeleton(model)
        arch = arch_of(module)
        return depth_units(blocks(module, arch), arch, self.units)

    def _goal(self, model: Model, units: Sequence[DepthUnit]) -> DepthGoal:
        most = min(len(units), len(self._all_units(model)) - 1)  # a model without any is none
        if self.count is not None:
            return DepthGoal(Fraction(self.count), counted=True, most=most)
        whole = sum(one.parameters for one in units)
        return DepthGoal(fraction_of(self.sparsity) * whole, counted=False, most=most)

    def _listed(self, units: Sequence[DepthUnit]) -> list[DepthUnit]:
        numbers = block_numbers(self.drop)
        return [one for one in units if one.block in numbers]

    def check_sizes(self, model: Model) -> None:
        """Check that as much can leave as was asked for.

        Raises:
            UsageError: It rounds to nothing or is more than there is, or a block is named that is not there.
        """
        self.check_skipped(len(blocks(model)))
        check_blocks("drop", self.drop, len(blocks(model)))
        units, kinds = self.candidates(model), " or ".join(self.units)
        goal, listed = self._goal(model, units), self._listed(units)
        if not self.removes_something:
            return
        for index in sorted({one.block for one in (listed if self.drop else units)}):
            check_untied(model, index)
        if missing := sorted(block_numbers(self.drop) - {one.block for one in listed}):
            raise UsageError(
                f"drop: block {missing[0]} has no {kinds} that may leave",
                hint="it is skipped, or gone already",
            )
        if goal.most < 1:
            raise UsageError(f"skip: no {kinds} may leave", hint="skip fewer blocks; one has to stay")
        asked = len(listed) if self.drop else self.count or 1
        if asked > goal.most:
            field, several = "drop" if self.drop else "count", self.several
            raise UsageError(
                f"{field}: {asked} {several} are to leave, at most {goal.most} can",
                hint="one has to stay; remove fewer, or skip fewer blocks",
            )
        if not self.drop:
            goal.check(f"sparsity: {self.sparsity} of {len(units)} {self.several}", units)
