"""FastV: after the first blocks, keep the visual tokens that the last token looks at.

Source: Chen et al. 2024, https://arxiv.org/abs/2403.06764
"""

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from structprune.decide.token_target import Target
from structprune.pruners.token._late import LateTokens
from structprune.pruners.token._scored import ScoredTokens
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View


class FastV(LateTokens, ScoredTokens):
    """Score a token by the attention it gets from the last token of the prompt, in the block before.

    The paper's K is `block`, its R is 1 - `keep_ratio`.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.5))

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what one row of attention costs: the products of one query with all keys."""
        return size * cost.queries

    def score(self, seen: View) -> Tensor:
        """Return the last row of attention, mean over heads, float32, shape [images, tokens]."""
        return seen.paid_by_last()
