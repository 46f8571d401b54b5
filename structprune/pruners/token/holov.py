"""HoloV: divide what is kept among crops of an image, so that no salient corner takes all of it.

Source: Zou et al. 2025, https://arxiv.org/abs/2510.02912
The released code takes runs of the raster for crops, weighs the variance with 0.09 for the quotas, keeps by
attention alone and in its order (`compat`), and leaves rows of zeros where a crop is too small for its quota:
that goes to the other crops here.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from structprune.decide.quotas import quotas
from structprune.decide.token_target import Target
from structprune.pruners.token._looking import LookingTokens
from structprune.pruners.token._merged import reordered
from structprune.pruners.token._scored import finite
from structprune.pruners.token._windows import ordered, ranks_inside, windows
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View


def _square(number: int) -> int:
    if isqrt(number) ** 2 != number:
        raise ValueError("crops: as many across as down, so a square number, such as 16")
    return number


class HoloV(LookingTokens):
    """Score a token by what the class token pays it, and by how its likeness to others of its crop varies.

    Args:
        crops: Number of crops of an image, a square number; of one in tiles, of the whole and of the tiles.
        tau: Power of a crop's mean score that its quota is in proportion to; 0 gives all as many.
        compat: Choose and order as the released code does.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=0.111))
    crops: Annotated[int, Field(ge=1), AfterValidator(_square)] = 16
    tau: Annotated[float, Field(ge=0)] = 1.0
    compat: bool = False

    tower_layers: ClassVar = (-2,)
    paper_positions: ClassVar = "compact"

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what the cosines of all pairs cost."""
        return size**2 * cost.hidden

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens of the highest scores of each crop, bool [images, tokens].

        Raises:
            QualityError: A feature or an attention is not a number.
        """
        attention, crop = self.attention(seen), self._crop(seen)
        patch = seen.patches
        varying = self._varying(seen, crop, patch)
        scale = attention.sum(1, keepdim=True) / varying.sum(1, keepdim=True).clamp(min=1e-30)
        score = attention + (0.09 if self.compat else 1.0) * scale * varying
        inside = one_hot(crop, int(crop.max()) + 1) * seen.real[..., None]
        patches = (inside * patch[..., None]).sum(1)
        mean = (inside * score[..., None]).sum(1) / patches.clamp(min=1)
        allowed = quotas(mean**self.tau * (patches > 0), inside.sum(1), keep)
        ranks = ranks_inside(attention if self.compat else score, crop, seen.real)
        return (ranks < allowed.gather(1, crop)) & seen.real

    def merge(self, seen: View, chosen: Tensor) -> Tensor | None:
        """Return the released order: crop by crop, by attention; None where raster order stays."""
        if not self.compat:
            return None
        return reordered(chosen, ordered(self.attention(seen), self._crop(seen), chosen))

    def _crop(self, seen: View) -> Tensor:
        """Return in which crop each token is, long [images, tokens]."""
        if not self.compat:
            return windows(seen, isqrt(self.crops))
        places = torch.arange(seen.real.shape[1], device=seen.real.device)
        return (places * self.crops // seen.left[:, None]).clamp(max=self.crops - 1)

    def _varying(self, seen: View, crop: Tensor, patch: Tensor) -> Tensor:
        """Return the variance of each token's cosines with the others of its crop, [images, tokens]."""
        unit = normalize(finite(seen.features(), seen.real, self.method()), dim=-1)
        cosine = unit @ unit.transpose(1, 2)
        other = (crop[:, :, None] == crop[:, None]) & patch[:, :, None] & patch[:, None]
        other.diagonal(dim1=1, dim2=2).fill_(False)
        count = other.sum(2).clamp(min=1)
        mean = (cosine * other).sum(2) / count
        return ((cosine - mean[..., None]) ** 2 * other).sum(2) / count
