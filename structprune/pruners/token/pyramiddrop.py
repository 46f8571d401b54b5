"""PyramidDrop: after each quarter of the blocks the half of the visual tokens that the last token looks at.

Source: Xing et al. 2025, https://arxiv.org/abs/2410.17247
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from structprune.decide.token_target import Target
from structprune.pruners.token._scored import ScoredTokens
from structprune.pruners.token._staged import StagedTokens
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View


class PyramidDrop(StagedTokens, ScoredTokens):
    """Score a token by the attention it gets from the last token of the prompt, before each stage anew."""

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.125))

    paper_stages: ClassVar = {8: 0.5, 16: 0.25, 24: 0.125}
    paper_positions: ClassVar = "compact"

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what one row of attention costs in every block before a stage."""
        return self.looked_at(size, counts) * cost.queries

    def score(self, seen: View) -> Tensor:
        """Return the last row of attention, mean over heads, float32, shape [images, tokens]."""
        return seen.paid_by_last()
