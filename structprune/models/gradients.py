"""How large the gradients of a weight are over samples: sums, so that no sample's gradient is kept."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["l1", "l2"]
NORMS: tuple[Norm, ...] = get_args(Norm)


class GradientNorm:
    """The mean size, over samples, of every element of the gradient of one weight.

    Args:
        weight: The matrix, shape [out, in]; only its shape and device matter.
        samples: How many samples the means are over; the gradient of one never added is zero.
        norms: Which of the two means to keep, one float32 matrix each.
    """

    def __init__(self, weight: Tensor, samples: int, norms: Sequence[Norm] = NORMS) -> None:
        self.samples = samples
        self._sums = {norm: torch.zeros(weight.shape, device=weight.device) for norm in norms}

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of one sample's loss, shape [out, in], float32; it is used up."""
        if "l2" in self._sums:
            self._sums["l2"].addcmul_(gradient, gradient)
        if "l1" in self._sums:
            self._sums["l1"].add_(gradient.abs_())

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
