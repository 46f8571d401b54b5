"""Means over samples of the gradient of a weight: sums, so that no sample's gradient is kept."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from structprune.ranks import Ranks

GradientMean = Literal["signed", "l1", "l2"]
MEANS: tuple[GradientMean, ...] = get_args(GradientMean)


class GradientMeans:
    """The mean, or the mean size, over samples of every element of the gradient of one weight.

    Args:
        weight: The matrix, shape [out, in]; only its shape and device matter.
        samples: How many samples the means are over; the gradient of one never added is zero.
        means: Which means to keep, one float32 matrix each.
    """

    def __init__(self, weight: Tensor, samples: int, means: Sequence[GradientMean] = MEANS) -> None:
        self.samples = samples
        self._sums = {mean: torch.zeros(weight.shape, device=weight.device) for mean in means}

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of one sample's loss, shape [out, in], float32; it is used up."""
        if "l2" in self._sums:
            self._sums["l2"].addcmul_(gradient, gradient)
        if "signed" in self._sums:
            self._sums["signed"].add_(gradient)
        if "l1" in self._sums:
            self._sums["l1"].add_(gradient.abs_())

    def add_up(self, ranks: Ranks) -> None:
        """Add what the other processes of a run added."""
        for sums in self._sums.values():
            ranks.add_in_order(sums)

    @property
    def signed(self) -> Tensor:
        """Return the mean gradient, shape [out, in], float32.

        Raises:
            KeyError: It was not asked for.
        """
        return self._sums["signed"] / self.samples

    @property
    def l1(self) -> Tensor:
        """Return the mean absolute gradient, shape [out, in], float32.

        Raises:
            KeyError: It was not asked for.
        """
        return self._sums["l1"] / self.samples

    @property
    def l2(self) -> Tensor:
        """Return the root of the mean squared gradient, shape [out, in], float32.

        Raises:
            KeyError: It was not asked for.
        """
        return (self._sums["l2"] / self.samples).sqrt_()
