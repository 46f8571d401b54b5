"""FitPrune: how many visual tokens go in which block, fitted so that attention changes least.

Source: Ye et al. 2025, https://arxiv.org/abs/2409.10197
The plan is the recipe. Deletions become shares of an image's tokens, so that images of another size are
served too; operations are counted as they are run, the output projection with what enters the block.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from structprune.calibration.notebook import Look
from structprune.decide.sparsity import fraction_of
from structprune.decide.token_target import Target, count_at
from structprune.models.arch import block_prefixes
from structprune.models.streamed import Batch, Model
from structprune.pruners.forecast import Forecast
from structprune.pruners.token._account import TYPICAL_SIZE, too_dear
from structprune.pruners.token._scored import ScoredTokens
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.runtime.flops import BlockCost, image_tokens
from structprune.runtime.view import View
from structprune.solvers.token_fit import Fit, Walked, Walks, fit_shares


class FitPrune(ScoredTokens):
    """Delete, between attention and feed-forward, the tokens that image and text look at least."""

    target: Target = Field(default_factory=lambda: Target(visual_flops=0.4))

    needs_data: ClassVar[bool] = True
    reads: ClassVar = "images"
    within: ClassVar[bool] = True

    def forecast(self, model: Model) -> Forecast:
        """Return how many tokens there are; where they go is what the data decides."""
        known, size = super().forecast(model), image_tokens(model.config) or TYPICAL_SIZE
        notes: tuple[str, ...] = ()
        if (left := self._at_once(model, size)) < size:
            cost, blocks = BlockCost.of(model.config), len(block_prefixes(model))
            # At most it looks in every block, and saves what it saves were all dropped at once.
            most = self.operations(cost, size, [(size, left)] * blocks)
            notes = too_dear(self.method(), most, blocks * (cost.operations(size) - cost.operations(left)))
        return replace(known, reachable=None, notes=notes)

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return at most what attention costs that is computed anew in every block that deletes."""
        return sum(entering**2 for entering, leaving in counts if leaving < entering) * cost.queries

    def counts(self, model: Model, size: int) -> list[tuple[int, int]]:
        """Return what an image costs where nothing is known of the data yet: all of it, in every block.

        Raises:
            UsageError: Less than one token would be left.
        """
        # Nothing that is dropped later leaves more than what is dropped at once.
        self._at_once(model, size)
        return [(size, size)] * len(block_prefixes(model))

    def tokens(self, model: Model) -> dict[int, Tensor]:
        """Return nothing: all are left, as long as nothing is known of the data."""
        return {}

    def _at_once(self, model: Model, size: int) -> int:
        return count_at(self.target, size, Fraction(0), BlockCost.of(model.config).operations)

    def decide(self, model: Model, batches: Sequence[Batch], look: Look) -> dict[int, Tensor]:
        """Return of every block where tokens go which share of an image's tokens is left.

        Raises:
            InputError: As for `fit_shares`.
        """
        assert isinstance(model, PreTrainedModel)
        blocks = len(block_prefixes(model))
        fit = Fit(blocks, *self._costs(model, blocks), newlines=self.newlines)
        attach(model, "fit", [Drop(index, True, None, fit) for index in range(blocks)])

        @torch.no_grad()
        def run(batch: Batch) -> None:
            model(**batch, logits_to_keep=1)

        walk = Walks(fit, batches, run, look)
        try:
            walk()
            shares = fit_shares(fit, walk)
        finally:
            detach(model, "fit")
        before = [1.0, *shares]
        return {
            index: torch.tensor(share, dtype=torch.float64)
            for index, share in enumerate(shares)
            if share < before[index]
        }

    def _costs(
        self, model: Model, blocks: int
    ) -> tuple[Callable[[int, int], float], Callable[[Walked], float]]:
        """Return what a block costs, and how much of what is allowed an image needs as it is now."""
        cost, wanted = BlockCost.of(model.config), float(fraction_of(self.target.value))
        match self.target.name:
            case "visual_flops":
                return cost.operations, lambda one: one.needed / (wanted * blocks * cost.operations(one.size))
            case "avg_tokens":
                return (lambda entering, _: float(entering)), lambda one: one.needed / (wanted * blocks)
            case "keep_ratio":
                return cost.operations, lambda one: one.left / (wanted * one.size)
        return cost.operations, lambda one: one.left / wanted

    def score(self, seen: View) -> Tensor:
        """Return attention from the image times attention from the text, float32, shape [images, tokens]."""
        own, text = seen.received
        return own * text
