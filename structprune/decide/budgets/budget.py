"""What every budget is: how much leaves altogether, and in which proportions the blocks share it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import ClassVar, final

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from structprune.calibration.statistics import NOTHING, Parts, Statistics
from structprune.decide.counts import apportion, removed_count

# No block loses everything, whatever the spread: the model would be cut in two.
MOST_REMOVED = Fraction(99, 100)


class Budget(BaseModel, ABC):
    """Says how unequal the blocks' shares are; the total stays exactly what was asked for.

    Attributes:
        parts: What it reads of the dense model before anything is decided; nothing when it looks at no data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: ClassVar[Parts] = NOTHING

    def measure(self, weights: Sequence[Tensor], seen: Sequence[Statistics]) -> Tensor:
        """Return what is remembered of a block, float64; zero, shape [], where the budget looks at none.

        Args:
            weights: The chosen linears of the block, each [out, in]; none in a block that is left dense.
            seen: What was collected of each of them.
        """
        return torch.zeros((), dtype=torch.float64)

    @abstractmethod
    def shares(self, asked: Fraction, measured: Sequence[Tensor]) -> list[Fraction]:
        """Return the fraction removed from each block, in [0, 1); only the proportions are binding.

        Args:
            asked: Fraction removed altogether.
            measured: What `measure` returned of each block.
        """

    def asked(self, sparsity: float | str) -> float | str:
        """Return what was asked for, as the user says it."""
        return sparsity

    def total(self, prunable: int, sparsity: float | str, model: nn.Module) -> int:
        """Return how many of the `prunable` weights leave altogether.

        Args:
            prunable: Weights in all chosen linears.
            sparsity: Fraction of them to be removed.
            model: All parameters, for a budget that counts them.
        """
        return removed_count(prunable, sparsity)

    @final
    def counts(
        self,
        sizes: Sequence[Mapping[str, int]],
        sparsity: float | str,
        model: nn.Module,
        measured: Sequence[Tensor],
    ) -> dict[str, int]:
        """Return how many weights leave each linear, by label; together exactly the total.

        Args:
            sizes: The weights of each chosen linear by label, block by block.
            sparsity: Fraction removed altogether.
            model: All parameters.
            measured: What `measure` returned of each block.

        Raises:
            UsageError: The budget does not fit the model.
        """
        of = {label: size for block in sizes for label, size in block.items()}
        prunable = sum(of.values())
        total = self.total(prunable, sparsity, model)
        shares = self.shares(Fraction(total, prunable), measured)
        wanted = {
            label: share * size
            for block, share in zip(sizes, shares, strict=True)
            for label, size in block.items()
        }
        return apportion(total, wanted, of)


def bounded_share(share: Fraction) -> Fraction:
    """Return the nearest share that leaves something of a block."""
    return min(max(share, Fraction(0)), MOST_REMOVED)
