"""VScan: scan the vision tower globally and locally, then let the question choose in the middle of the model.

Source: Zhang et al. 2026, https://arxiv.org/abs/2505.22654
Half of what the first stage keeps is what the tower's last layer but one attends to, the other half what a
shallow layer attends to in each window; a third of that goes on after the middle block. The windows are those
of a grid of four by four here.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from structprune.decide.token_target import Target
from structprune.pruners.token._looking import LookingTokens
from structprune.pruners.token._merged import means
from structprune.pruners.token._scored import finite, highest, rank
from structprune.pruners.token._staged import StagedTokens
from structprune.pruners.token._windows import ranks_inside, windows
from structprune.runtime.flops import BlockCost
from structprune.runtime.view import View

# Layers of the tower: what it attends to at the end, and a quarter of the way, the paper's sixth of 24.
GLOBAL, LOCAL = -2, 0.25


class VScan(StagedTokens, LookingTokens):
    """Keep what the tower attends to, merging the others into it; later what the last token looks at.

    Args:
        local: Share of the first stage's tokens that windows share evenly.
        across: Number of windows across an image, and down.
    """

    target: Target = Field(default_factory=lambda: Target(keep_ratio=1 / 18))
    local: Annotated[float, Field(ge=0, le=1)] = 0.5
    across: Annotated[int, Field(ge=1)] = 4

    # 64 tokens of 576 in a block, on average: 96, then 32.
    paper_stages: ClassVar = {0: 1 / 6, 16: 1 / 18}
    tower_layers: ClassVar = (GLOBAL, LOCAL)
    paper_positions: ClassVar = "compact"

    def operations(self, cost: BlockCost, size: int, counts: Sequence[tuple[int, int]]) -> int:
        """Return what the cosines of all pairs cost, and one row of attention in the middle."""
        middle = max(self.stages(len(counts)))
        return size**2 * cost.hidden + counts[middle - 1][1] * cost.queries

    def choose(self, seen: View, keep: Tensor) -> Tensor:
        """Return what both scans take, or what the last token looks at, bool [images, tokens].

        Raises:
            QualityError: An attention is not a number.
        """
        if seen.block:
            return highest(finite(seen.paid_by_last(), seen.real, self.method()), seen.real, keep)
        everywhere, inside = (self.attention(seen, layer) for layer in (GLOBAL, LOCAL))
        patch = seen.patches
        wanted = torch.floor((keep * self.local).round(decimals=9)).long()
        # Where ends of lines stay for want of patches, windows have nothing to add.
        wanted = torch.where(keep <= patch.sum(1), wanted, 0)
        taken = highest(everywhere, seen.real, keep - wanted)
        free = patch & ~taken
        # The best of every window, then the second best; of the last round the best of all.
        rounds = ranks_inside(inside, windows(seen, self.across), free)
        order = rank(inside, free).argsort(1)
        rounds = torch.where(free, rounds, seen.real.shape[1]).gather(1, order)
        order = order.gather(1, torch.argsort(rounds, dim=1, stable=True))
        return taken | ((order.argsort(1) < wanted[:, None]) & free)

    def merge(self, seen: View, chosen: Tensor) -> Tensor | None:
        """Return the means of the tokens that stay with those most like them; None in the middle."""
        if seen.block:
            return None
        unit, patch = normalize(finite(seen.features(), seen.real, self.method()), dim=-1), seen.patches
        open_to = chosen & patch
        alike = (unit @ unit.transpose(1, 2)).masked_fill(~open_to[:, None], -torch.inf)
        places = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
        goes = patch & ~chosen & open_to.any(1, keepdim=True)
        return means(torch.where(goes, alike.argmax(2), places))
