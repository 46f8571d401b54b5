"""Methods that keep the tokens that stand out, as many as an image has."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from structprune.decide.token_target import Target
from structprune.pruners.token._looking import LookingTokens
from structprune.pruners.token._scored import finite, highest
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View


def outliers(scores: Tensor, real: Tensor, iqr: float) -> Tensor:
    """Return the tokens whose score lies above the upper quartile by so many interquartile ranges.

    Args:
        scores: Float32 [images, tokens].
        real: Which entries count, bool [images, tokens].
        iqr: How many.

    Returns:
        Bool, shape [images, tokens]. A quarter of an image's tokens at most.
    """
    known = scores.masked_fill(~real, torch.nan)
    lower, upper = (known.nanquantile(share, dim=1, keepdim=True) for share in (0.25, 0.75))
    return real & (scores > upper + iqr * (upper - lower))


class OutlierTokens(LookingTokens):
    """A pruner that keeps what the class token looks at unusually much, and merges what goes into it.

    Args:
        target: The most that is left; an image may have fewer tokens that stand out.
        iqr: A token stands out so many interquartile ranges above the upper quartile.
        neighbours: How many of the tokens that go are merged into each that stays, those of the nearest keys.
        compat: Whether these are added to it, each as often as it is looked at, as in the released code; else
            it becomes the mean of all, weighted by attention. What is looked at evenly then changes little.
    """

    # No more than a quarter of anything lies above its upper quartile.
    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.25))
    iqr: Annotated[float, Field(ge=0)] = 1.5
    neighbours: Annotated[int, Field(ge=0)] = 32
    compat: bool = False

    # The layer that reads what LLaVA takes for features.
    tower_layers: ClassVar = (-1,)
    paper_positions: ClassVar = "compact"

    @property
    def at_most(self) -> bool:
        """Tell that an image may have fewer tokens left than the target."""
        return True

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return nothing: pairs of keys, a head wide, are less than all rows of the tower's attention."""
        return 0

    def standing_out(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens that stand out, the highest of them up to `keep`, at least one of an image."""
        paid, patch = self.attention(seen, -1), seen.patches
        count = outliers(paid, patch, self.iqr).sum(1).clamp(min=1)
        return highest(paid, patch, count.minimum(keep))

    def merge(self, seen: View, chosen: Tensor) -> Tensor | None:
        """Return what becomes of each token that stays and its neighbours that go, weighted by attention."""
        paid, going = self.attention(seen, -1).clamp(min=torch.finfo().tiny), seen.patches & ~chosen
        keys = normalize(finite(seen.tower(-1).keys, seen.real, self.method()), dim=-1)
        stays = torch.argsort((~chosen).int(), dim=1, stable=True)[:, : int(chosen.sum(1).max())]
        mine = keys.gather(1, stays[..., None].expand(-1, -1, keys.shape[2]))
        alike = (mine @ keys.transpose(1, 2)).masked_fill(~going[:, None], -torch.inf)
        near = alike.argsort(dim=2, descending=True, stable=True)[..., : self.neighbours]
        some = torch.zeros_like(alike).scatter(2, near, 1.0) * going[:, None]
        # Only itself where the end of a line stays: it has no key to be near.
        some = some * seen.patches.gather(1, stays)[..., None]
        some = some * paid[:, None]
        own = 1.0 if self.compat else paid.gather(1, stays)[..., None]
        some = some.scatter(2, stays[..., None], torch.ones_like(some[..., :1]) * own)
        if not self.compat:
            some = some / some.sum(2, keepdim=True)
        width = chosen.shape[1]
        whole = torch.zeros(len(chosen), width, width, device=chosen.device)
        return whole.scatter(1, stays[..., None].expand_as(some), some)
