"""What a pruner that decides block by block looks at, and what that takes in memory and in work."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self, final, get_args

from pydantic import model_validator

from structprune.calibration.collect import remembered_bytes
from structprune.calibration.states import Reduce
from structprune.calibration.statistics import NOTHING, Part, Parts, gradient_means, input_parts
from structprune.errors import MethodError
from structprune.models.arch import Linear, all_linears
from structprune.models.cost import body_flops, stored_bytes
from structprune.models.streamed import Model
from structprune.pruners.demand import (
    Demand,
    Sharing,
    demand_of_answers,
    demand_of_gradients,
    demand_of_sums,
    distinct_inputs,
    moved_states,
)
from structprune.pruners.pruner import Pruner
from structprune.solvers.effort import Effort


class LookingPruner(Pruner):
    """A pruner that decides block by block, from statistics of what the linears of a block read.

    Args:
        propagate: Whether later blocks see the outputs of pruned or of dense blocks.
    """

    propagate: Literal["pruned", "dense"] = "pruned"

    @model_validator(mode="after")
    def _parts_that_exist(self) -> Self:
        if unknown := sorted((self.solving | self.measuring) - {*get_args(Part)}):
            raise MethodError(
                f"{self.method()}: parts: calibration remembers no {' and no '.join(map(repr, unknown))}",
                hint=f"one of: {', '.join(get_args(Part))}",
            )
        return self

    @abstractmethod
    def target_linears(self, index: int, found: Sequence[Linear]) -> list[Linear]:
        """Return the linears of block `index` that are decided on, or whose inputs decide."""

    @property
    @abstractmethod
    def solving(self) -> Parts:
        """Return what must be known of the targets when their block is solved."""

    @property
    def measuring(self) -> Parts:
        """Return what must be known of every dense block's inputs before anything is decided."""
        return NOTHING

    @property
    def watching(self) -> Reduce | None:
        """Return what must be known of the states at both ends of every dense block before that."""
        return None

    @property
    def measures_passes(self) -> bool:
        """Tell whether `measure` itself runs the data through the block, by `Block.passes`."""
        return False

    @property
    def solves_passes(self) -> bool:
        """Tell whether `solve_block` does so."""
        return False

    @property
    def looks_first(self) -> bool:
        """Tell whether every block is measured before anything is decided; weights alone may be enough."""
        return bool(self.measuring or self.watching or self.measures_passes)

    @property
    def searches(self) -> bool:
        """Tell whether the decision tries what the model loses without some units."""
        return False

    @property
    @final
    def looks_at_data(self) -> bool:
        """Tell whether the method, or what is chosen beside it, needs calibration data."""
        passes = self.measures_passes or self.solves_passes
        sums = self.solving or self.measuring or self.watching
        return bool(self.needs_data or sums or passes or self.searches)

    @property
    @final
    def one_look(self) -> bool:
        """Tell whether what calibration sees is the same for every goal."""
        return self.propagate == "dense" or not (input_parts(self.solving) or self.solves_passes)

    @final
    def remembered_bytes(self, model: Model, ranks: int = 1) -> int:
        """Return at most how many bytes Gram matrices, gradients and fits of a block take in each process."""
        parts = self.solving | self.measuring
        pairs = zip(self.all_targets(model), all_linears(model), strict=True)
        return max(remembered_bytes(*pair, parts, ranks, self.costs) for pair in pairs) + self.solving_bytes(
            model
        )

    def solving_bytes(self, model: Model) -> int:
        """Return at most how many bytes `solve_block` takes beside the statistics that it is given."""
        return 0

    @final
    def all_targets(self, model: Model) -> list[list[Linear]]:
        """Return the targets of every block, first to last."""
        return [self.target_linears(index, found) for index, found in enumerate(all_linears(model))]

    def efforts(self, groups: Sequence[Sequence[Linear]]) -> list[Effort]:
        """Return what solving a block takes, group by group: processes divide the groups.

        Args:
            groups: The block's targets; those that read the same input are one.
        """
        return [Effort()] * len(groups)

    @final
    def costs(self, groups: Sequence[Sequence[Linear]]) -> list[float]:
        """Return what solving takes, group by group, in one unit; at least 1."""
        return [max(one.cost, 1.0) for one in self.efforts(groups)]

    @final
    def demand(self, model: Model, sharing: Sharing) -> Demand:
        """Return what all walks and all answers take."""
        routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        sharing = replace(sharing, routed=routed or 1)
        found, forwards = self._walks(model, sharing)
        known: dict[object, Demand] = {}  # most blocks are alike, and a mixture has thousands of linears
        for every, targets in zip(all_linears(model), self.all_targets(model), strict=True):
            alike = _outline(every), _outline(targets)
            if alike not in known:
                states = moved_states(every, sharing) * forwards
                known[alike] = Demand(state_bytes=states) + self._on_block(every, targets, sharing)
            found += known[alike]
        return found

    def _on_block(self, every: Sequence[Linear], targets: Sequence[Linear], sharing: Sharing) -> Demand:
        """Return what a block takes beside the walks."""
        parts, found = self.solving | self.measuring, Demand()
        groups = distinct_inputs(targets) if input_parts(self.solving) else [[one] for one in targets]
        for walk in (self.measuring, self.solving):
            if input_parts(walk):
                found += demand_of_sums(groups, walk, sharing)
        if gradient_means(parts):
            found += demand_of_gradients(every, parts, sharing)
        return found + demand_of_answers(groups, self.efforts(groups), sharing)

    def _walks(self, model: Model, sharing: Sharing) -> tuple[Demand, float]:
        """Return what the walks themselves read and compute, and how often data run through a block."""
        stored, read, forwards = stored_bytes(model), 0, 0.0
        if gradient_means(self.solving | self.measuring):
            # Forward, and per block forward again and backward, then only to the states.
            read, forwards = stored.walk + stored.head + sum(stored.blocks), 3.0
        if input_parts(self.measuring) or self.watching is not None or self.measures_passes:
            read, forwards = read + stored.walk, forwards + 1 + self.measures_passes
        elif self.looks_first:
            read += sum(stored.blocks)
        trials = self.forecast(model).trials if self.searches else 0
        read, forwards = read + trials * (stored.walk + stored.head), forwards + trials
        spared = 0.0
        if self.solves_passes or (input_parts(self.solving) and self.propagate == "pruned"):
            # Nobody reads what comes out of the last block; and who only looks stops before the last product,
            # but for the first batch, in which it shows which that is.
            read, forwards = read + stored.walk, forwards + 2 - 1 / len(stored.blocks)
            looks = sharing.tokens - sharing.first_tokens
            last = [found[-1] for found in all_linears(model) if found[-1].expert is None]
            spared = 0.0 if self.solves_passes else sum(2 * one.weight.numel() * looks for one in last)
        elif input_parts(self.solving):
            read, forwards = read + stored.walk, forwards + 1
        else:
            read += sum(stored.blocks)
        flops = body_flops(model, sharing.length) or 0.0
        return Demand(read * sharing.streamed, forwards * flops * sharing.tokens - spared), forwards


def _outline(found: Sequence[Linear]) -> tuple[object, ...]:
    """Return what a block's linears are, whichever block it is."""
    return tuple((one.label.rpartition(".")[2], one.weight.shape) for one in found)
