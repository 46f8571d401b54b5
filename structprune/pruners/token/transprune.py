"""TransPrune: visual tokens stay that blocks change most, and that the question looks at.

Source: Li et al. 2025, https://arxiv.org/abs/2507.20630
The paper weighs a change by how far a token turns to either side, 1 - |cos|, beside the other tokens of its
image; the released code takes 1 - cos beside all tokens of the prompt (`compat`). Decoding keeps one account
of positions for every block, where the released code has one for each stage.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from structprune.decide.token_target import Target
from structprune.pruners.token._scored import ScoredTokens
from structprune.pruners.token._staged import StagedTokens
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View

# Under which a norm or a sum is none: what is divided by it is zero then.
TINY = torch.finfo(torch.float32).tiny
NOTE = "transition variation"


class TransPrune(StagedTokens, ScoredTokens):
    """Score a token by its transition variation, added up over blocks, and by the attention of the question.

    Args:
        alpha: Weight of the transition variation; the rest is that of attention. Both are shares of what an
            image's tokens have together.
        compat: Whether changes are weighed as in the released code.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.125))
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    compat: bool = False

    paper_stages: ClassVar = {7: 0.875, 9: 0.625, 12: 0.125}
    paper_positions: ClassVar = "compact"

    def watched(self, blocks: int) -> Iterable[int]:
        """Return the blocks before which the change that the one before made is noted."""
        stages = [*self.stages(blocks)]
        return range(stages[0], stages[-1] + 1)

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what one row of attention costs in every block before a stage, for each token that asks.

        A change costs six vector operations beside it.
        """
        return self.looked_at(size, counts) * cost.queries

    def watch(self, seen: View) -> None:
        """Add up what the last block's modules change, at the tokens' places in the forward."""
        changes = [self._variation(seen, read, returned) for read, returned in seen.passed]
        seen.notes[NOTE] = seen.notes.get(NOTE, 0) + seen.marked(torch.stack(changes).sum(0))

    def score(self, seen: View) -> Tensor:
        """Return the weighted sum of both, float32, shape [images, tokens]."""
        changed, asked = seen.spread(seen.notes[NOTE], whole=True), seen.paid_by_text()
        return self.alpha * _share(changed) + (1 - self.alpha) * _share(asked)

    def _variation(self, seen: View, read: Tensor, returned: Tensor) -> Tensor:
        """Return how much a module changes each token, float32 [images, tokens].

        Args:
            seen: The images.
            read: What the module read, after the norm, shape [batch, slots, hidden].
            returned: What it returned, the same way.
        """
        read, returned = read.float(), returned.float()
        before, after = read.norm(dim=-1), returned.norm(dim=-1)
        cosine = (read * returned).sum(-1) / (before * after).clamp(min=TINY)
        size = seen.spread(after / before.clamp(min=TINY))
        if self.compat:
            turn = (1 - cosine).masked_fill(~seen.computed, -torch.inf)
            return size * seen.spread(turn.softmax(1))
        turn = seen.spread(1 - cosine.abs()).masked_fill(~seen.real, -torch.inf)
        return size * turn.softmax(1)


def _share(values: Tensor) -> Tensor:
    """Return of every token its share of what its image has, [images, tokens]."""
    return values / values.sum(1, keepdim=True).clamp(min=TINY)
