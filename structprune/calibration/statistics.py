"""Running statistics of what flows into a linear: sums over tokens, so that processes can add theirs.

Statistics are a set of parts. A score, a budget and a repair each declare the parts they read; one collector
per distinct input (q, k and v share one, as gate and up do) adds up exactly their union. Every part is summed
the same way whichever others stand beside it, so nobody's result depends on what somebody else asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from structprune.calibration.routing import RoutingSums
from structprune.models.gradients import GradientMean
from structprune.ranks import Ranks

Part = Literal["norm", "moments", "gram", "gradient", "gradient_l1", "gradient_l2", "routing"]
"""What can be remembered: of an input its features' norms, means and variances, or its Gram matrix; of a
weight its gradient, the samples' added up as they are, by size (l1) or by square (l2); of a mixture what it
routes to each of its experts."""

Parts = frozenset[Part]

NOTHING: Parts = frozenset()
# How the gradients of the samples are added up, by part.
GRADIENTS: Mapping[Part, GradientMean] = {"gradient": "signed", "gradient_l1": "l1", "gradient_l2": "l2"}

# 1 MiB of float32: half of a common level-2 cache.
CACHE_ELEMENTS = 2**18
# Rows of a Gram matrix added at once: narrower panels multiply slower, wider ones skip less of a triangle.
PANEL = 256


class InputSums:
    """Sums over all tokens of one input: those that the asked parts need, and no others.

    Args:
        parts: What will be read; gradients are none of an input's.
        width: Number of input features.
        device: Where the sums live.
        chunks: How many chunks the batches form.
        pairs: Whether sums of pairs of features are kept here; False where another process keeps them.

    Attributes:
        parts: As given.
        width: As given.
        device: As given.
    """

    def __init__(
        self, parts: Parts, width: int, device: torch.device, chunks: int = 1, *, pairs: bool = True
    ) -> None:
        self.parts, self.width, self.device = parts, width, device
        # float64, so that how tokens are batched does not show in a sum, and a row for each chunk, so that
        # nor does it show who summed it; [chunks, 0] where it is not needed.
        per_feature, per_pair = (
            width * bool(one) for one in (parts & {"norm", "moments"}, pairs and "gram" in parts)
        )
        widths = [1, per_feature, width if "moments" in parts else 0]
        self._chunks = torch.zeros(chunks, sum(widths), dtype=torch.float64, device=device)
        self._tokens, self._squares, self._sums = torch.split(self._chunks, widths, dim=1)
        # Panels of rows from the diagonal on: the matrix is symmetric, half of its products are enough. In
        # float64 they take what all of it does in float32, and sums of the batches' float32 products are all
        # but exact: who added which, and in which order, hardly ever shows in the float32 that is read.
        self._panels = [
            torch.zeros(min(PANEL, per_pair - first), per_pair - first, dtype=torch.float64, device=device)
            for first in range(0, per_pair, PANEL)
        ]
        self._gram: Tensor | None = None

    def add(self, inputs: Tensor, chunk: int = 0) -> None:
        """Add real tokens of a chunk, shape [tokens, in]."""
        self.add_features(inputs, chunk)
        self.add_pairs(inputs)

    def add_features(self, inputs: Tensor, chunk: int = 0) -> None:
        """Add real tokens of a chunk, shape [tokens, in], but not to the Gram matrix."""
        self._tokens[chunk] += inputs.shape[0]
        if self._squares.shape[1]:
            # Rows go in pieces whose squares stay in the processor's cache: three times faster than one pass.
            for piece in torch.split(inputs, max(1, CACHE_ELEMENTS // inputs.shape[1])):
                self._add_piece(piece, chunk)

    def _add_piece(self, piece: Tensor, chunk: int) -> None:
        # float32 because the squares of float16 activations overflow. The few rows of a piece are summed in
        # it, too: sixteen times faster than to widen every value first.
        rows = piece.float()
        self._squares[chunk] += rows.square().sum(dim=0)
        if self._sums.shape[1]:
            self._sums[chunk] += rows.sum(dim=0)

    def add_pairs(self, inputs: Tensor) -> None:
        """Add real tokens, shape [tokens, in], to the Gram matrix alone, if it is kept here."""
        assert self._gram is None
        if not self._panels:
            return
        # float32 because products of float16 activations overflow, and their sums lose small terms.
        rows = inputs.float()
        for panel in self._panels:
            first = rows.shape[1] - panel.shape[1]
            panel += rows[:, first : first + len(panel)].T @ rows[:, first:]

    def merge(self, other: Self, share: float = 1.0) -> None:
        """Add what was seen of a like input, or a share of it."""
        tokens = self.tokens + round(share * other.tokens)
        self._chunks += share * other._chunks
        # Whole tokens in all: which chunk they are of no longer matters.
        self._tokens.zero_()
        self._tokens[0] = tokens
        for panel, more in zip(self._panels, other._panels):  # of pairs where both know any
            panel.add_(more, alpha=share)

    def fill_up(self, average: Self) -> None:
        """Borrow as many tokens of a like input as are missing: fewer than features make no full rank."""
        missing = self.width - self.tokens
        if missing > 0 and average.tokens:
            self.merge(average, missing / average.tokens)

    def add_up_features(self, ranks: Ranks) -> None:
        """Add what the other processes of a run saw of the features of the same input; all get it.

        Chunk by chunk: the same bits, however many processes share the chunks.
        """
        ranks.add_apart(self._chunks)

    def add_up_pairs(self, ranks: Ranks, owner: int | None = None) -> None:
        """Add what they saw of pairs of features, the Gram matrix.

        Args:
            ranks: Those who share the run.
            owner: The only one that gets it, while the others forget theirs; None: all get it.
        """
        for panel in self._panels:
            ranks.add_in_order(panel, owner)
        if owner not in (None, ranks.number):
            self._panels.clear()

    @property
    def chunks(self) -> int:
        """Return how many chunks of batches are summed apart."""
        return len(self._chunks)

    @property
    def tokens(self) -> int:
        """Return how many tokens were seen."""
        return int(self._tokens.sum())

    @property
    def squares(self) -> Tensor:
        """Return the sum of each feature's squares, shape [in], float64; [0] where it was not asked for."""
        return self._squares.sum(dim=0)

    @property
    def sums(self) -> Tensor:
        """Return the sum of each feature, shape [in], float64; [0] where it was not asked for."""
        return self._sums.sum(dim=0)

    @property
    def norm(self) -> Tensor:
        """Return the L2 norm of each feature, shape [in], float32; all ones when no token was seen."""
        self._require("norm")
        if self.tokens == 0:  # an expert that nothing reached: its weights are then told apart by size alone
            return torch.ones_like(self.squares, dtype=torch.float32)
        return self.squares.sqrt().float()

    @property
    def mean(self) -> Tensor:
        """Return the mean of each feature, shape [in], float32; zeros when no token was seen."""
        self._require("moments")
        return (self.sums / max(self.tokens, 1)).float()

    @property
    def variance(self) -> Tensor:
        """Return the variance of each feature, shape [in], float32; zeros when no token was seen."""
        self._require("moments")
        tokens = max(self.tokens, 1)
        # In float64 the difference of the two squares keeps far more digits than float32 shows.
        return (self.squares / tokens - (self.sums / tokens).square()).clamp_min(0).float()

    @property
    def gram(self) -> Tensor:
        """Return X^T X, shape [in, in], float32, to the process that owns it; then no token is added."""
        self._require("gram")
        if self._gram is None:
            if not self._panels:
                raise LookupError("another process of the run has this Gram matrix, and solves what reads it")
            width = self.width
            self._gram = self._panels[0].new_empty(width, width, dtype=torch.float32)
            while self._panels:  # each goes once it is copied, so that both are hardly in memory at once
                panel = self._panels.pop(0)
                first = width - panel.shape[1]
                here, below = slice(first, first + len(panel)), slice(first + len(panel), None)
                self._gram[here, first:] = panel
                self._gram[below, here] = self._gram[here, below].T
        return self._gram

    def _require(self, part: Part) -> None:
        if part not in self.parts:
            raise LookupError(f"{part!r} was not collected, only {sorted(self.parts)}: declare it in `parts`")


@dataclass(frozen=True)
class Statistics:
    """What a score, a budget, a repair or a solver is told of one matrix.

    Asking for a part that nobody declared is an error of the program, and raises LookupError.

    Attributes:
        inputs: The sums of what the matrix reads, shared by all that read the same; None without data.
        weight_gradient: Mean over samples of the gradient, as the part says, shape [out, in], float32; None
            unless asked.
        samples: Calibration sequences.
        routed: Of the mixture that the matrix is an expert's of; None unless asked.
    """

    inputs: InputSums | None = None
    weight_gradient: Tensor | None = None
    samples: int = 0
    routed: RoutingSums | None = None

    @property
    def norm(self) -> Tensor:
        """Return the L2 norm of each input feature over all tokens, shape [in], float32."""
        return self._sums().norm

    @property
    def mean(self) -> Tensor:
        """Return the mean of each input feature over all tokens, shape [in], float32."""
        return self._sums().mean

    @property
    def variance(self) -> Tensor:
        """Return the variance of each input feature over all tokens, shape [in], float32."""
        return self._sums().variance

    @property
    def gram(self) -> Tensor:
        """Return X^T X over all tokens, shape [in, in], float32."""
        return self._sums().gram

    @property
    def tokens(self) -> int:
        """Return how many real tokens the input had."""
        return self._sums().tokens

    @property
    def gradient(self) -> Tensor:
        """Return the gradient's mean over samples, shape [out, in], float32.

        Signed for the part "gradient"; of its size for "gradient_l1", the root of its mean square for
        "gradient_l2": a method declares one of the three.
        """
        if self.weight_gradient is None:
            raise LookupError(f"no gradient was collected: declare one of {sorted(GRADIENTS)} in `parts`")
        return self.weight_gradient

    @property
    def routing(self) -> RoutingSums:
        """Return what was routed to each expert of the mixture."""
        if self.routed is None:
            raise LookupError("no routing was collected: declare 'routing' in `parts`")
        return self.routed

    def _sums(self) -> InputSums:
        if self.inputs is None:
            raise LookupError("nothing was collected of the inputs: declare what is read in `parts`")
        return self.inputs


def pair_bytes(width: int) -> int:
    """Return at most how many bytes the Gram matrix of an input takes while it is collected or read."""
    # Half of it in float64, or all in float32; a panel's product, that in float64, and a panel's excess.
    return 4 * width**2 + 16 * PANEL * width


def input_parts(parts: Parts) -> Parts:
    """Return those of the parts that are sums over an input's tokens."""
    return parts - GRADIENTS.keys()


def gradient_means(parts: Parts) -> tuple[GradientMean, ...]:
    """Return how gradients are to be added up over samples; in no way where nobody asks for them."""
    return tuple(mean for part, mean in GRADIENTS.items() if part in parts)
