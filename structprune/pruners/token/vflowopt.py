"""VFlowOpt: tokens that attention sinks of the vision tower look at stay; the others are recycled by cells.

Source: Yang et al. 2025, https://arxiv.org/abs/2508.05211
Cells count as tokens here, so that as many are left as was asked for; where no token receives enough to be a
sink all of them are; and the entropy is that of the image, in its own colours.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from math import log
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from transformers import PreTrainedConfig

from structprune.decide.token_target import Target
from structprune.errors import QualityError
from structprune.pruners.token._searched import SearchedTokens
from structprune.pruners.token._staged import StagedTokens, falling
from structprune.runtime.flops import BlockCost, rows_operations
from structprune.runtime.view import View
from structprune.solvers.recycle import MEAN, STD, Colour, cells_of, entropy, gathering, recycled

Share = Annotated[float, Field(gt=0, lt=1)]
Shares = Annotated[tuple[Share, Share, Share], AfterValidator(falling)]


class VFlowOpt(SearchedTokens, StagedTokens):
    """Score a token by what sinks of one tower layer pay to it and by how much it varies, in three stages.

    Args:
        shares: Which share of the tokens is left from each stage on; a target raises all to one power.
        sinks: How many times the mean attention a sink receives, and more; 0 for every token.
        cell: Tokens each way of the cells in which others than the most important become one.
        alpha: Weight of the entropy of a token's grey levels, softmax over the image.
        image_mean: What the processor takes from red, green and blue; CLIP's unless given.
        image_std: What it divides them by.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.2033))
    shares: Shares = (0.3125, 0.2394, 0.2033)
    sinks: Annotated[float, Field(ge=0)] = 7.0
    cell: Annotated[int, Field(ge=1)] = 12
    alpha: Annotated[float, Field(ge=-1, le=1)] = 0.0
    image_mean: Colour = MEAN
    image_std: Colour = STD

    tower_layers: ClassVar = (-2,)
    # The middle of the ranges that the paper searches, in the mean a quarter of all tokens.
    paper_stages: ClassVar = {0: 0.3125, 9: 0.2394, 18: 0.2033}
    paper_depth: ClassVar = 28
    ranges: ClassVar = {
        "first": (0.25, 1.0),
        "second": (0.0, 1.0),
        "sinks": (0.0, 50.0),
        "cell": (3.0, 24.0),
        "alpha": (-1.0, 1.0),
    }

    def stages(self, blocks: int) -> dict[int, float]:
        """Return before which blocks tokens are dropped, and the power of the last share left there."""
        last = log(self.shares[-1])
        return {block: log(share) / last for block, share in zip(super().stages(blocks), self.shares)}

    def with_values(self, values: Mapping[str, float]) -> Self:
        """Return the same pruner with values of a trial: powers of the last share, then as its fields."""
        first = values["first"]
        powers = (first, first + values["second"] * (1 - first), 1.0)
        found: dict[str, Any] = {"shares": tuple(self.shares[-1] ** one for one in powers), "trials": 0}
        found |= {"sinks": values["sinks"], "cell": round(values["cell"]), "alpha": values["alpha"]}
        return self.model_copy(update=found)

    @property
    def reads_pixels(self) -> bool:
        """Tell whether the pixels of an image shall be kept until its tokens are chosen."""
        return self.alpha != 0

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what it costs to mix the tokens that each stage sees."""
        entering = [size, *(left for _, left in counts)]
        stages = self.stages(len(counts))
        return sum(entering[one] ** 2 for one in stages if entering[one + 1] < entering[one]) * cost.hidden

    def chosen_in_tower(self, config: PreTrainedConfig, size: int, left: int) -> int:
        """Return what all rows of the layer's attention cost, at most twice: once for what is a sink."""
        return 2 * rows_operations(config, size, 1)

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
                show = partial(entropy, mean=self.image_mean, std=self.image_std)
                bits = seen.tower(self.tower_layers[0]).of_pixels(show)
                shares = bits.masked_fill(~seen.patches, -torch.inf).softmax(-1)
                found = found + self.alpha * shares
            seen.notes["importance"] = seen.marked(found)
        return seen.spread(seen.notes["importance"], whole=True)

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the most important tokens and the strongest of each cell of others, [images, tokens]."""
        cells = cells_of(seen.places, self.cell)
        chosen, seen.notes["into"] = recycled(self.importance(seen), cells, seen.real, keep)
        return chosen

    def merge(self, seen: View, chosen: Tensor) -> Tensor:
        """Return what becomes of cells: the mean of their tokens, weighted by importance."""
        return gathering(self.importance(seen), seen.notes["into"])
