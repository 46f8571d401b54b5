"""CFSP: channels leave by their share of the weights times their activation, fewer where a block does more.

Source: Wang et al. 2024, https://arxiv.org/abs/2409.13199

The released code divides each weight by a sum over the same axis over which it then averages, so that all
weights cancel and only the norm of the activation is left. Here the share is that of the channel among all
channels, as the paper means it; `compat` ranks as the code does. Hardware likes `multiple: 128`, the paper's.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from structprune.calibration.statistics import Parts
from structprune.decide.budgets.sigmoid import SigmoidBudget
from structprune.decide.budgets.width_union import AnyWidthBudget
from structprune.decide.targets import split_words
from structprune.decide.unit_counts import WidthUnit, unit_places
from structprune.models.arch import Linear
from structprune.pruners.seen import Seen
from structprune.pruners.structure._width import WidthPruner
from structprune.pruners.structure._width_block import WidthBlock


class Cfsp(WidthPruner):
    """Score a channel by its share of gate, up and down projection, times the norm of its activation.

    Args:
        units: Only channels: the paper leaves attentions whole.
        budget: The paper gives more to blocks that turn the states more.
        compat: Rank by the norm of the activation alone, as the released code does.
    """

    units: Annotated[tuple[Literal["channel"], ...], BeforeValidator(split_words)] = ("channel",)
    budget: AnyWidthBudget = Field(default_factory=SigmoidBudget)
    compat: bool = False

    parts: ClassVar[Parts] = frozenset({"norm"})
    # Shares of a block's own sums say nothing of other blocks; they compete as they are.
    per_parameter: ClassVar[bool] = False

    def score_units(
        self, known: WidthBlock, readers: Mapping[WidthUnit, Linear], seen: Seen
    ) -> dict[WidthUnit, Tensor]:
        """Return the importance of the channels, shape [channels].

        With s the norm of the activations, every row of |W_down| s and every column of |W_up| and |W_gate| is
        divided by its sum over all channels; the means over the hidden size are added, and multiplied by s.

        Args:
            known: The block.
            readers: The down projection, which reads the channels; none of a block that is skipped.
            seen: L2 norm of each channel over all tokens, shape [channels].
        """
        if "channel" not in readers:
            return {}
        norm = seen.of(readers["channel"]).norm
        if self.compat:
            return {"channel": norm}
        shares = norm.new_zeros(len(norm))
        for place in unit_places(known.module, known.arch, "channel"):
            weight = known.module.get_parameter(place.path)
            if weight.ndim < 2:
                continue
            sizes = weight.detach().float().abs().movedim(place.axis, 0)
            if place.path == f"{known.arch.down}.weight":
                sizes = sizes * norm[:, None]
            # A fused matrix holds gate and up one after the other.
            for part in torch.split(sizes, len(norm)):
                shares += (part / part.sum(dim=0).clamp_min(1e-30)).mean(dim=1)
        return {"channel": shares * norm}
