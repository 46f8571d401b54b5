"""The masked low-rank change of fused experts, which are parameters and no modules: a parametrisation.

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from structprune.checkpoint.adapter import LowRankChange, add_masked, round_kept


class MaskedExperts(nn.Module):
    """The same change for a parameter that holds one matrix per expert; a parametrisation of it.

    Args:
        weight: The parameter, shape [experts, out, in].
        rank: Directions for each expert.
        alpha: The scaling is alpha / rank.
    """

    rounding: torch.dtype | None = None

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        experts, rows, columns = weight.shape
        self.scaling = alpha / rank
        bound = 1 / math.sqrt(columns)  # the range that PEFT's kaiming_uniform_(a=sqrt(5)) gives each A
        # Drawn on the CPU, as PEFT draws its own: one seed then means the same factors on every device.
        drawn = torch.empty(experts, rank, columns).uniform_(-bound, bound)
        self.right = nn.Parameter(drawn.to(weight))
        self.left = nn.Parameter(weight.new_zeros(experts, rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed parameter, shape [experts, out, in]."""
        with in_full_precision(weight):
            merged = add_masked(weight, self.factors().delta())
        if self.rounding is None:
            return merged
        return round_kept(merged, weight, self.rounding).to(weight.dtype)

    def factors(self) -> LowRankChange:
        """Return the factors of all experts."""
        return LowRankChange(self.left, self.right, self.scaling)


def in_full_precision(weight: Tensor) -> AbstractContextManager[Any]:
    """Compute in the dtypes that the tensors have, whatever is multiplied in around this.

    Args:
        weight: On the device of the computation.
    """
    return torch.autocast(weight.device.type, enabled=False)


def built_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the changed experts live while their module runs; its backward pass runs it once more.

    Autograd would save the changed experts of every block, a second model in memory.

    Args:
        forward: The module's own.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        # A loop over experts asks for the parametrised weight once for each of them.
        with parametrize.cached():
            return forward(*args, **kwargs)

    # Nothing here draws random numbers, whose state would be kept for the second time.
    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
