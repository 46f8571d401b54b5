"""Block drop: the blocks that change their input least leave, or those without which the model loses least.

Source: Men et al. 2024, https://arxiv.org/abs/2403.03853 (angular: 2403.17887; BlockPruner: 2406.10594)

Cosines are taken token by token; a released code forms the product of all pairs of tokens and keeps its
diagonal.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from structprune.calibration.masked_loss import MaskedLoss
from structprune.calibration.states import Reduce, last_states, token_cosines
from structprune.decide.depth import (
    DepthGoal,
    DepthUnit,
    least_harm,
    lowest_units,
    nearest_span,
    random_scores,
    span_distance,
)
from structprune.decide.verdicts import Verdict, Verdicts
from structprune.models.streamed import Model
from structprune.models.walk import Block
from structprune.pruners.seen import Seen
from structprune.pruners.structure._depth import DepthPruner


class BlockDrop(DepthPruner):
    """Remove whole blocks by what they do to the hidden states, or any part of depth by the loss without it.

    Args:
        score: "influence", 1 - the mean cosine of a block's input and output; "angular", consecutive blocks
            between which the last token's states turn least; "loss", one after another whatever costs the
            least loss (BlockPruner with `units: [attention, mlp]`); "random", the baseline.
        seed: Draws the random scores; a recipe's seed unless given.
    """

    score: Literal["influence", "angular", "loss", "random"] = "influence"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    # Which data is looked at depends on the score.
    needs_data: ClassVar[bool] = False

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if self.score in ("influence", "angular") and self.units != ("block",) and not self.drop:
            raise ValueError(
                f"score: {self.score} is of whole blocks; choose loss for {' and '.join(self.units)}"
            )
        return self

    @property
    def watching(self) -> Reduce | None:
        """Return what is remembered of the states: every token's cosine [tokens], or last tokens whole."""
        if self.drop or self.score not in ("influence", "angular"):
            return None
        return token_cosines if self.score == "influence" else last_states

    @property
    def searches(self) -> bool:
        """Tell whether removals are tried out."""
        return self.score == "loss" and not self.drop

    def measure(self, model: Model, block: Block, seen: Seen) -> Tensor:
        """Return a block's influence, or the states of its input and output, shape [sequences, 2, hidden]."""
        assert seen.states is not None
        return 1 - seen.states.double().mean() if self.score == "influence" else seen.states

    def choose(
        self, units: Sequence[DepthUnit], goal: DepthGoal, measured: Sequence[Tensor], loss: MaskedLoss | None
    ) -> Verdicts:
        """Return which units leave, and the scores of those that have one."""
        if self.score == "loss":
            assert loss is not None
            return {
                unit: Verdict(value, leaves=True) for unit, value in least_harm(units, loss, goal).items()
            }
        if self.score == "angular":
            states = [*(one[:, 0] for one in measured), measured[-1][:, 1]]
            span, value = nearest_span(units, lambda *span: span_distance(states, *span), goal)
            return {unit: Verdict(value, leaves=True) for unit in span}
        scores = random_scores(units, self.seed)
        if self.score == "influence":
            scores = {unit: float(measured[unit.block]) for unit in units}
        gone = lowest_units(scores, goal)
        return {unit: Verdict(scores[unit], unit in gone) for unit in [*gone, *units]}
