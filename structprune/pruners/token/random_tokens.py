"""Random tokens: the baseline that every choice of visual tokens must beat.

Source: Chen et al. 2024, https://arxiv.org/abs/2403.06764 (random dropping as a baseline)
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from structprune.pruners.token._scored import ScoredTokens
from structprune.runtime.view import View


class RandomTokens(ScoredTokens):
    """Keep tokens by chance, the same places in every image of one size.

    Args:
        seed: Draws the places; a recipe's seed unless given.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def score(self, seen: View) -> Tensor:
        """Return independent uniform numbers, float32, shape [images, tokens]."""
        scores = torch.zeros(seen.real.shape)
        # By the image's own size, so that no other image of a batch has a say in it.
        for image, size in enumerate(seen.left.tolist()):
            scores[image, :size] = torch.rand(size, generator=torch.Generator().manual_seed(self.seed))
        return scores.to(seen.real.device)
