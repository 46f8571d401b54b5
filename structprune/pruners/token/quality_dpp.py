"""Quality DPP: visual tokens stay that the last token looks at, that the text is about, and that differ.

Source: Kulesza and Taskar 2012, https://arxiv.org/abs/1207.6083 (quality and diversity of a determinantal
point process). The recipe is ours: FastV's attention times CDPruner's relevance are the quality of a token,
one kernel is made of quality and likeness, and tokens go in three stages, where TransPrune drops them.

    quality_i = attention_i^a * relevance_i^r, both scaled from 0 to 1 within the image
    kernel_ij = quality_i * cosine(x_i - c m, x_j - c m) * quality_j

Attention is what the last token pays; relevance is likeness to the nearest word of the text; x are states, m
is the mean of the image's. Tokens stay that raise the determinant of the kernel most, picked one by one; at
every stage all that are left are scored anew. All states of an image share much, so that without c all tokens
seem alike; with all of the mean gone what is left of plain background is noise, and seems to differ.

Where a share s is left at the end, the stages leave s^0.2, s^0.5 and s: most while tokens read one
another, few once the text has read them. That and c were chosen on the demo's tuning questions and on
calibration questions of another small LLaVA, by the KL from the dense model at equal operations.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from structprune.decide.token_target import Target
from structprune.pruners.token._late import checked
from structprune.pruners.token._scored import finite
from structprune.pruners.token._staged import StagedTokens
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.determinantal import determinantal

# What nobody looks at or asks about is not quite worthless: others may all be alike.
LEAST = 1e-4
Power = Annotated[float, Field(ge=0)]


class QualityDpp(StagedTokens):
    """Maximise the determinant of quality times likeness times quality, greedily, stage by stage.

    Args:
        block: Number of blocks that compute all tokens, where all that go shall go at once; in three stages
            unless given.
        attention: Power of the attention that a token gets from the last one; 0 leaves it out.
        relevance: Power of its likeness to the nearest word of the text; 0 leaves it out.
        centring: How much of the mean of the image's states is taken away before they are compared.
        diversity: Whether likeness to other tokens counts; else the tokens of the highest quality stay.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.11))
    block: Annotated[int, Field(ge=1)] | None = None
    attention: Power = 1.0
    relevance: Power = 0.5
    centring: Annotated[float, Field(ge=0, le=1)] = 0.9
    diversity: bool = True

    paper_stages: ClassVar = {7: 0.11**0.2, 9: 0.11**0.5, 12: 0.11}

    def stages(self, blocks: int) -> dict[int, float]:
        """Return before which blocks tokens are dropped, and the power of the last share that is left there.

        Raises:
            UsageError: The model has no such block.
        """
        return super().stages(blocks) if self.block is None else {checked(self.block, blocks): 1.0}

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what stages cost: one row of attention, the cosines of all pairs, the factor's columns."""
        entering = [size, *(left for _, left in counts)]
        spent = self.looked_at(size, counts) * cost.queries * (self.attention > 0)
        for block in self.stages(len(counts)):
            seen, left = entering[block], entering[block + 1]
            if self.diversity and left < seen:
                spent += seen**2 * cost.hidden + seen * left * (left - 1) // 2
        return spent

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return tokens that matter and are far apart, bool [images, tokens].

        Raises:
            QualityError: A state or an attention is not finite.
        """
        states = finite(seen.features(), seen.real, self.method())
        quality = self._quality(seen, normalize(states, dim=-1))
        if self.diversity:
            # What is no token holds zeros.
            mean = states.sum(1, keepdim=True) / seen.left[:, None, None]
            own = normalize(states - self.centring * mean, dim=-1)
            like = own @ own.transpose(1, 2)
        else:
            like = torch.eye(states.shape[1]).to(states)
        return determinantal(quality[:, :, None] * like * quality[:, None], seen.real, keep)

    def _quality(self, seen: View, unit: Tensor) -> Tensor:
        """Return the product of what a token is looked at and asked about, float32 [images, tokens]."""
        quality = torch.ones_like(unit[..., 0])
        if self.attention:
            looked_at = finite(seen.paid_by_last(), seen.real, self.method())
            quality = quality * _scaled(looked_at, seen.real) ** self.attention
        if self.relevance:
            words, real = seen.text()
            alike = unit @ normalize(words, dim=-1).transpose(1, 2)
            nearest = alike.masked_fill(~real[:, None], -1).amax(2) if words.shape[1] else quality
            quality = quality * _scaled(nearest, seen.real) ** self.relevance
        return quality


def _scaled(score: Tensor, real: Tensor) -> Tensor:
    """Return a score from just above 0 to 1 within each image, or 1 where all are equal."""
    low = score.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = score.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    return torch.where(high > low, (score - low) / (high - low), 1.0).clamp(LEAST, 1)
