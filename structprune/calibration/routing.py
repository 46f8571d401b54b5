"""What a mixture sends to each of its experts, and what comes out of them: sums over tokens."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingSums:
    """Sums over all real tokens of one mixture.

    Attributes:
        chunks: Of each chunk of batches how many tokens were routed to each expert, and of those tokens the
            router's weight times the L2 norm of the expert's output, summed, shape [chunks, 2, experts],
            float64.
    """

    chunks: Tensor

    @classmethod
    def nothing(cls, experts: int, device: torch.device, chunks: int = 1) -> Self:
        """Return the sums before the first token."""
        return cls(torch.zeros(chunks, 2, experts, dtype=torch.float64, device=device))

    @property
    def tokens(self) -> Tensor:
        """Return how many tokens were routed to each expert, shape [experts], float64."""
        return self.chunks[:, 0].sum(dim=0)

    @property
    def contributions(self) -> Tensor:
        """Return what each expert contributed, over all tokens, shape [experts], float64."""
        return self.chunks[:, 1].sum(dim=0)

    def add(self, chunk: int, expert: int, outputs: Tensor, weights: Tensor) -> None:
        """Add what real tokens that were routed to one expert got from it.

        Args:
            chunk: Where the batch belongs.
            expert: Its index.
            outputs: Before they are weighed, shape [tokens, hidden].
            weights: The router's, renormalised as the family does it, shape [tokens].
        """
        # float32 because the squares of float16 activations overflow; float64, so that how tokens are batched
        # does not show in a sum.
        norms = outputs.float().norm(dim=-1)
        self.chunks[chunk, 0, expert] += len(weights)
        self.chunks[chunk, 1, expert] += (weights.float() * norms).double().sum()
