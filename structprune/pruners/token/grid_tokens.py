"""Grid tokens: every n-th token of an image, the baseline that knows nothing but order.

Source: Zhang et al. 2024, https://arxiv.org/abs/2410.04417 (uniform sampling as a baseline)
"""

import torch
from torch import Tensor

from structprune.pruners.token._family import TokenPruner
from structprune.runtime.view import View


class GridTokens(TokenPruner):
    """Keep tokens at equal distances along the raster."""

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return tokens floor((i + 1/2) * size / kept), bool, shape [images, tokens]."""
        chosen = torch.zeros_like(seen.real)
        for image, (size, kept) in enumerate(zip(seen.left.tolist(), keep.tolist(), strict=True)):
            places = torch.arange(kept, device=chosen.device)
            chosen[image, (2 * places + 1) * size // (2 * kept)] = True
        return chosen
