"""VFlowOpt: tokens that attention sinks of the vision tower look at stay; the others are recycled by cells.

Source: Yang et al. 2025, https://arxiv.org/abs/2508.05211
Cells count as tokens here, so that as many are left as was asked for; where no token receives enough to be a
sink all of them are; and the entropy is that of the image, in its own colours.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from structprune.decide.token_target import Target
from structprune.errors import QualityError
from structprune.pruners.token._staged import StagedTokens
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.recycle import entropy, gathering, recycled

Colour = tuple[float, float, float]


class VFlowOpt(StagedTokens):
    """Score a token by what sinks of one tower layer pay to it and by how much it varies, in three stages.

    Args:
        sinks: How many times the mean attention a sink receives, and more; 0 for every token.
        cell: Tokens each way of the cells in which others than the most important become one.
        alpha: Weight of the entropy of a token's grey levels, softmax over the image.
        image_mean: What the processor takes from red, green and blue; CLIP's unless given.
        image_std: What it divides them by.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.2033))
    sinks: Annotated[float, Field(ge=0)] = 7.0
    cell: Annotated[int, Field(ge=1)] = 12
    alpha: Annotated[float, Field(ge=-1, le=1)] = 0.0
    image_mean: Colour = (OPENAI_CLIP_MEAN[0], OPENAI_CLIP_MEAN[1], OPENAI_CLIP_MEAN[2])
    image_std: Colour = (OPENAI_CLIP_STD[0], OPENAI_CLIP_STD[1], OPENAI_CLIP_STD[2])

    tower_layers: ClassVar = (-2,)
    # The middle of the ranges that the paper searches, in the mean a quarter of all tokens.
    paper_stages: ClassVar = {0: 0.3125, 9: 0.2394, 18: 0.2033}
    paper_depth: ClassVar = 28

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what it costs to mix the tokens that each stage sees."""
        entering = [size, *(left for _, left in counts)]
        stages = self.stages(len(counts))
        return sum(entering[one] ** 2 for one in stages if entering[one + 1] < entering[one]) * cost.hidden

    def importance(self, seen: View) -> Tensor:
        """Return how important tokens are, as the first stage found, float32 [images, tokens].

        Raises:
            QualityError: The attention of the tower is not finite.
        """
        if "importance" not in seen.notes:
            found = seen.tower(self.tower_layers[0]).from_sinks(self.sinks)
            if not bool(found.isfinite().all()):
                raise QualityError(
                    f"{self.method()}: the attention of the vision tower is not finite",
                    hint="look whether the model computes NaN on this input, in this dtype",
                )
            if self.alpha:
                bits = seen.tower(self.tower_layers[0]).of_pixels(self._entropy)
                shares = bits.masked_fill(~seen.real | (seen.places[..., 2] < 0), -torch.inf).softmax(-1)
                found = found + self.alpha * shares
            seen.notes["importance"] = seen.marked(found)
        return seen.spread(seen.notes["importance"], whole=True)

    def _entropy(self, patches: Tensor) -> Tensor:
        mean, std = (torch.tensor(one, device=patches.device) for one in (self.image_mean, self.image_std))
        return entropy(patches.float() * std[:, None] + mean[:, None])

    def _recycled(self, seen: View, keep: Tensor) -> tuple[Tensor, Tensor]:
        ends = seen.places[..., 2] < 0
        cells = torch.cat([seen.places[..., :1], seen.places[..., 1:] // self.cell], -1)
        # By the first of its tokens; shorter images are filled up behind theirs.
        first = (cells[:, :, None] == cells[:, None]).all(-1).int().argmax(-1)
        return recycled(self.importance(seen), first.masked_fill(ends, -1), seen.real, keep)

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the most important tokens and the strongest of each cell of others, [images, tokens]."""
        chosen, into = self._recycled(seen, keep)
        seen.notes["into"] = into
        return chosen

    def merge(self, seen: View, chosen: Tensor) -> Tensor:
        """Return what becomes of cells: the mean of their tokens, weighted by importance."""
        return gathering(self.importance(seen), seen.notes["into"])
