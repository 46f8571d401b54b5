"""What a mixture sends to each of its experts, and what comes out of them: sums over tokens."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingSums:
    """Sums over all real tokens of one mixture.

    Attributes:
        tokens: How many tokens were routed to each expert, shape [experts], float64.
        contributions: Of those tokens the router's weight times the L2 norm of the expert's output, summed,
            shape [experts], float64.
    """

    tokens: Tensor
    contributions: Tensor

    @classmethod
    def nothing(cls, experts: int, device: torch.device) -> Self:
        """Return the sums before the first token."""
        empty = torch.zeros(2, experts, dtype=torch.float64, device=device)
        return cls(*empty)

    def add(self, expert: int, outputs: Tensor, weights: Tensor) -> None:
        """Add what real tokens that were routed to one expert got from it.

        Args:
            expert: Its index.
            outputs: Before they are weighed, shape [tokens, hidden].
            weights: The router's, renormalised as the family does it, shape [tokens].
        """
        # float32 because the squares of float16 activations overflow; float64, so that how tokens are batched
        # does not show in a sum.
        norms = outputs.float().norm(dim=-1)
        self.tokens[expert] += len(weights)
        self.contributions[expert] += (weights.float() * norms).double().sum()
