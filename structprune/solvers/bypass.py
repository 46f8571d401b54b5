"""What makes up for a skipped attention in the feed-forward behind it: an adapter, and a refit.

Source: Wu et al. 2024, https://arxiv.org/abs/2403.15226 (the adapter, and that it merges)

The paper trains its adapter, and lets a router and a pooled vector of the prompt weigh it. Here both are
constants of the calibration data: then the adapter is an affine map of what the feed-forward reads, which
ridge regression fits and two matrices take in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from structprune.errors import QualityError
from structprune.ranks import Ranks
from structprune.solvers.hessian import damp_hessian


@dataclass(frozen=True)
class Bypass:
    """What makes up for a skipped attention.

    Attributes:
        adapter: An affine map of what the feed-forward reads, merged into its first two matrices.
        refit: New values of its last matrix.
        damping: Of both fits, in mean diagonals.
    """

    adapter: bool
    refit: bool
    damping: float


class RidgeSums:
    """Sums over tokens from which a linear map with or without an offset is fitted.

    Args:
        inputs: Features that are read.
        outputs: Features that are to come out.
        device: Where the sums are.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.tokens = 0
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._cross = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self._read = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._due = torch.zeros(outputs, dtype=torch.float64, device=device)

    @staticmethod
    def nbytes(inputs: int, outputs: int) -> int:
        """Return at most how many bytes sums and a fit take, the copies that are alive at once included."""
        # Six matrices [inputs, inputs] and five [outputs, inputs] of float64: a twentieth more than measured.
        return 8 * (6 * inputs**2 + 5 * outputs * inputs)

    def add(self, read: Tensor, due: Tensor) -> None:
        """Add tokens.

        Args:
            read: Shape [tokens, inputs].
            due: What is to come out, shape [tokens, outputs].
        """
        read, due = read.float(), due.float()
        self.tokens += len(read)
        self._gram += read.T @ read
        self._cross += due.T @ read
        self._read += read.sum(dim=0, dtype=torch.float64)
        self._due += due.sum(dim=0, dtype=torch.float64)

    def fit_together(
        self, ranks: Ranks, owner: int, toward: Tensor, damping: float, *, offset: bool
    ) -> tuple[Tensor, Tensor]:
        """Add up what the processes of a run saw, and return what one of them fits to it; see `fit`.

        Args:
            ranks: Those who share the run.
            owner: The one that gets the sums.
            toward: As for `fit`.
            damping: As for `fit`.
            offset: As for `fit`.

        Raises:
            QualityError: The sums are not finite, or the system is singular; all raise it.
        """
        tokens = torch.tensor([float(self.tokens)], dtype=torch.float64)
        for sums in (tokens, self._gram, self._cross, self._read, self._due):
            ranks.add_in_order(sums, owner)

        def fit() -> tuple[None, dict[str, Tensor]]:
            if ranks.number != owner:
                return None, {}
            self.tokens = int(tokens)
            fitted, shift = self.fit(toward, damping, offset=offset)
            return None, {"fitted": fitted, "shift": shift}

        _, found = ranks.share(fit)[owner]
        return found["fitted"].to(toward.device), found["shift"].to(toward.device)

    def fit(self, toward: Tensor, damping: float, *, offset: bool) -> tuple[Tensor, Tensor]:
        """Return the map that is nearest to what is due, and its offset: [outputs, inputs] and [outputs].

        Minimises |W x + b - y|^2 summed over tokens + damping * mean(x^2) * |W - toward|^2.

        Args:
            toward: The map that the ridge pulls to, shape [outputs, inputs].
            damping: In mean diagonals of the Gram matrix.
            offset: Fit b too; else it is 0.

        Raises:
            QualityError: The sums are not finite, or the system is singular.
        """
        count = max(self.tokens, 1)
        mean, due = (self._read / count, self._due / count) if offset else (self._read * 0, self._due * 0)
        gram = self._gram - count * torch.outer(mean, mean)
        # Rounding may leave a little below zero where an input is constant.
        gram.diagonal().clamp_(min=0)
        damped = damp_hessian(gram, damping, torch.float64)
        start = toward.double()
        missing = self._cross - count * torch.outer(due, mean) - start @ gram
        lower, failed = torch.linalg.cholesky_ex(damped.hessian)
        if bool(failed) or not bool(missing.isfinite().all()):
            raise QualityError(
                f"the fit of a map of {len(gram)} features met a singular system, or what is not finite",
                hint="raise the damping, or use more calibration tokens",
            )
        fitted = start + torch.cholesky_solve(missing.T, lower).T
        return fitted.float(), (due - fitted @ mean).float()


@dataclass(frozen=True)
class FeedForward:
    """The first half of a gated feed-forward: act(gate x + a) * (up x + b).

    Attributes:
        gate: Shape [channels, hidden].
        gate_bias: Shape [channels].
        up: Shape [channels, hidden].
        up_bias: Shape [channels].
        act: The activation.
    """

    gate: Tensor
    gate_bias: Tensor
    up: Tensor
    up_bias: Tensor
    act: torch.nn.Module

    def merged(self, adapter: Tensor, offset: Tensor) -> "FeedForward":
        """Return the same of adapter x + offset, as a feed-forward of x."""
        gate, up = self.gate.float(), self.up.float()
        return FeedForward(
            gate @ adapter,
            self.gate_bias.float() + gate @ offset,
            up @ adapter,
            self.up_bias.float() + up @ offset,
            self.act,
        )

    def stored(self, dtype: torch.dtype) -> "FeedForward":
        """Return it as it is once it was rounded to a dtype."""
        gate, up = (
            (self.gate.to(dtype), self.gate_bias.to(dtype)),
            (self.up.to(dtype), self.up_bias.to(dtype)),
        )
        return FeedForward(*gate, *up, self.act)

    def channels(self, read: Tensor) -> Tensor:
        """Return what `down` reads, shape [tokens, channels], float32."""
        read = read.float()
        gate = functional.linear(read, self.gate.float(), self.gate_bias.float())
        inner: Tensor = self.act(gate) * functional.linear(read, self.up.float(), self.up_bias.float())
        return inner
