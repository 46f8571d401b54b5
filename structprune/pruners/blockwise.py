"""Measure, decide, solve: the walks of every pruner that decides block by block, and how they resume.

Up to three walks over the model: one dense walk for what the budget measures, one backward for gradients, and
one on which every block is solved, written, and only then passed. Each leaves one durable file per block: a
run that was killed goes on after its last whole block. What depends on a family are the hooks; none walks.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, final

from torch import Tensor

from structprune.calibration.collect import BlockSums, collect_inputs
from structprune.calibration.masked_loss import MaskedLoss
from structprune.calibration.notebook import Notebook
from structprune.calibration.states import noted_states
from structprune.calibration.statistics import gradient_means, input_parts
from structprune.errors import MethodError
from structprune.models import edit
from structprune.models.arch import blocks
from structprune.models.backward import backward
from structprune.models.gradients import GradientMeans
from structprune.models.identity import names_of, weights_of
from structprune.models.rank_batches import RankBatches
from structprune.models.streamed import Batch, Model
from structprune.models.walk import Block, Walk, walk_weights
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.pruners.looking import LookingPruner
from structprune.pruners.seen import UNMEASURED, Seen
from structprune.ranks import Ranks

# What a family's budget decided: the frame hands it on to the family's own hooks and looks at none of it.
Leaving = Mapping[Any, Any]


class BlockwisePruner(LookingPruner):
    """A pruner that decides block by block, from what it looks at."""

    def reduce_gradients(
        self, model: Model, block: Block, found: Mapping[str, GradientMeans]
    ) -> dict[str, Tensor]:
        """Return what is noted of the gradients of a block: of every target the mean that is read, by label.

        Args:
            model: The dense model.
            block: Its parameters are in memory.
            found: Gradients of all its linears, by label.
        """
        means = gradient_means(self.solving | self.measuring)
        if len(means) > 1:
            raise MethodError(
                f"{self.method()}: parts: {len(means)} means of the gradient, and `seen.gradient` is one",
                hint="declare one of them, or write reduce_gradients()",
            )
        (mean,) = means
        targets = self.target_linears(block.index, block.linears)
        return {one.label: getattr(found[one.label], mean) for one in targets}

    def measure(self, model: Model, block: Block, seen: Seen) -> Tensor:
        """Return what the decision needs of a block that has targets, or whose states are watched.

        Args:
            model: The dense model.
            block: Its parameters are in memory.
            seen: What `machine_rates` and `watching` ask for.
        """
        return UNMEASURED

    @abstractmethod
    def decide(self, model: Model, measured: Sequence[Tensor]) -> Leaving:
        """Return what leaves: of every matrix by its label, or of every block by its index.

        Args:
            model: For shapes; its weights may not be in memory.
            measured: What `measure` returned of each block; `UNMEASURED` where there was nothing to measure.
        """

    def search(self, model: Model, measured: Sequence[Tensor], loss: MaskedLoss) -> Leaving:
        """Return what leaves, as `decide` does, for those that try it out.

        Args:
            model: The dense model.
            measured: What `measure` returned of each block.
            loss: Of the model with units switched off, on the calibration data.
        """
        return self.decide(model, measured)

    @abstractmethod
    def solve_block(
        self, model: Model, block: Block, seen: Seen, leaving: Leaving
    ) -> tuple[dict[Key, Tensor], dict[str, Any]]:
        """Return what is decided on a block: tensors for the plan, and facts.

        Args:
            model: The dense model.
            block: Its parameters are in memory.
            seen: What `solving` asks for.
            leaving: What `decide` returned.
        """

    @abstractmethod
    def check_sizes(self, model: Model) -> None:
        """Check every size rule.

        Raises:
            UsageError: The model's shapes cannot carry what the fields ask for; names the tensor.
        """

    @property
    @abstractmethod
    def removes_something(self) -> bool:
        """Tell whether anything leaves; else the plan is empty and nothing is looked at."""

    @abstractmethod
    def finish(self, writer: PlanWriter, model: Model, leaving: Leaving, facts: Mapping[str, Any]) -> Plan:
        """Return the finished plan, with its promises.

        Args:
            writer: Holds every block's decision.
            model: The dense model.
            leaving: What `decide` returned; empty where nothing leaves.
            facts: What was measured.
        """

    @final
    def calibrate(self, model: Model, batches: Sequence[Batch], plan: PlanWriter | None = None) -> Plan:
        """Measure where the decision needs the whole model, then decide block by block."""
        writer = plan or self.writer(None, model, weights_of(model))
        return self.calibrate_each(model, batches, [(self, writer)])[0]

    @final
    def calibrate_each(
        self, model: Model, batches: Sequence[Batch], wanted: Sequence[tuple[Self, PlanWriter]]
    ) -> list[Plan]:
        """Decide for several goals with one look at the model.

        Args:
            model: The dense model.
            batches: Calibration data.
            wanted: Pruners that differ from this one only in the goal, each with its plan's writer; more than
                one only where `one_look` says so.
        """
        for pruner, _ in wanted:
            pruner.check_sizes(model)
        going = [pair for pair in wanted if pair[0].removes_something]
        leaving, facts = self._solve_all(model, batches, going) if going else ([], {})
        by_writer = dict(zip([id(writer) for _, writer in going], leaving, strict=True))
        return [
            pruner.finish(writer, model, by_writer.get(id(writer), {}), facts if pruner.measuring else {})
            for pruner, writer in wanted
        ]

    def _solve_all(
        self, model: Model, batches: Sequence[Batch], going: Sequence[tuple[Self, PlanWriter]]
    ) -> tuple[list[Leaving], dict[str, Any]]:
        """Solve every block for every goal; return how much leaves for each goal, and what was measured."""
        first = going[0][1]
        samples = sum(len(batch["input_ids"]) for batch in batches)
        batches = RankBatches(batches, Ranks.here())
        with (
            Notebook(first.folder, "gradients") as gradients,
            Notebook(first.folder, "budget") as noted,
            Notebook(first.folder, "loss") as tried,
        ):
            self._measure_gradients(model, batches, gradients, first.folder)
            measured = self._measure_blocks(model, batches, noted, gradients, samples)
            loss = MaskedLoss(model, batches, tried)
            leaving = [pruner.search(model, measured, loss) for pruner, _ in going]
            # Whoever is furthest behind is walked for; the others skip what they have.
            behind = min((writer for _, writer in going), key=lambda writer: writer.finished)
            for block, sums in self._walk(model, batches, behind):
                seen = Seen(sums, gradients.read(block.index), samples)
                for (pruner, writer), share in zip(going, leaving, strict=True):
                    if block.index >= writer.finished:
                        writer.write(*pruner.solve_block(model, block, seen, share))
        return leaving, {"measured": [one.tolist() for one in measured]} if self.measuring else {}

    def _measure_gradients(
        self, model: Model, batches: Sequence[Batch], notes: Notebook, spill: Path | None
    ) -> None:
        """Walk backward through the dense model and note what is read of the gradients.

        Gradients of an interrupted run are made again, unless it noted them all: the walk starts at the end.
        """
        means = gradient_means(self.solving | self.measuring)
        if not means or all(notes.has(index) for index in range(len(blocks(model)))):
            return
        for block, found in backward(model, batches, means=means, folder=spill):
            notes.write(block.index, self.reduce_gradients(model, block, found))

    def _measure_blocks(
        self,
        model: Model,
        batches: RankBatches,
        notes: Notebook,
        gradients: Notebook,
        samples: int,
    ) -> list[Tensor]:
        """Walk through the dense model and return what the decision needs of each block."""
        if not self.looks_first:
            return [UNMEASURED] * len(blocks(model))
        found: list[Tensor] = []
        parts = input_parts(self.measuring)
        walks = parts or self.watching is not None or self.measures_passes
        for block in Walk(model, batches) if walks else walk_weights(model, 0):
            targets = self.target_linears(block.index, block.linears)
            fresh = not notes.has(block.index)
            if fresh and self.measures_passes:
                notes.write(block.index, {"measured": self.measure(model, block, Seen(samples=samples))})
                block.advance()
            elif fresh and (targets or self.watching):
                with noted_states(block, self.watching) as states:
                    sums = collect_inputs(block, targets, parts, advance=True) if walks else BlockSums()
                seen = Seen(sums, gradients.read(block.index), samples, states.joined(batches.ranks))
                notes.write(block.index, {"measured": self.measure(model, block, seen)})
            elif walks:
                block.advance()
            noted = notes.read(block.index)
            found.append(noted["measured"] if noted else UNMEASURED)
        return found

    def _walk(
        self, model: Model, batches: Sequence[Batch], writer: PlanWriter
    ) -> Iterator[tuple[Block, BlockSums]]:
        """Yield every undecided block with its statistics, and advance through it once it is decided."""
        parts, dense = input_parts(self.solving), self.propagate == "dense"
        if not (parts or self.solves_passes):
            yield from ((block, BlockSums()) for block in walk_weights(model, writer.finished))
            return
        last = len(blocks(model)) - 1
        for block in Walk(model, batches):
            if block.index >= writer.finished and self.solves_passes:
                yield block, BlockSums()
            elif block.index >= writer.finished:
                targets = self.target_linears(block.index, block.linears)
                # Dense outputs do not wait for the decision: one forward collects and advances.
                yield block, collect_inputs(block, targets, parts, advance=dense, weigh=self.costs)
                if dense:
                    continue
            if block.index < last:
                if dense:
                    block.advance()
                    continue
                # Also on resuming: what was decided is carried out again, no activation is ever stored.
                decided = writer.blocks[block.index]
                with edit.temporarily(block.module, block.prefix, decided, names_of(model)):
                    block.advance()
                decided.release()
