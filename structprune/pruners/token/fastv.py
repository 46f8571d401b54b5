"""FastV: after the first blocks, keep the visual tokens that the last token looks at.

Source: Chen et al. 2024, https://arxiv.org/abs/2403.06764
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from structprune.decide.token_target import Target
from structprune.errors import UsageError
from structprune.pruners.token._scored import ScoredTokens
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View


class FastV(ScoredTokens):
    """Score a token by the attention it gets from the last token of the prompt, in the block before.

    Args:
        block: Number of blocks that compute all tokens, the paper's K; its R is 1 - `keep_ratio`.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.5))
    block: Annotated[int, Field(ge=1)] = 2

    def start(self, blocks: int) -> int:
        """Return the block before which tokens are dropped.

        Raises:
            UsageError: The model has no such block.
        """
        if self.block >= blocks:
            raise UsageError(
                f"block: {self.block} of a model with {blocks} blocks leaves no block to save in",
                hint=f"block can be from 1 to {blocks - 1}",
            )
        return self.block

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what one row of attention costs: the products of one query with all keys."""
        return size * cost.queries

    def score(self, seen: View) -> Tensor:
        """Return the last row of attention, mean over heads, float32, shape [images, tokens]."""
        return seen.paid_by_last()
