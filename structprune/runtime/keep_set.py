"""Which tokens of one forward go on: the only form in which the rest of the engine knows a selection.

Places are those of the forward as the caller made it, before anything was dropped. Rows of a batch may keep
different numbers: shorter ones begin with slots that are computed and seen by nobody.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeepSet:
    """Tokens of every row of a batch.

    Attributes:
        index: Place of the token in each slot, ascending where valid, shape [batch, slots].
        valid: Whether a slot holds a token that was kept, shape [batch, slots]; others stand on the left.
    """

    index: Tensor
    valid: Tensor

    @classmethod
    def of(cls, kept: Tensor) -> "KeepSet":
        """Return the set of the tokens marked in `kept`, bool [batch, tokens]."""
        slots = int(kept.sum(1).max())
        # Stable: what is dropped goes to the left, what is kept stays in its order.
        order = torch.argsort(kept.to(torch.uint8), dim=1, stable=True)
        index = order[:, order.shape[1] - slots :]
        return cls(index, kept.gather(1, index))

    @cached_property
    def even(self) -> bool:
        """Tell whether every row keeps as many, so that no slot is empty."""
        return bool(self.valid.all())

    def gather(self, states: Tensor, dim: int = 1) -> Tensor:
        """Return what a tensor of all tokens holds of the kept ones.

        Args:
            states: Batch first, or of batch 1; tokens along `dim`.
            dim: Which dimension is that of tokens.
        """
        return gather(states, self.index, dim)

    def slots_in(self, wider: "KeepSet | None", length: int) -> Tensor:
        """Return in which slot of a wider set every token of this one stands, shape [batch, slots].

        Args:
            wider: None for all tokens.
            length: Tokens of the forward.
        """
        if wider is None:
            return self.index
        slots = torch.arange(wider.index.shape[1], device=self.index.device).expand_as(wider.index)
        # An empty slot of the wider set names a token that was dropped, so it overwrites no kept one.
        table = self.index.new_zeros(len(self.index), length).scatter(1, wider.index, slots)
        return table.gather(1, self.index)

    def scatter(self, states: Tensor, length: int) -> Tensor:
        """Return states of all tokens, zero where a token was dropped.

        Args:
            states: Of this set's slots, shape [batch, slots, features].
            length: Tokens of the forward.
        """
        full = states.new_zeros(len(states), length, states.shape[-1])
        here = states.masked_fill(~self.valid[..., None], 0)
        # Added: an empty slot may name the place of a kept token, and of two writers either might win.
        return full.scatter_add(1, self.index[..., None].expand_as(here), here)

    def mask(self, length: int) -> Tensor:
        """Return whether each token of the forward is kept, bool [batch, tokens]."""
        return self.valid.new_zeros(len(self.valid), length).scatter(1, self.index, self.valid)


def gather(states: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Return the entries of a tensor at `index` [batch, n] along one dimension.

    Args:
        states: Batch first; a batch of 1 serves every row.
        index: Which entries, row by row.
        dim: Which dimension is indexed.
    """
    if states.shape[0] != len(index):
        states = states.expand(len(index), *states.shape[1:])
    shape = [1] * states.ndim
    shape[0], shape[dim] = index.shape
    wide = list(states.shape)
    wide[dim] = index.shape[1]
    return states.gather(dim, index.view(shape).expand(wide))
