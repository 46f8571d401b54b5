"""TokenCorr: the more a part of an image repeats itself, the fewer of its visual tokens stay.

Source: Zhang et al. 2024, https://arxiv.org/abs/2407.14439 (token-level correlation-guided compression)
Thresholds and the layer are not the paper's, which we take as keys of a recipe; sampled are the tokens of the
highest attention of one layer, where the paper joins what a shallow and a deep one single out. The stitched
tiles of an image are one part.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from structprune.decide.quotas import quotas
from structprune.decide.token_target import Target
from structprune.pruners.token._looking import LookingTokens
from structprune.pruners.token._merged import means
from structprune.pruners.token._scored import finite, rank
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View


class TokenCorr(LookingTokens):
    """Keep a share of each part that is its density; merge others into the token of the nearest key.

    Args:
        target: The most that is left; an image that repeats itself has less.
        similarity: Keys are alike whose cosine is above this.
        duplicates: A token is redundant that has more than so many like it in its part; the density of a part
            is the share of its tokens that are not.
        least: Share of a part that is left at least, as far as the target allows.
    """

    # What the paper's documents have left on the mean.
    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.66))
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.9
    duplicates: Annotated[int, Field(ge=0)] = 8
    least: Annotated[float, Field(gt=0, le=1)] = 0.1

    tower_layers: ClassVar = (-1,)
    paper_positions: ClassVar = "compact"

    @property
    def at_most(self) -> bool:
        """Tell that an image may have fewer tokens left than the target."""
        return True

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return nothing: pairs of keys, a head wide, are less than all rows of the tower's attention."""
        return 0

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return of every part the tokens that the class token looks at most, bool, shape [images, tokens].

        Raises:
            QualityError: An attention or a key is not a number.
        """
        paid = self.attention(seen, -1)
        part, patch = seen.places[..., 0], seen.patches
        inside = one_hot(part, int(part.max()) + 1) * patch[..., None]
        sizes = inside.sum(1)
        same = (part[:, :, None] == part[:, None]) & patch[:, :, None] & patch[:, None]
        # Each token is like itself.
        alike = ((self._cosines(seen) > self.similarity) & same).sum(2) - 1
        apart = (inside * (alike <= self.duplicates)[..., None]).sum(1)
        density = apart / sizes.clamp(min=1)
        count = torch.ceil((density.clamp(min=self.least) * sizes).round(decimals=4)).long()
        allowed = quotas(count, count, keep.minimum(count.sum(1)))
        # Those of an image that rank before, of its own part alone.
        order = rank(paid, patch)
        before = ((order[:, None] < order[:, :, None]) & same).sum(2)
        return patch & (before < allowed.gather(1, part))

    def merge(self, seen: View, chosen: Tensor) -> Tensor | None:
        """Return means of each token that stays and those of its part whose keys are nearest."""
        part, patch = seen.places[..., 0], seen.patches
        into = chosen[:, None] & (part[:, :, None] == part[:, None])
        nearest = self._cosines(seen).masked_fill(~into, -torch.inf).argmax(2)
        place = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
        return means(torch.where(patch & ~chosen & into.any(2), nearest, place))

    def _cosines(self, seen: View) -> Tensor:
        """Return the cosines of all pairs of keys, [images, tokens, tokens]."""
        keys = normalize(finite(seen.tower(-1).keys, seen.real, self.method()), dim=-1)
        return keys @ keys.transpose(1, 2)
