"""Quality DPP: visual tokens stay that the last token looks at, that the text is about, and that differ.

Source: Kulesza and Taskar 2012, https://arxiv.org/abs/1207.6083 (quality and diversity of a determinantal
point process); the score is ours: FastV's attention and CDPruner's relevance are the quality, of which one
kernel is made. After the first blocks tokens have read one another, so that all of them know what is there.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from structprune.decide.token_target import Target
from structprune.pruners.token._late import LateTokens
from structprune.pruners.token._scored import finite
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.determinantal import determinantal

# What nobody looks at or asks about is not quite worthless: others may all be alike.
LEAST = 1e-4
Power = Annotated[float, Field(ge=0)]


class QualityDpp(LateTokens):
    """Maximise the determinant of quality times likeness times quality, greedily.

    Args:
        attention: Power of the attention that a token gets from the last one; 0 leaves it out.
        relevance: Power of its likeness to the nearest word of the text; 0 leaves it out.
        diversity: Whether likeness to other tokens counts; else the tokens of the highest quality stay.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.11))
    attention: Power = 1.0
    relevance: Power = 0.5
    diversity: bool = True

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what one row of attention costs, the cosines of all pairs, and the columns of the factor."""
        left = counts[-1][1]
        pairs = size**2 * cost.hidden + size * left * (left - 1) // 2
        return size * cost.queries * (self.attention > 0) + pairs * self.diversity

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return tokens that matter and are far apart, bool [images, tokens].

        Raises:
            QualityError: A state or an attention is not finite.
        """
        unit = normalize(finite(seen.features(), seen.real, self.method()), dim=-1)
        quality = torch.ones_like(unit[..., 0])
        if self.attention:
            looked_at = finite(seen.paid_by_last(), seen.real, self.method())
            quality = quality * self._scaled(looked_at, seen.real) ** self.attention
        if self.relevance:
            words, real = seen.text()
            alike = unit @ normalize(words, dim=-1).transpose(1, 2)
            nearest = alike.masked_fill(~real[:, None], -1).amax(2) if words.shape[1] else quality
            quality = quality * self._scaled(nearest, seen.real) ** self.relevance
        like = unit @ unit.transpose(1, 2) if self.diversity else torch.eye(unit.shape[1]).to(unit)
        return determinantal(quality[:, :, None] * like * quality[:, None], seen.real, keep)

    @staticmethod
    def _scaled(score: Tensor, real: Tensor) -> Tensor:
        """Return a score from just above 0 to 1 within each image, or 1 where all are equal."""
        low = score.masked_fill(~real, torch.inf).amin(1, keepdim=True)
        high = score.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
        return torch.where(high > low, (score - low) / (high - low), 1.0).clamp(LEAST, 1)
