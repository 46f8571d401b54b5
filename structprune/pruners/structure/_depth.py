"""What is common to pruners of depth: whole blocks leave, or their attentions and feed-forwards are skipped.

A method says which; how much is a share of the parameters, a number, or a list of blocks. Fewer blocks are a
model of the same family; skipped parts are listed block by block.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from structprune.calibration.masked_loss import MaskedLoss
from structprune.calibration.statistics import NOTHING, Parts
from structprune.decide.answers import check_each
from structprune.decide.depth import DepthGoal, DepthUnit, keeps_without, sizes_without
from structprune.decide.units import block_members, unit_blocks, unit_tensors
from structprune.decide.verdicts import Verdict, Verdicts, blocks_left, gone_units
from structprune.errors import QualityError
from structprune.models.arch import Arch, Linear, arch_of, blocks
from structprune.models.edit import left_of
from structprune.models.groups import BlockKeep
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
from structprune.pruners.structure._bypass import biased_paths, fit_bypass, fit_bytes
from structprune.pruners.structure._depth_goal import DepthGoalPruner
from structprune.pruners.structure._family import bias_key, left_shapes
from structprune.solvers.bypass import Bypass


class DepthPruner(DepthGoalPruner):
    """A pruner that removes whole blocks, or skips their attentions or feed-forwards."""

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
    def bypass(self) -> Bypass | None:
        """Return what makes up for attentions that leave; None where nothing does."""
        return None

    @property
    @final
    def solves_passes(self) -> bool:
        """Tell whether something makes up for what leaves."""
        return self.bypass is not None

    @final
    def solving_bytes(self, model: Model) -> int:
        """Return at most how many bytes that takes of one block."""
        return fit_bytes(model, self.bypass) if self.bypass is not None else 0

    def _biased(self, arch: Arch) -> list[str]:
        """Return the linears that get a bias with that, by their path in a block."""
        return biased_paths(arch) if self.bypass is not None and self.bypass.adapter else []

    @final
    def forecast(self, model: Model) -> Forecast:
        """Return how many parameters leave, and what is left; exact where all units are alike."""
        self.check_sizes(model)
        units = self.candidates(model)
        of = sum(one.parameters for one in units)
        if not self.removes_something:
            return Forecast("parameters", self.asked, 0, of, left_of(model, Outline({}), {}))
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
        return Forecast("parameters", self.asked, removed if exact else None, of, left, exact, trials=trials)

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
        units = self.candidates(model)
        if self.drop:
            return {one: Verdict(None, leaves=True) for one in self._listed(units)}
        return self._check_verdicts(units, self.choose(units, self._goal(model, units), measured, loss))

    def _check_verdicts(self, units: Sequence[DepthUnit], found: Verdicts) -> Verdicts:
        """Return what was found of units, each score of which is a number.

        Raises:
            MethodError: It is something else.
            QualityError: One is not; whatever was then chosen was chosen by chance.
        """
        for unit, verdict in check_each(found, Verdict, (), self.method(), "choose").items():
            if verdict.score is not None and math.isnan(verdict.score):
                raise QualityError(
                    f"{self.method()}: the score of {unit.kind} {unit.block} is NaN",
                    hint="look for NaN in what the method computes, in the weights and in the data's states",
                )
        return found

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
        tensors = self._tensors(model, gone, block.index)
        if self.bypass is not None and any(unit.block == block.index for unit in gone):
            tensors |= fit_bypass(model, block, self.bypass)
        return tensors, found

    def _tensors(self, model: Model, gone: Sequence[DepthUnit], index: int) -> dict[Key, Tensor]:
        """Return what a plan says with the decision on one block."""
        module, names = skeleton(model), names_of(model)
        found = blocks(module)
        if "block" in self.units:
            return {} if index else block_members(torch.tensor(blocks_left(gone, len(found))), found, names)
        keep = keeps_without(gone).get(index)
        return {} if keep is None else unit_tensors(unit_blocks(model)[index], keep, names)

    def _patch(self, model: Model, gone: Sequence[DepthUnit]) -> dict[str, Any]:
        module = skeleton(model)
        arch = arch_of(module)
        sizes = [one.sizes for one in unit_blocks(model)]
        if "block" in self.units:
            return depth_patch(module.config, blocks_left(gone, len(sizes)), sizes)
        keeps = keeps_without(gone)
        left = [sizes_without(one, keeps.get(index, BlockKeep())) for index, one in enumerate(sizes)]
        biases = [self._biased(arch) if index in keeps else [] for index in range(len(left))]
        return sizes_patch(module.config, left, biases)

    def _created(self, model: Model, gone: Sequence[DepthUnit]) -> dict[Key, tuple[int, ...]]:
        """Return the shapes of biases that a model gets."""
        module, names = skeleton(model), names_of(model)
        arch, found = arch_of(module), blocks(module)
        paths = [f"{found[unit.block][0]}.{path}" for unit in gone for path in self._biased(arch)]
        return {
            bias_key(names.stored_of[f"{path}.weight"][0]): (len(module.get_parameter(f"{path}.weight")),)
            for path in paths
        }

    @final
    def finish(self, writer: PlanWriter, model: Model, leaving: Verdicts, facts: Mapping[str, Any]) -> Plan:
        """Return the finished plan: which tensors go, or how many blocks stay, is promised."""
        of, gone = sum(one.parameters for one in self.candidates(model)), gone_units(leaving)
        promises = Promises(unit="parameters", asked=self.asked, removed=0, of=of)
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
