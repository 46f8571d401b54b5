"""What is common to pruners of width: key-value groups and channels leave, and the model is smaller.

A method is a score of a block's units, mostly of the columns of the matrices that read them
(`_columns.ColumnPruner`). How many units leave where (`budget`), and what makes up for them (`repair`), are
chosen beside it.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from structprune.calibration.dispatch import owners_of
from structprune.decide.answers import check_each, check_scores
from structprune.decide.budgets.sigmoid import mean_distance
from structprune.decide.unit_counts import Multiples, UnitCounts, WidthUnit
from structprune.decide.units import UnitBlock, chosen_units, first_units, unit_blocks, unit_tensors
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
from structprune.pruners.structure._family import check_untied, left_shapes
from structprune.pruners.structure._goal import score_key
from structprune.pruners.structure._side_by_side import Work, tensors_on_ranks
from structprune.pruners.structure._width_block import NotedMean, WidthBlock, width_block
from structprune.pruners.structure._width_fields import WidthFields
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
from structprune.ranks import Ranks


class WidthPruner(WidthFields):
    """A pruner that removes whole key-value groups and channels."""

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

    def _checked_units(
        self, known: WidthBlock, readers: Mapping[WidthUnit, Linear], seen: Seen
    ) -> dict[WidthUnit, Tensor]:
        whose, by = self.called(known.prefix), "score_units"
        found = check_each(self.score_units(known, readers, seen), Tensor, [*readers], whose, by)
        return {
            kind: check_scores(found[kind], (known.units(kind),), f"{whose}: {kind}", by) for kind in readers
        }

    def _goal(self, model: Model, found: Sequence[WidthBlock]) -> WidthGoal:
        """Return how much leaves of the units of a model.

        Raises:
            UsageError: What is to be left cannot be reached.
        """
        least = UnitCounts(self.kv_multiple, self.multiple)
        if self.adds_bias:
            found = with_new_biases(model, found, native=self.native is not None)
        share = self.share_of(model, found, least)
        return WidthGoal(self.asked_by, share, self.budget, Multiples(self.kv_multiple, self.multiple))

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
                check_native(model, found, self._before(model, found), self.native, bias=self.adds_bias)

    def _before(self, model: Model, found: Sequence[WidthBlock]) -> dict[int, Share]:
        return self._biased(model, found, self._goal(model, found).shares_before(found))

    def _blocks(self, model: Model) -> list[WidthBlock]:
        return [self._known(one, index) for index, one in enumerate(unit_blocks(model))]

    def _known(self, one: UnitBlock, index: int) -> WidthBlock:
        return width_block(one, () if self.skips(index) else self.units)

    @final
    def measure(self, model: Model, block: Block, seen: Seen) -> Tensor:
        """Return how far a block turns the states, if asked for, and of each kind scores and means."""
        readers, rows = self.readers(block), []
        if seen.states is not None:
            rows.append(torch.tensor([mean_distance(seen.states)], dtype=torch.float64))
        scores = self._checked_units(self._known(unit_blocks(model)[block.index], block.index), readers, seen)
        for kind, linear in readers.items():
            rows.append(scores[kind].double().cpu())
            if self.adds_bias:
                rows.append(seen.of(linear).mean.double().cpu())
        return torch.cat(rows)

    @final
    def decide(self, model: Model, measured: Sequence[Tensor]) -> dict[int, Share]:
        """Return how many units of each block stay, with what the first look saw of them."""
        found = self._blocks(model)
        if not any(one.ndim for one in measured):
            return self._before(model, found)
        shares = self._goal(model, found).shares(
            found, measured, means=self.adds_bias, per_parameter=self.per_parameter
        )
        shares = self._biased(model, found, shares)
        return padded(model, found, shares) if self.native == "pad" and self.unequal else shares

    def _biased(
        self, model: Model, found: Sequence[WidthBlock], shares: dict[int, Share]
    ) -> dict[int, Share]:
        native = self.native is not None
        return with_biases(model, found, shares, native=native) if self.adds_bias else shares

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
            tensors = unit_tensors(one, keep, names_of(model))
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
        known, share = self._known(unit_blocks(model)[block.index], block.index), leaving[block.index]
        targets = self.readers(block)
        scores = share.scores or self._checked_units(known, targets, seen)
        keep, stay = (chosen_units(known.sizes, one, scores) for one in (share.stored, share.stay))
        ranks = Ranks.here()
        owners = seen.sums.owners or owners_of([[one] for one in targets.values()], ranks, self.costs)
        work: list[Work] = []
        for kind, linear in targets.items():
            kept = known.columns(kind, stay)
            if kept is not None and (self.repair is not None or share.room):
                noted = share.means.get(kind)
                one = seen.of(linear) if noted is None else NotedMean(noted=noted)
                columns = Columns(kept, known.columns(kind, keep))
                repair = partial(repaired_tensors, model, linear, columns, self.repair, one)
                work.append((owners[linear.label], repair))
        tensors = unit_tensors(known, keep, names_of(model)) | tensors_on_ranks(work, ranks)
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
