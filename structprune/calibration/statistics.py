"""Running statistics of what flows into a linear: sums over tokens, so that processes can add theirs.

One object serves every linear that reads the same input (q, k, v; gate, up). Each class remembers all that
the one before it does and more, so whoever needs least can read what was collected for whoever needs most.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# 1 MiB of float32: half of a common level-2 cache.
CACHE_ELEMENTS = 2**18
# Columns of a Gram matrix added at once: narrower pieces multiply slower, wider ones skip less of a triangle.
PANEL = 256


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
            self._add_rows(piece.float())

    def _add_rows(self, rows: Tensor) -> None:
        """Add a few tokens, shape [tokens, in], float32."""
        self.squares += rows.square().sum(dim=0)

    def merge(self, other: Self, share: float = 1.0) -> None:
        """Add what another process saw of the same input, or a share of what a like input saw."""
        self.tokens += round(share * other.tokens)
        self.squares += share * other.squares

    @property
    def norm(self) -> Tensor:
        """Return the L2 norm of each feature, shape [in], float32; all ones when no token was seen."""
        if self.tokens == 0:
            return torch.ones_like(self.squares, dtype=torch.float32)
        return self.squares.sqrt().float()


class InputMoments(InputNorm):
    """The norm, mean and variance of each input feature over all tokens."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.sums = torch.zeros_like(self.squares)

    def _add_rows(self, rows: Tensor) -> None:
        """Add a few tokens, shape [tokens, in], float32."""
        super()._add_rows(rows)
        # The few rows are summed in float32: sixteen times faster than to widen every value first.
        self.sums += rows.sum(dim=0)

    def merge(self, other: Self, share: float = 1.0) -> None:
        """Add what another process saw of the same input, or a share of what a like input saw."""
        super().merge(other, share)
        self.sums += share * other.sums

    @property
    def mean(self) -> Tensor:
        """Return the mean of each feature, shape [in], float32; zeros when no token was seen."""
        return (self.sums / max(self.tokens, 1)).float()

    @property
    def variance(self) -> Tensor:
        """Return the variance of each feature, shape [in], float32; zeros when no token was seen."""
        tokens = max(self.tokens, 1)
        # In float64 the difference of the two squares keeps far more digits than float32 shows.
        return (self.squares / tokens - (self.sums / tokens).square()).clamp_min(0).float()


class Gram(InputMoments):
    """The Gram matrix X^T X of an input over all tokens, and all of the above."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        # Right only on and above the diagonal: the matrix is symmetric, half of its products are enough.
        self._upper = torch.zeros(width, width, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add real tokens, shape [tokens, in]."""
        super().add(inputs)
        # float32 because products of float16 activations overflow, and their sums lose small terms.
        rows = inputs.float()
        for first in range(0, rows.shape[1], PANEL):
            panel = slice(first, first + PANEL)
            self._upper[panel, first:].addmm_(rows[:, panel].T, rows[:, first:])

    def merge(self, other: Self, share: float = 1.0) -> None:
        """Add what another process saw of the same input, or a share of what a like input saw."""
        super().merge(other, share)
        self._upper += share * other._upper

    @property
    def gram(self) -> Tensor:
        """Return X^T X, shape [in, in], float32; the next tokens are added to the same memory."""
        for first in range(0, len(self._upper), PANEL):
            panel, below = slice(first, first + PANEL), slice(first + PANEL, None)
            self._upper[below, panel] = self._upper[panel, below].T
        return self._upper


@dataclass(frozen=True)
class Sensitivity:
    """What is remembered of a linear's input together with what is remembered of its weights' gradient.

    Attributes:
        norm: L2 norm of each input feature over all calibration tokens, shape [in], float32.
        gradient: Mean over samples of the gradient's size, shape [out, in], float32.
        samples: Calibration sequences.
    """

    norm: Tensor
    gradient: Tensor
    samples: int


def widest(wanted: Iterable[type[InputNorm] | None]) -> type[InputNorm] | None:
    """Return the statistic that holds everything the wanted ones hold; None when none is wanted."""
    return max(filter(None, wanted), key=lambda kind: len(kind.__mro__), default=None)
