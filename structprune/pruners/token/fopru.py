"""FoPru: keep the visual tokens, or the rows of them, that the vision tower itself looks at.

Source: Jiang et al. 2024, https://arxiv.org/abs/2411.14164
An image in tiles has its rows across all of them, with the token that ends the line, and those of the whole
image; the paper's are one square's.
"""

from collections.abc import Sequence
from math import isqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from structprune.decide.token_target import Target
from structprune.errors import UsageError
from structprune.models.streamed import Model
from structprune.pruners.token._family import TokenPruner
from structprune.pruners.token._scored import finite, highest, rank
from structprune.runtime.flops import BlockCost, image_tokens
from structprune.runtime.view import View


class FoPru(TokenPruner):
    """Score a token by the mean attention that it receives in the last layer but one of the vision tower.

    Args:
        strategy: Whether single tokens are kept, or whole rows by the mean of their patches, as many as fit.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.25))
    strategy: Literal["rank", "row"] = "rank"

    tower_layers: ClassVar = (-2,)
    paper_positions: ClassVar = "compact"

    @property
    def at_most(self) -> bool:
        """Tell whether fewer than the target may be left: rows are kept whole."""
        return self.strategy == "row"

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return nothing: beside what the tower shows, tokens are sorted."""
        return 0

    def counts(self, model: Model, size: int) -> list[tuple[int, int]]:
        """Return of every block how many tokens of an image it computes: whole rows, where all are alike.

        Raises:
            UsageError: Not one row is left.
        """
        found = super().counts(model, size)
        if self.strategy == "rank" or image_tokens(model.config) != size:
            return found
        row = isqrt(size)
        if found[-1][1] < row:
            raise UsageError(
                f"target: {self.target}: fewer than one row of {row} tokens of an image of {size}",
                hint=f"ask for {row} tokens or more, or strategy: rank",
            )
        return [(left // row * row,) * 2 for _, left in found]

    def tokens(self, model: Model) -> dict[int, Tensor]:
        """Return how many tokens are left at the embeddings: of whole rows, where all are alike."""
        size = image_tokens(model.config)
        if self.strategy == "rank" or size is None:
            return super().tokens(model)
        return {0: torch.tensor(self.counts(model, size)[-1][1])}

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens or rows of the highest scores, bool [images, tokens].

        Where rows differ in length, those are kept that come before the first that does not fit; where none
        fits, the best tokens of the best row.

        Raises:
            QualityError: A score is not a number.
        """
        scores = finite(seen.tower(-2).received, seen.real, self.method())
        if self.strategy == "rank":
            return highest(scores, seen.real, keep)
        part, line, column = seen.places.unbind(2)
        row = part * (int(line.max()) + 1) + line
        zero = scores.new_zeros(len(scores), int(row.max()) + 1)
        patch = (seen.real & (column >= 0)).to(scores)
        sums, patches = zero.scatter_add(1, row, scores * patch), zero.scatter_add(1, row, patch)
        sizes = zero.scatter_add(1, row, seen.real.to(scores))
        order = rank(sums / patches.clamp(min=1), sizes > 0).argsort(1)
        fitting = sizes.gather(1, order).cumsum(1) <= keep[:, None]
        whole = torch.zeros_like(fitting).scatter(1, order, fitting).gather(1, row) & seen.real
        best = highest(scores, seen.real & (row == order[:, :1]), keep)
        return torch.where(fitting[:, :1], whole, best)
