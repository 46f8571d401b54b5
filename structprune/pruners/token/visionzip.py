"""VisionZip: keep the visual tokens that the class token looks at, and a few that the others are merged into.

Source: Yang et al. 2025, https://arxiv.org/abs/2412.04467
The released code adds the mean of the others to the token that they are merged into, which doubles its
length, and puts the merged tokens last (`compat`); a proper mean stays in its place here. The class token,
one of the dominant ones there, is no feature of the models here. A tower without one is judged by what tokens
receive, and where it makes one token of several patches, tokens are chosen after that.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from structprune.decide.token_target import Target
from structprune.pruners.token._looking import LookingTokens
from structprune.pruners.token._merged import means, reordered
from structprune.pruners.token._scored import finite, highest
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View


class VisionZip(LookingTokens):
    """Keep the tokens of the highest attention; merge the others, by their keys, into every n-th of them.

    Args:
        contextual: Share of the tokens kept that others are merged into; the paper's are 10 of 64.
        compat: Merge and order as the released code does.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.111))
    contextual: Annotated[float, Field(ge=0, lt=1)] = 0.15
    compat: bool = False

    tower_layers: ClassVar = (-2,)
    paper_positions: ClassVar = "compact"

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return nothing: pairs of keys, a head wide, are less than all rows of the tower's attention."""
        return 0

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the dominant and the contextual tokens, bool [images, tokens].

        Raises:
            QualityError: An attention or a key is not a number.
        """
        dominant, contextual = self._parts(seen, keep)
        return dominant | contextual

    def _parts(self, seen: View, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens are dominant and which are contextual, bool [images, tokens] each."""
        attention, patch = self.attention(seen), seen.patches
        wanted = torch.floor((keep * self.contextual).round(decimals=9) + 0.5).long()
        # Where ends of lines stay for want of patches, nothing is left to merge.
        wanted = torch.where(keep <= patch.sum(1), wanted, 0)
        dominant = highest(attention, seen.real, keep - wanted)
        rest = patch & ~dominant
        number = rest.cumsum(1) - 1
        step = (rest.sum(1) // wanted.clamp(min=1)).clamp(min=1)[:, None]
        contextual = rest & (number % step == 0) & (number // step < wanted[:, None])
        return dominant, contextual

    def merge(self, seen: View, chosen: Tensor) -> Tensor:
        """Return weights by which each token goes into the contextual one of the most similar key."""
        _, contextual = self._parts(seen, chosen.sum(1))
        keys = normalize(finite(seen.tower(-2).keys, seen.real, self.method()), dim=-1)
        alike = (keys @ keys.transpose(1, 2)).masked_fill(~contextual[:, None], -torch.inf)
        goes = seen.patches & ~chosen & contextual.any(1, keepdim=True)
        places = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
        into = torch.where(goes, alike.argmax(2), places)
        if not self.compat:
            return means(into)
        own = torch.eye(chosen.shape[1], device=chosen.device)
        weights = own + means(into, goes)
        last = contextual.int() + 2 * (~chosen).int()
        return reordered(chosen, torch.argsort(last, dim=1, stable=True), weights)
