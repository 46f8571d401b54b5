"""DivPrune: keep the visual tokens that differ most from one another, before the language model.

Source: Alvar et al. 2025, https://arxiv.org/abs/2503.02175
The released code may pick one index twice when tokens are equal; a token is picked once here.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from structprune.decide.token_target import Target
from structprune.errors import QualityError
from structprune.pruners.token._family import TokenPruner
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View
from structprune.solvers.farthest import farthest


class DivPrune(TokenPruner):
    """Maximise the least cosine distance between kept tokens, greedily."""

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.098))

    paper_positions: ClassVar = "compact"

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what the cosines of all pairs cost; a pick costs one vector operation beside them."""
        return size**2 * cost.hidden

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return tokens that are far apart, bool, shape [images, tokens].

        Raises:
            QualityError: A feature is not finite.
        """
        features = seen.features()
        if not bool(features.isfinite().all()):
            raise QualityError(
                f"{self.method()}: a feature of a visual token is not finite",
                hint="look whether the model computes NaN on this input, in this dtype",
            )
        return farthest(features, seen.real, keep)
