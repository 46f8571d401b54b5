"""The weight family: a score per weight decides which weights become zero; shapes stay as they are."""

import logging
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from structprune.calibration.statistics import Statistic
from structprune.decide.budget import removed_count, removed_weights
from structprune.decide.select import groups, matrix, rows
from structprune.decide.sparsity import Sparsity, fraction_of, pattern_of
from structprune.errors import QualityError, UsageError
from structprune.models import edit
from structprune.models.arch import Linear, arch_of, blocks, linears
from structprune.models.identity import names_of, skeleton, stored_names, weights_of
from structprune.models.streamed import Batch, Model
from structprune.models.walk import Block, Walk, resident
from structprune.plan import Plan, PlanWriter
from structprune.pruner import Pruner
from structprune.storage.names import Names

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def _block_ranges(value: object) -> object:
    """Read "0-3,28" or [0, "2-3"] as block ranges; every part becomes text."""
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, int) and not isinstance(parts, bool):
        parts = [parts]
    if not isinstance(parts, list | tuple):
        return value
    texts = [str(part).strip() for part in parts]
    for text in texts:
        match = _RANGE.fullmatch(text)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"block range {text!r}: write a block number or a range such as '0-3'")
    return tuple(texts)


def _patterns(value: object) -> object:
    """Read one pattern or several; each must be a regular expression."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    for part in parts:
        try:
            re.compile(part)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern {part!r}: {error}") from None
    return tuple(parts)


Measured = tuple[Block, Mapping[str, Statistic]]
Blocks = Annotated[tuple[str, ...], BeforeValidator(_block_ranges)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]


class WeightPruner(Pruner):
    """A pruner that gives every weight a score and removes the lowest.

    Args:
        sparsity: Fraction of weights removed, in [0, 1), or "N:M" (N of every M consecutive inputs kept).
        compare: Which weights compete for an unstructured sparsity: those of a row, or of the whole matrix.
        skip: Blocks left dense: numbers and ranges, "0-3,28".
        include: Regular expressions searched in a linear's name; only matching linears are pruned.
        exclude: Regular expressions searched in a linear's name; matching linears are left dense.
        propagate: Whether later blocks see the outputs of pruned or of dense blocks.
    """

    sparsity: Sparsity = 0.5
    compare: Literal["row", "matrix"] = "row"
    skip: Blocks = Field(default=())
    include: Patterns = Field(default=())
    exclude: Patterns = Field(default=())
    propagate: Literal["pruned", "dense"] = "pruned"

    statistic: ClassVar[type[Statistic] | None] = None

    @abstractmethod
    def score(self, weight: Tensor, stat: Any) -> Tensor:
        """Return the importance of each weight, shape [out, in], float32; a higher score is kept.

        Args:
            weight: Shape [out, in], in the model's dtype.
            stat: What `statistic` remembers of the linear's input, or None when the method needs no data.
        """

    @final
    def chosen(self, index: int, found: Sequence[Linear]) -> list[Linear]:
        """Return the linears of block `index` that are to be pruned."""
        for text in self.skip:
            match = _RANGE.fullmatch(text)
            assert match is not None
            if int(match[1]) <= index <= int(match[2] or match[1]):
                return []
        return [
            linear
            for linear in found
            if (not self.include or any(re.search(pattern, linear.label) for pattern in self.include))
            and not any(re.search(pattern, linear.label) for pattern in self.exclude)
        ]

    @final
    def all_chosen(self, model: Model) -> list[Linear]:
        """Return the linears of all blocks that are to be pruned."""
        arch = arch_of(skeleton(model))
        return [
            linear
            for index, (prefix, block) in enumerate(blocks(model, arch))
            for linear in self.chosen(index, linears(prefix, block, arch))
        ]

    @property
    @final
    def asked(self) -> float | str:
        """Return the sparsity field."""
        return self.sparsity

    @final
    def removals(self, model: Model) -> dict[str, tuple[int, int]]:
        """Return how many weights of each chosen linear leave, after rounding down in every row or matrix."""
        found = {}
        for linear in self.all_chosen(model):
            out, inputs = linear.weight.shape
            found[linear.label] = removed_weights((out, inputs), self.sparsity, self.compare), out * inputs
        return found

    @final
    def check(self, model: Model) -> None:
        """Check that some linear is chosen and that every chosen one can carry the N:M pattern."""
        chosen = self.all_chosen(model)
        if not chosen:
            raise UsageError("skip, include and exclude leave no linear to prune")
        pattern = pattern_of(self.sparsity)
        for linear in chosen:
            width = linear.weight.shape[1]
            if pattern and width % pattern[1]:
                raise UsageError(
                    f"{linear.label}: {width} inputs are not divisible by {pattern[1]} (for {self.sparsity})",
                    hint="exclude it with --exclude, or choose another pattern",
                )

    @final
    def calibrate(self, model: Model, batches: Sequence[Batch], plan: PlanWriter | None = None) -> Plan:
        """Pick masks block by block; see `Pruner.calibrate`."""
        self.check(model)
        names = names_of(model)
        writer = plan or self.writer(None, model, weights_of(model))
        facts = {"prunable": stored_names(names, self.all_chosen(model))}
        if fraction_of(self.sparsity) == 0:
            return writer.finish(facts)
        walk = (
            self._walk_data(model, batches, writer) if self.needs_data else self._walk_weights(model, writer)
        )
        for block, statistics in walk:
            writer.write(*self._solve(block, statistics, names))
        return writer.finish(facts)

    def _walk_weights(self, model: Model, writer: PlanWriter) -> Iterator[Measured]:
        arch = arch_of(skeleton(model))
        for index, (prefix, module) in enumerate(blocks(model)):
            if index >= writer.finished:
                with resident(model, prefix):
                    yield Block(index, prefix, module, linears(prefix, module, arch)), {}

    def _walk_data(self, model: Model, batches: Sequence[Batch], writer: PlanWriter) -> Iterator[Measured]:
        """Yield every undecided block with its statistics, and advance through it once it is decided."""
        last = len(blocks(model)) - 1
        for block in Walk(model, batches):
            dense = self.propagate == "dense"
            if block.index >= writer.finished:
                yield block, self._measure(block, advance=dense)
                if dense:
                    continue
            if block.index < last:
                plan = {} if dense else writer.blocks[block.index]
                with edit.temporarily(block.prefix, block.module, plan, names_of(model)):
                    block.advance()

    def _measure(self, block: Block, *, advance: bool) -> dict[str, Statistic]:
        """Collect one statistic per distinct input, by the label of each chosen linear that reads it."""
        assert self.statistic is not None
        make = self.statistic
        statistics: dict[str, Statistic] = {}
        fed: dict[str, Statistic] = {}  # the linears whose turn it is to add what they read
        previous: list[tuple[Tensor, Statistic]] = []

        def observe(linear: Linear, inputs: Tensor) -> None:
            if linear.label not in statistics:
                if previous and previous[0][0] is inputs:
                    statistics[linear.label] = previous[0][1]
                    return
                statistics[linear.label] = fed[linear.label] = make(inputs.shape[-1], inputs.device)
                previous[:] = [(inputs, statistics[linear.label])]
            if linear.label in fed:
                fed[linear.label].add(inputs)

        block.observe(observe, self.chosen(block.index, block.linears), advance=advance)
        return statistics

    def _solve(
        self, block: Block, statistics: Mapping[str, Statistic], names: Names
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a block's masks by plan key, and what there is to report."""
        masks: dict[str, Tensor] = {}
        removed: dict[str, int] = {}
        unseen: list[str] = []
        for linear in self.chosen(block.index, block.linears):
            stat = statistics.get(linear.label)
            if stat is not None and stat.tokens == 0:
                logger.warning("%s: no calibration token reached it; its inputs count equally", linear.label)
                unseen.append(linear.label)
            mask = self._select(self.score(linear.weight, stat), linear.label)
            removed[linear.label] = int(mask.numel() - mask.sum())
            if linear.name not in masks:
                shape = linear.module.get_parameter(linear.parameter).shape
                masks[linear.name] = torch.ones(shape, dtype=torch.bool, device=mask.device)
            linear.view(masks[linear.name]).copy_(mask)
        plan = {
            f"{name}:mask": part
            for key, mask in masks.items()
            for name, part in names.to_stored({key: mask}).items()
            if not bool(part.all())
        }
        return plan, {"removed": removed} | ({"unseen": unseen} if unseen else {})

    def _select(self, score: Tensor, label: str) -> Tensor:
        pattern = pattern_of(self.sparsity)
        try:
            if pattern:
                return groups(score, *pattern)
            pick = rows if self.compare == "row" else matrix
            total = score.shape[1] if self.compare == "row" else score.numel()
            return pick(score, removed_count(total, self.sparsity))
        except QualityError as error:
            raise QualityError(
                f"{label}: {error.message}", hint="the weights or the activations overflowed"
            ) from None
