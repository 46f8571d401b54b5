"""Attention skip: whole attentions leave where they add least, and the feed-forward behind makes up for them.

Source: Wu et al. 2024, EAS, https://arxiv.org/abs/2403.15226

The paper trains an adapter whose router and pooled vector depend on the prompt, so that it has to be merged
anew for every prompt. Here both are constants of the calibration data: the adapter is fitted in closed form,
merged once, and served in batches. Beside it `down` is refitted to what the whole block added to the states.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from structprune.calibration.masked_loss import MaskedLoss
from structprune.decide.bandit import COMPETING, Search, subset_preferences
from structprune.decide.depth import DepthGoal, DepthUnit, keeps_without, lowest_units, random_scores
from structprune.decide.verdicts import Verdict, Verdicts
from structprune.models.streamed import Model
from structprune.models.walk import Block
from structprune.pruners.seen import Seen
from structprune.pruners.structure._bypass import added_share, check_bypass
from structprune.pruners.structure._depth import DepthPruner
from structprune.solvers.bypass import Bypass


class AttentionSkip(DepthPruner):
    """Skip attentions by what they add to the output of their block, or by trying subsets.

    Args:
        score: "change", how far a block's output moves without its attention, relative to what the block
            adds; "search", the paper's: random subsets are tried, each on one batch; "random", the baseline.
        adapter: Merge into gate and up an affine map, with biases, of what they read without the attention.
        refit: Refit `down` to what the block added with its attention.
        damping: Of both fits, in mean diagonals.
        steps: Of the search; each tries three subsets.
        seed: Draws subsets and random scores; a recipe's seed unless given.
    """

    units: tuple[Literal["attention"], ...] = ("attention",)
    score: Literal["change", "search", "random"] = "change"
    adapter: bool = True
    refit: bool = True
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    steps: Annotated[int, Field(ge=1, le=100_000)] = 200
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    # Which data is looked at depends on score and repair.
    needs_data: ClassVar[bool] = False

    @property
    def measures_passes(self) -> bool:
        """Tell whether every block is looked at before any attention leaves."""
        return self.score == "change" and not self.drop

    @property
    def bypass(self) -> Bypass | None:
        """Return what makes up for an attention, in the feed-forward behind it."""
        wanted = Bypass(self.adapter, self.refit, self.damping)
        return wanted if self.adapter or self.refit else None

    @property
    def searches(self) -> bool:
        """Tell whether subsets are tried out."""
        return self.score == "search" and not self.drop

    def check_sizes(self, model: Model) -> None:
        """Check that as much can leave, and that the family's blocks are such as the repairs are made for.

        Raises:
            UsageError: They are not.
        """
        super().check_sizes(model)
        if self.solves_passes or self.measures_passes:
            check_bypass(model)

    def measure(self, model: Model, block: Block, seen: Seen) -> Tensor:
        """Return how far the output moves without the attention, for what the block adds, shape []."""
        return added_share(model, block)

    def choose(
        self, units: Sequence[DepthUnit], goal: DepthGoal, measured: Sequence[Tensor], loss: MaskedLoss | None
    ) -> Verdicts:
        """Return which attentions leave, and the score of each."""
        if self.score == "search":
            assert loss is not None
            scores = self._tried(units, goal, loss)
        elif self.score == "change":
            scores = {unit: float(measured[unit.block]) for unit in units}
        else:
            scores = random_scores(units, self.seed)
        gone = lowest_units(scores, goal)
        return {unit: Verdict(scores[unit], unit in gone) for unit in [*gone, *units]}

    def _tried(self, units: Sequence[DepthUnit], goal: DepthGoal, loss: MaskedLoss) -> dict[DepthUnit, float]:
        def reward(step: int, subset: Sequence[int]) -> float:
            batch = step % loss.batches
            # Against the whole model's loss, so that the rate does not depend on how good the model is.
            return math.exp(loss({}, batch) - loss(keeps_without([units[index] for index in subset]), batch))

        size = len(lowest_units(dict.fromkeys(units, 0.0), goal))
        found = subset_preferences(len(units), size, reward, Search(self.steps, 2.0, self.seed))
        return dict(zip(units, (-found).tolist(), strict=True))

    def trials(self, units: int, gone: int) -> int:
        """Return how many subsets are tried, each on one batch."""
        return COMPETING * self.steps
