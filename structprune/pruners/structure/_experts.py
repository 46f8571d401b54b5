"""What is common to pruners of experts: some of a mixture's leave, and its router no longer knows them.

A method is a score of the experts of a block. The weights with which a router adds up experts are made anew
among those that stay, by the family's own rule: its softmax has fewer terms.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from structprune.calibration.routing import RoutingSums
from structprune.calibration.statistics import NOTHING, Parts, Statistics
from structprune.decide.answers import check_scores
from structprune.decide.units import highest, sizes_left, unit_tensors
from structprune.errors import UsageError
from structprune.models.arch import Linear, blocks
from structprune.models.edit import left_of
from structprune.models.groups import BlockKeep
from structprune.models.identity import names_of, skeleton
from structprune.models.native import sizes_patch
from structprune.models.streamed import Model
from structprune.models.tensor_edit import Outline
from structprune.models.walk import Block
from structprune.plan.key import Key
from structprune.plan.plan import Plan, PlanWriter
from structprune.plan.promise import Promises, Reshaped
from structprune.pruners.forecast import Forecast, WholeUnits
from structprune.pruners.kept_scores import check_kept_scores
from structprune.pruners.seen import UNMEASURED, Seen
from structprune.pruners.structure._experts_block import (
    ExpertBlock,
    check_share,
    expert_blocks,
    global_stay,
    uniform_stay,
    whole_experts,
)
from structprune.pruners.structure._family import StructurePruner, check_untied, left_lists, left_shapes

# What may differ between the run that kept the scores and the one that uses them: no score depends on it.
FREE = frozenset({"sparsity", "keep_scores", "budget"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertShare:
    """What the budget decided on a block.

    Attributes:
        stay: How many of its experts stay.
        scores: Of its experts, shape [experts], where a first look has them.
        routed: What that look saw.
    """

    stay: int
    scores: Tensor | None = None
    routed: RoutingSums | None = None


class ExpertPruner(StructurePruner):
    """A pruner that removes whole experts.

    Args:
        budget: "uniform": every block keeps the same number, so that the family's own configuration can say
            it; "global": all experts of the model compete.
        keep_scores: Keep the scores in the plan, so that another sparsity, or another model of the same
            architecture, needs no calibration.
    """

    budget: Literal["uniform", "global"] = "uniform"
    keep_scores: bool = False
    propagate: Literal["pruned", "dense"] = "dense"

    # Whether data is looked at depends on the score.
    needs_data: ClassVar[bool] = False
    scores_travel: ClassVar[bool] = True

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """Return what the score reads of a mixture."""

    @abstractmethod
    def score_experts(self, index: int, experts: int, seen: Statistics) -> Tensor:
        """Return the importance of each expert of a block, shape [experts], float32; a higher one stays.

        Args:
            index: The block's.
            experts: How many it has.
            seen: Holds the parts that the score declares.
        """

    @property
    @final
    def measuring(self) -> Parts:
        """Return what a budget for the whole model must see of every block first."""
        return self.parts if self.budget == "global" else NOTHING

    @property
    @final
    def solving(self) -> Parts:
        """Return what is seen block by block."""
        return self.parts if self.budget == "uniform" else NOTHING

    @final
    def target_linears(self, index: int, found: Sequence[Linear]) -> list[Linear]:
        """Return the experts of block `index` that may leave, by the matrix that each of them reads."""
        experts = [one for one in found if one.expert is not None and not self.skips(index)]
        return [one for one in experts if one.parameter == experts[0].parameter]

    @final
    def check_sizes(self, model: Model) -> None:
        """Check that the family is known, and that the share can leave.

        Raises:
            UsageError: It cannot.
        """
        self.check_skipped(len(blocks(model)))
        found = self._blocks(model)
        check_share(found, self.sparsity, pooled=self.budget == "global")
        for index, one in enumerate(found):
            if one.experts:
                check_untied(model, index)

    @final
    def whole_units(self, model: Model) -> WholeUnits:
        """Return how many experts can leave, of a block or of the model."""
        return whole_experts(self._blocks(model), pooled=self.budget == "global")

    def _blocks(self, model: Model) -> list[ExpertBlock]:
        return expert_blocks(model, [self.skips(index) for index in range(len(blocks(model)))])

    @final
    def measure(self, model: Model, block: Block, seen: Seen) -> Tensor:
        """Return how many tokens reached each expert, and what those contributed, shape [2, experts]."""
        routed = seen.sums.routing
        assert routed is not None
        return torch.stack([routed.tokens, routed.contributions])

    @final
    def decide(self, model: Model, measured: Sequence[Tensor]) -> dict[int, ExpertShare]:
        """Return how many experts of each block stay, with what the first look saw of them."""
        found = self._blocks(model)
        # Before anything is seen, blocks that compete are taken to lose the same.
        if self.budget == "uniform" or (self.parts and not any(one.ndim for one in measured)):
            return dict(enumerate(map(ExpertShare, uniform_stay(found, self.sparsity))))
        routed = [RoutingSums(one[None]) if one.ndim else None for one in measured]
        scores = [self._scores(index, *pair) for index, pair in enumerate(zip(found, routed, strict=True))]
        stay = global_stay(found, scores, self.sparsity)
        return dict(enumerate(map(ExpertShare, stay, scores, routed)))

    def _scores(self, index: int, one: ExpertBlock, routed: RoutingSums | None) -> Tensor:
        if not one.experts:
            return torch.empty(0)
        found = self.score_experts(index, one.experts, Statistics(routed=routed))
        whose = self.called(f"{one.prefix}.{one.arch.experts}")
        return check_scores(found, (one.experts,), whose, "score_experts").cpu()

    @final
    def forecast(self, model: Model) -> Forecast:
        """Return how many parameters leave, and what is left; exact where all blocks lose the same share."""
        self.check_sizes(model)
        found, names = self._blocks(model), names_of(model)
        of = sum(one.experts * one.cost for one in found)
        if not self.removes_something:
            return Forecast("parameters", self.sparsity, 0, of, left_of(model, Outline({}), {}))
        shares = self.decide(model, [UNMEASURED] * len(found))
        keeps = [_first(one, shares[index].stay) for index, one in enumerate(found)]
        shapes: dict[Key, tuple[int, ...]] = {}
        for one, keep in zip(found, keeps, strict=True):
            tensors = unit_tensors(one, keep, names)
            shapes |= {key: tuple(value.shape) for key, value in tensors.items()}
        exact = self.budget == "uniform"
        left = left_of(model, Outline(shapes), self._patch(model, found, shares))
        removed = self._removed(found, shares) if exact else None
        return Forecast("parameters", self.sparsity, removed, of, left, exact)

    def _removed(self, found: Sequence[ExpertBlock], shares: Mapping[int, ExpertShare]) -> int:
        return sum(one.cost * (one.experts - shares[index].stay) for index, one in enumerate(found))

    def _patch(
        self, model: Model, found: Sequence[ExpertBlock], shares: Mapping[int, ExpertShare]
    ) -> dict[str, Any]:
        sizes = [sizes_left(one.sizes, _first(one, shares[index].stay)) for index, one in enumerate(found)]
        return sizes_patch(skeleton(model).config, sizes)

    @final
    def solve_block(
        self, model: Model, block: Block, seen: Seen, leaving: Mapping[int, ExpertShare]
    ) -> tuple[dict[Key, Tensor], dict[str, Any]]:
        """Return which experts of a block stay."""
        one, share = self._blocks(model)[block.index], leaving[block.index]
        routed = share.routed or seen.sums.routing
        scores = self._scores(block.index, one, routed) if share.scores is None else share.scores
        tensors, facts = self._decided(model, one, share.stay, scores)
        if routed is not None:
            facts["routed"] = [int(count) for count in routed.tokens.tolist()]
            where = f"{block.prefix}.{one.arch.experts}"
            facts["unseen"] = [f"{where}[{at}]" for at, count in enumerate(facts["routed"]) if count == 0]
        return tensors, facts

    def _decided(
        self, model: Model, one: ExpertBlock, stay: int, scores: Tensor
    ) -> tuple[dict[Key, Tensor], dict[str, Any]]:
        """Return the tensors and facts of a plan that leaves of a block the experts of the highest scores."""
        keep = BlockKeep(experts=highest(scores, stay)) if stay < one.experts else BlockKeep()
        tensors = unit_tensors(one, keep, names_of(model))
        if self.keep_scores and one.experts:
            tensors[Key(one.router, "score")] = scores
        return tensors, {"kept": {"experts": stay if one.experts else one.sizes.experts}}

    @final
    def finish(
        self, writer: PlanWriter, model: Model, leaving: Mapping[int, ExpertShare], facts: Mapping[str, Any]
    ) -> Plan:
        """Return the finished plan: the shapes of what was cut and the lengths of lists are promised."""
        found = self._blocks(model)
        of = sum(one.experts * one.cost for one in found)
        if not leaving:
            nothing = Promises(unit="parameters", asked=self.sparsity, removed=0, of=of)
            return writer.finish({}, promises=nothing)
        shapes = left_shapes(writer, model)
        stored = (
            *(Reshaped(tensors=tuple(names), shape=shape) for shape, names in shapes.items()),
            *left_lists(writer, model),
        )
        promises = Promises(
            unit="parameters",
            asked=self.sparsity,
            removed=self._removed(found, leaving),
            of=of,
            stored=stored,
        )
        routed = [count for one in writer.blocks for count in one.facts.get("routed", ())]
        if unreached := routed.count(0):
            logger.warning(
                "no calibration token reached %d of the %d experts, so nothing is known of those; give more "
                "samples, or text like what the model will read",
                unreached,
                len(routed),
            )
        kept = [one.facts.get("kept") for one in writer.blocks]
        patch = self._patch(model, found, leaving)
        return writer.finish({**facts, "kept": kept}, promises=promises, patch=patch)

    @property
    @final
    def reusable(self) -> bool:
        """Tell whether kept scores are all that another sparsity needs."""
        return self.one_look

    @final
    def check_scores(self, plan: Plan) -> None:
        """Refuse a plan that this pruner cannot decide from: no scores, or made with other settings."""
        if not self.reusable:
            raise UsageError("scores alone do not decide here", hint="only with propagate=dense")
        check_kept_scores(self, plan, FREE)

    @final
    def reuse(self, plan: Plan, model: Model, writer: PlanWriter) -> Plan:
        """Decide from the scores that a run with another sparsity kept; needs no data."""
        self.check_scores(plan)
        self.check_sizes(model)
        found = self._blocks(model)
        scores = [plan[Key(one.router, "score")] if one.experts else torch.empty(0) for one in found]
        pooled = self.budget == "global"
        counts = global_stay(found, scores, self.sparsity) if pooled else uniform_stay(found, self.sparsity)
        shares = dict(enumerate(map(ExpertShare, counts)))
        for index in range(writer.finished, len(found)):
            writer.write(*self._decided(model, found[index], shares[index].stay, scores[index]))
        return self.finish(writer, model, shares if self.removes_something else {}, {"scores_of": plan.id})


def _first(one: ExpertBlock, stay: int) -> BlockKeep:
    """Return a keep of the right size before anybody knows which experts stay."""
    return BlockKeep(experts=torch.arange(stay)) if stay < one.experts else BlockKeep()
