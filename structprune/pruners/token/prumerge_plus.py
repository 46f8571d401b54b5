"""PruMerge+: beside the visual tokens that stand out a uniform sample stays, so that no region is lost.

Source: Shang et al. 2024, https://arxiv.org/abs/2403.15388
The released code picks tokens of the sample again that stand out already; here a token stays once.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from structprune.pruners.token._outliers import OutlierTokens
from structprune.runtime.view import View


class PruMergePlus(OutlierTokens):
    """Keep the tokens whose attention stands out and a sample at equal distances; merge others into them.

    Args:
        spread: How many times as many are sampled as stand out, as far as the target allows.
    """

    spread: Annotated[float, Field(ge=0)] = 3.0

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return the tokens that stand out and the sample, at most `keep`, bool, shape [images, tokens].

        Raises:
            QualityError: An attention is not a number.
        """
        chosen, patch = self.standing_out(seen, keep), seen.patches
        count = chosen.sum(1)
        wanted = torch.floor(count * self.spread + 0.5).long().minimum(keep - count)[:, None]
        size, number = patch.sum(1, keepdim=True), (patch.cumsum(1) - 1).clamp(min=0)
        part = torch.arange(int(wanted.max()), device=patch.device)
        # The middle of each of as many equal parts as are wanted.
        middle = (2 * part + 1) * size // (2 * wanted).clamp(min=1)
        sampled = torch.zeros_like(patch).int()
        sampled.scatter_add_(1, torch.where(part < wanted, middle, 0), (part < wanted).int())
        return chosen | (patch & sampled.gather(1, number).bool())
