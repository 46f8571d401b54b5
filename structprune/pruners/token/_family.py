"""Pruners that let a model compute fewer visual tokens: the saving exists while structprune runs it.

A plan says of each block how many tokens of an image are left from there on; which ones is chosen anew for
every image, by the method, while the model runs.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import ClassVar, Literal, Self, final

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from structprune.calibration.notebook import Look, Notebook
from structprune.decide.token_target import Target, counts_at, rounded_up
from structprune.errors import UsageError
from structprune.models.arch import block_prefixes
from structprune.models.edit import left_of
from structprune.models.identity import applied, architecture_of, weights_of
from structprune.models.streamed import Batch, Model, StreamedModel
from structprune.models.tensor_edit import Outline
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.pruners.forecast import Forecast
from structprune.pruners.pruner import Pruner
from structprune.pruners.token._account import TYPICAL_SIZE, UNIT, Account
from structprune.pruners.token._plan import check_tokens, counts_of, said_of
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.runtime.flops import BlockCost, image_tokens, rows_operations, tower_counts
from structprune.runtime.refusals import check_runs, has_several_axes
from structprune.runtime.view import View

logger = logging.getLogger(__name__)


class TokenPruner(Pruner):
    """A pruner of visual tokens at run time.

    Args:
        target: How much is left: one of `keep_ratio`, `tokens`, `avg_tokens`, `visual_flops`.
        positions: Whether tokens keep the positions they had, or are counted anew; as in the paper unless
            given, and kept where positions have several axes.
        newlines: Whether tokens that only end a line of an image may be dropped, where a model has any.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.25))
    positions: Literal["keep", "compact"] | None = None
    newlines: Literal["protect", "compete"] = "compete"

    at_run_time: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    within: ClassVar[bool] = False
    tower_layers: ClassVar[tuple[float, ...]] = ()
    paper_positions: ClassVar[Literal["keep", "compact"]] = "keep"

    @abstractmethod
    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return which tokens of each image stay.

        Args:
            seen: The images, side by side.
            keep: How many tokens of each shall stay, shape [images].

        Returns:
            Bool, shape [images, tokens].
        """

    def merge(self, seen: View, chosen: Tensor) -> Tensor | None:
        """Return what goes into the tokens that stay, as `Chooser.merge` does; None: only themselves."""
        return None

    @property
    def usual_positions(self) -> Literal["keep", "compact"]:
        """Return what becomes of positions unless `positions` says it."""
        return self.paper_positions

    @property
    def at_most(self) -> bool:
        """Tell whether the target is the most that is left, and how much of it the image decides."""
        return False

    def watch(self, seen: View) -> None:
        """Note in `seen.notes` what a later stage asks for, as `Chooser.watch` does."""

    def start(self, blocks: int) -> int:
        """Return the number of the block before which tokens are dropped, of so many; 0: at the embeddings.

        Raises:
            UsageError: The model has no such block.
        """
        return 0

    def stages(self, blocks: int) -> dict[int, float]:
        """Return before which blocks, of so many, tokens are dropped, and how far.

        Returns:
            Number of the block, ascending -> the power of the share that is left at the end which is left
            from there on; 1 at the last.

        Raises:
            UsageError: The model has no such block.
        """
        return {self.start(blocks): 1.0}

    def watched(self, blocks: int) -> Iterable[int]:
        """Return the blocks, of so many, before which `watch` is called."""
        return ()

    def with_goal(self, goal: float | str) -> Self:
        """Return the same pruner with another value of the same target.

        Raises:
            UsageError: It cannot be this one.
        """
        return self.with_field("target", {self.target.name: goal})

    @property
    def keeps_all(self) -> bool:
        """Tell whether the target is all there is."""
        return self.target.name in ("keep_ratio", "visual_flops") and self.target.value == 1

    def counts(self, model: Model, size: int) -> list[tuple[int, int]]:
        """Return of every block how many tokens of an image its attention and its feed-forward compute.

        Args:
            model: For its sizes.
            size: Tokens of the image.
        """
        blocks = len(block_prefixes(model))
        cost = BlockCost.of(model.config).operations
        return [(left, left) for left in counts_at(self.target, size, self.stages(blocks), blocks, cost)]

    def seen_by_tower(self, config: PreTrainedConfig, size: int, left: int) -> list[tuple[int, int]]:
        """Return what each layer of the tower computes, of size patches, where so many tokens are left."""
        return tower_counts(config, size)

    def chosen_in_tower(self, config: PreTrainedConfig, size: int, left: int) -> int:
        """Return the operations that choosing costs in the vision tower, by the same."""
        return rows_operations(config, size, len(self.tower_layers))

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return the operations that choosing itself costs of an image, text left out.

        Args:
            cost: Sizes of a block.
            size: Tokens of the image.
            counts: Of every block how many of them its attention and its feed-forward compute.
        """
        return 0

    def facts(self, model: PreTrainedModel) -> dict[str, str]:
        """Return what a plan says beside how much is left: what the method has to look at on a model."""
        return {}

    def forecast(self, model: Model) -> Forecast:
        """Return how many pairs of a visual token and a block are not computed.

        Raises:
            UsageError: The model reads no images, or cannot run with fewer tokens; or the target cannot be
                reached.
        """
        skeleton = model.skeleton if isinstance(model, StreamedModel) else model
        check_runs(skeleton, self.tower_layers)
        if self.positions == "compact" and has_several_axes(model.config):
            raise UsageError(
                f"positions: compact on a {model.config.model_type}, whose positions have several axes",
                hint="positions: keep",
            )
        self.stages(len(block_prefixes(model)))
        size = image_tokens(model.config)
        left = left_of(model, Outline({}), {})
        counts = self.counts(model, size) if size else self._counted(model, self.tokens(model), TYPICAL_SIZE)
        account = self._account(model, counts, size or TYPICAL_SIZE)
        notes = account.notes(self.method())
        if size is None:
            return Forecast(UNIT, str(self.target), None, 0, left, notes=notes)
        return Forecast(UNIT, str(self.target), account.gone, account.pairs, left, notes=notes)

    def _account(self, model: Model, counts: Sequence[tuple[int, int]], size: int) -> Account:
        left, spent, cost, config = counts[-1][1], 0, BlockCost.of(model.config), model.config
        # Where all tokens stay, nobody chooses.
        if left < size:
            spent = self.operations(cost, size, counts) + self.chosen_in_tower(config, size, left)
        seen = self.seen_by_tower(config, size, left) if image_tokens(config) else []
        return Account(config, size, counts, seen, spent)

    def reach(self, model: Model) -> str:
        """Return which shares can be kept."""
        size = image_tokens(model.config)
        if size is None:
            return "keep_ratio up to 1 of the visual tokens of an image, whose number depends on the image"
        return f"keep_ratio {rounded_up(Fraction(1, size)):g} to 1 of the {size} visual tokens of an image"

    def tokens(self, model: Model) -> dict[int, Tensor]:
        """Return of the blocks before which tokens are dropped how many are left, as `said_of` says it.

        Raises:
            UsageError: How many tokens an image has must be known for that, and depends on the image.
        """
        stages, value = self.stages(len(block_prefixes(model))), self.target.value
        if self.target.name in ("tokens", "keep_ratio"):
            return {block: said_of(value, power) for block, power in stages.items()}
        size = image_tokens(model.config)
        if size is None:
            raise UsageError(
                f"target: {self.target}: how many tokens an image has depends on the image here",
                hint="ask for keep_ratio or tokens",
            )
        counts = self.counts(model, size)
        return {block: said_of(counts[block][1] / size) for block in stages}

    def decide(self, model: Model, batches: Sequence[Batch], look: Look) -> dict[int, Tensor]:
        """Return of the blocks where tokens are dropped how many are left, as a plan says it.

        Args:
            model: In memory.
            batches: Calibration data.
            look: What an interrupted run saw of them, and who is told what is seen.
        """
        return self.tokens(model)

    def rules(self, notes: Notebook) -> dict[int, Tensor]:
        """Return of blocks where tokens are dropped what else `decide` found, from what it noted."""
        return {}

    @final
    def calibrate(self, model: Model, batches: Sequence[Batch], plan: PlanWriter | None = None) -> Plan:
        """Decide how many tokens are left where; the model stays as it is.

        Raises:
            UsageError: As for `forecast`; or the model is streamed.
        """
        self.forecast(model)
        whole = self._in_memory(model)
        writer = plan or self.writer(None, model, weights_of(model))
        found = self._decided(model, batches, writer)
        if not found:
            return writer.finish({})
        size = image_tokens(model.config)
        counts = self._counted(model, found, size or TYPICAL_SIZE)
        account = self._account(model, counts, size or TYPICAL_SIZE)
        for note in account.notes(self.method()):
            logger.warning("%s", note)
        facts = account.facts() | self.facts(whole)
        if size is None:
            return writer.finish({"unit": UNIT, "asked": str(self.target), **facts})
        promises = account.promises(block_prefixes(model), str(self.target), at_most=self.at_most)
        return writer.finish(facts, promises=promises)

    def _decided(self, model: Model, batches: Sequence[Batch], writer: PlanWriter) -> dict[int, Tensor]:
        """Return what was decided of which block; all of it is written."""
        paths = block_prefixes(model)
        if writer.finished == len(paths):
            blocks = enumerate(writer.blocks)
            return {n: block[key] for n, block in blocks for key in block if key.kind == "tokens"}
        # What was seen is forgotten once every block is written.
        with Notebook(writer.folder, "fit") as notes:
            found = {} if self.keeps_all else self.decide(model, batches, Look(notes, writer.measured))
            every = {"tokens": found, "rule": self.rules(notes) if found else {}}
            for index, path in enumerate(paths[writer.finished :], start=writer.finished):
                writer.write({Key(path, kind): one[index] for kind, one in every.items() if index in one}, {})
        return found

    def _counted(self, model: Model, found: dict[int, Tensor], size: int) -> list[tuple[int, int]]:
        return counts_of(found, len(block_prefixes(model)), size, within=self.within)

    def _in_memory(self, model: Model) -> PreTrainedModel:
        """Return a model that is in memory as a whole.

        Raises:
            UsageError: It is streamed.
        """
        if isinstance(model, StreamedModel):
            raise UsageError(
                f"{self.method()} works while a model runs, and a streamed one is never whole",
                hint="leave --stream out",
            )
        return model

    def drops(self, plan: Plan, model: Model) -> list[Drop]:
        """Return what the engine carries out on a model.

        Raises:
            InputError: The plan names a block that the model does not have, or leaves what no image can have.
        """
        check_tokens(plan, block_prefixes(model))
        compact = (self.positions or self.usual_positions) == "compact" and not has_several_axes(model.config)
        numbered = {int(key.name.rpartition(".")[2]): plan[key] for key in plan if key.kind == "tokens"}
        # First, so that a stage knows what is noted where it drops.
        watched = self.watched(len(block_prefixes(model))) if numbered else ()
        return [Drop(one, False, None, self, watches=True) for one in watched] + [
            Drop(one, self.within, left, self, compact, self.at_most)
            for one, left in sorted(numbered.items())
        ]

    def apply(self, model: Model, plan: Plan) -> Model:
        """Let a model run with fewer tokens; returns the same model. Its parameters stay as they are.

        Raises:
            InputError: The plan belongs to another architecture, or says what no model can do.
            UsageError: The model is streamed, so it cannot run as a whole.
        """
        whole = self._in_memory(model)
        fits = plan.architecture == architecture_of(whole)
        drops = self.drops(plan, whole) if fits else []
        # Nothing stored is edited: the plan is held against the architecture and noted like any other.
        super().apply(whole, plan)
        if drops:
            attach(whole, plan.id, drops)
        return model

    def undo(self, model: Model, plan: Plan) -> None:
        """Let a model run with all tokens again, as far as this plan is concerned."""
        detach(self._in_memory(model), plan.id)
        if plan.id in applied(model):
            applied(model).remove(plan.id)
