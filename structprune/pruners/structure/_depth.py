"""What is common to pruners of depth: whole blocks leave, or their attentions and feed-forwards are skipped.

A method says which; how much is a share of the parameters, a number, or a list of blocks. Fewer blocks are a
model of the same family; skipped parts are listed block by block.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, Self, final

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from structprune.calibration.masked_loss import MaskedLoss
from structprune.calibration.statistics import NOTHING, Parts
from structprune.decide.depth import (
    DepthGoal,
    DepthKind,
    DepthUnit,
    depth_units,
    keeps_without,
    sizes_without,
)
from structprune.decide.sparsity import fraction_of
from structprune.decide.targets import Blocks, block_numbers, check_blocks, split_words
from structprune.decide.units import block_members, unit_tensors
from structprune.decide.verdicts import Verdict, Verdicts, blocks_left, gone_units
from structprune.errors import UsageError
from structprune.models.arch import Linear, arch_of, blocks
from structprune.models.edit import left_of
from structprune.models.groups import BlockKeep, block_sizes
from structprune.models.identity import names_of, skeleton
from structprune.models.native import depth_patch, sizes_patch
from structprune.models.streamed import Model
from structprune.models.tensor_edit import Outline
from structprune.models.walk import Block
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.plan.promise import Gone, Listed, Promises, Reshaped
from structprune.pruners.forecast import Forecast
from structprune.pruners.seen import Seen
from structprune.pruners.structure._bypass import biased_paths
from structprune.pruners.structure._family import StructurePruner, bias_key, check_named_once, left_shapes

Kinds = Annotated[tuple[DepthKind, ...], BeforeValidator(split_words)]
NAMES: Mapping[DepthKind, str] = {"block": "blocks", "attention": "attentions", "mlp": "feed-forwards"}


class DepthPruner(StructurePruner):
    """A pruner that removes whole blocks, or skips their attentions or feed-forwards.

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

    @abstractmethod
    def choose(
        self, units: Sequence[DepthUnit], goal: DepthGoal, measured: Sequence[Tensor], loss: MaskedLoss | None
    ) -> Verdicts:
        """Return which units leave, and what else was found of any.

        Args:
            units: Those that may leave.
            goal: How much does.
            measured: What `measure` returned of each block.
            loss: Of the model with some switched off; None where `searches` is not set.
        """

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

    @final
    def target_linears(self, index: int, found: Sequence[Linear]) -> list[Linear]:
        """Return none: what a linear reads does not tell whether its block is needed."""
        return []

    @property
    @final
    def solving(self) -> Parts:
        """Return nothing: all is decided before the first block is."""
        return NOTHING

    @property
    def _asked(self) -> float | str:
        if self.drop:
            return f"{self._several} {','.join(self.drop)}"
        return f"{self.count} {self._several}" if self.count else self.sparsity

    @property
    def _several(self) -> str:
        return " and ".join(NAMES[kind] for kind in self.units)

    def _units(self, model: Model) -> list[DepthUnit]:
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
        units, kinds = self._units(model), " or ".join(self.units)
        goal, listed = self._goal(model, units), self._listed(units)
        if not self.removes_something:
            return
        if missing := sorted(block_numbers(self.drop) - {one.block for one in listed}):
            raise UsageError(
                f"drop: block {missing[0]} has no {kinds} that may leave",
                hint="it is skipped, or gone already",
            )
        if goal.most < 1:
            raise UsageError(f"skip: no {kinds} may leave", hint="skip fewer blocks; one has to stay")
        asked = len(listed) if self.drop else self.count or 1
        if asked > goal.most:
            field, several = "drop" if self.drop else "count", self._several
            raise UsageError(
                f"{field}: {asked} {several} are to leave, at most {goal.most} can",
                hint="one has to stay; remove fewer, or skip fewer blocks",
            )
        if not self.drop:
            goal.check(f"sparsity: {self.sparsity} of {len(units)} {self._several}", units)

    @final
    def forecast(self, model: Model) -> Forecast:
        """Return how many parameters leave, and what is left; exact where all units are alike."""
        self.check_sizes(model)
        units = self._units(model)
        of = sum(one.parameters for one in units)
        if not self.removes_something:
            return Forecast("parameters", self._asked, 0, of, left_of(model, Outline({}), {}))
        goal = self._goal(model, units)
        gone = self._listed(units)
        for unit in () if self.drop else units:
            if goal.wants(gone, unit):
                gone.append(unit)
        exact = bool(self.drop) or len({one.parameters for one in units}) == 1
        shapes = {
            key: tuple(value.shape)
            for index in range(len(blocks(model)))
            for key, value in self._tensors(model, gone, index).items()
        } | self._created(model, gone)
        left = left_of(model, Outline(shapes), self._patch(model, gone))
        removed = sum(one.parameters for one in gone)
        trials = self.trials(len(units), len(gone)) if self.searches else 0
        return Forecast("parameters", self._asked, removed if exact else None, of, left, exact, trials=trials)

    def trials(self, units: int, gone: int) -> int:
        """Return how many forwards over all calibration data a search takes at most.

        Args:
            units: How many may leave.
            gone: How many do.
        """
        return sum(units - step for step in range(gone))

    @final
    def decide(self, model: Model, measured: Sequence[Tensor]) -> Verdicts:
        """Return which units leave, where nothing is tried."""
        return self._verdicts(model, measured, None)

    @final
    def search(self, model: Model, measured: Sequence[Tensor], loss: MaskedLoss) -> Verdicts:
        """Return which units leave."""
        return self._verdicts(model, measured, loss)

    def _verdicts(self, model: Model, measured: Sequence[Tensor], loss: MaskedLoss | None) -> Verdicts:
        units = self._units(model)
        if self.drop:
            return {one: Verdict(None, leaves=True) for one in self._listed(units)}
        return self.choose(units, self._goal(model, units), measured, loss)

    @final
    def solve_block(
        self, model: Model, block: Block, seen: Seen, leaving: Verdicts
    ) -> tuple[dict[Key, Tensor], dict[str, Any]]:
        """Return what of a block leaves, and what was found of it; the first block tells which ones stay."""
        found: dict[str, Any] = {
            unit.kind: {"score": verdict.score, "leaves": verdict.leaves}
            for unit, verdict in leaving.items()
            if unit.block == block.index
        }
        gone = gone_units(leaving)
        made = self.repaired(model, block) if any(unit.block == block.index for unit in gone) else {}
        return self._tensors(model, gone, block.index) | made, found

    def repaired(self, model: Model, block: Block) -> dict[Key, Tensor]:
        """Return new values that make up for what a block loses: none, unless a method has some."""
        return {}

    @property
    def biased(self) -> bool:
        """Tell whether the first linears of a feed-forward get a bias with that."""
        return False

    def _tensors(self, model: Model, gone: Sequence[DepthUnit], index: int) -> dict[Key, Tensor]:
        """Return what a plan says with the decision on one block."""
        module, names = skeleton(model), names_of(model)
        arch = arch_of(module)
        found = blocks(module, arch)
        if "block" in self.units:
            return {} if index else block_members(torch.tensor(blocks_left(gone, len(found))), found, names)
        keep = keeps_without(gone).get(index)
        return {} if keep is None else unit_tensors(*found[index], arch, keep, names)

    def _patch(self, model: Model, gone: Sequence[DepthUnit]) -> dict[str, Any]:
        module = skeleton(model)
        arch = arch_of(module)
        sizes = [block_sizes(block, arch) for _, block in blocks(module, arch)]
        if "block" in self.units:
            return depth_patch(module.config, blocks_left(gone, len(sizes)), sizes)
        keeps = keeps_without(gone)
        left = [sizes_without(one, keeps.get(index, BlockKeep())) for index, one in enumerate(sizes)]
        biases = [biased_paths(arch) if self.biased and index in keeps else [] for index in range(len(left))]
        return sizes_patch(module.config, left, biases)

    def _created(self, model: Model, gone: Sequence[DepthUnit]) -> dict[Key, tuple[int, ...]]:
        """Return the shapes of biases that a model gets."""
        module, names = skeleton(model), names_of(model)
        arch, found = arch_of(module), blocks(module)
        paths = [f"{found[unit.block][0]}.{path}" for unit in gone for path in biased_paths(arch)]
        if not self.biased:
            return {}
        return {
            bias_key(names.stored_of[f"{path}.weight"][0]): (len(module.get_parameter(f"{path}.weight")),)
            for path in paths
        }

    @final
    def finish(self, writer: PlanWriter, model: Model, leaving: Verdicts, facts: Mapping[str, Any]) -> Plan:
        """Return the finished plan: which tensors go, or how many blocks stay, is promised."""
        of, gone = sum(one.parameters for one in self._units(model)), gone_units(leaving)
        promises = Promises(unit="parameters", asked=self._asked, removed=0, of=of)
        if not gone:
            return writer.finish({}, promises=promises)
        keys = sorted(key for block in writer.blocks for key in block)
        dropped = tuple(key.name for key in keys if key.edit == "drop")
        stored = (Gone(tensors=dropped),) if dropped else ()
        depth = len(blocks(model))
        lists = (
            Listed(name=one.name, stay=depth - len(gone), of=depth) for one in keys if one.edit == "members"
        )
        shaped = (
            Reshaped(tensors=tuple(names), shape=one) for one, names in left_shapes(writer, model).items()
        )
        told = {"stored": (*stored, *lists, *shaped), "removed": sum(one.parameters for one in gone)}
        left = [{"block": one.block, "unit": one.kind, "score": leaving[one].score} for one in gone]
        return writer.finish(
            {"removed": left}, promises=promises.model_copy(update=told), patch=self._patch(model, gone)
        )
