"""Running statistics of what flows into a linear: sums over tokens, so that processes can add theirs.

One object serves every linear that reads the same input (q, k, v; gate, up).
"""

from typing import Protocol, Self

import torch
from torch import Tensor

# 1 MiB of float32: half of a common level-2 cache.
CACHE_ELEMENTS = 2**18


class Statistic(Protocol):
    """What calibration remembers of one input."""

    tokens: int

    def __init__(self, width: int, device: torch.device) -> None:
        """Start with no token seen of an input of `width` features."""

    def add(self, inputs: Tensor) -> None:
        """Add real tokens, shape [tokens, in], any float dtype."""

    def merge(self, other: Self) -> None:
        """Add what another process saw of the same input."""


class InputNorm:
    """The L2 norm of each input feature over all tokens.

    Args:
        width: Number of input features.
        device: Where the sums live.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        # float64, so that how tokens are batched does not show in the sum.
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add real tokens, shape [tokens, in]."""
        self.tokens += inputs.shape[0]
        # Rows go in pieces whose squares stay in the processor's cache: three times faster than one pass.
        for piece in torch.split(inputs, max(1, CACHE_ELEMENTS // inputs.shape[1])):
            # float32 because the squares of float16 activations overflow.
            self.squares += piece.float().square().sum(dim=0)

    def merge(self, other: Self) -> None:
        """Add what another process saw of the same input."""
        self.tokens += other.tokens
        self.squares += other.squares

    @property
    def norm(self) -> Tensor:
        """Return the L2 norm of each feature, shape [in], float32; all ones when no token was seen.

        An expert that no calibration token reached has nothing to say about its inputs: they count equally.
        """
        if self.tokens == 0:
            return torch.ones_like(self.squares, dtype=torch.float32)
        return self.squares.sqrt().float()
