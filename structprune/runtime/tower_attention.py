"""Rows of an attention of the vision tower, computed anew in float32, whatever kernel the tower runs."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from structprune.runtime.attention import rotated

# Queries whose attention is in memory at once.
CHUNK = 256


@dataclass(frozen=True, eq=False)
class TowerAttention:
    """What one attention of the tower read.

    Attributes:
        module: The attention.
        states: Its input, [squares, patches, hidden], or [patches, hidden] where segments stand in one row.
        given: What else it is given, by name.
    """

    module: Any
    states: Tensor
    given: dict[str, Any]

    @cached_property
    def _projected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys, and keys before rotation, float32 [rows, heads, patches, size]."""
        module = self.module
        with torch.no_grad():
            if "qkv" in module._modules:
                both = module.qkv(self.states).float().unflatten(-1, (3, module.num_heads, -1))
                queries, keys, _ = both[None].transpose(1, 3).unbind(2)
                cos, sin = (one[None] for one in self.given["position_embeddings"])
                return rotated(queries, cos, sin), rotated(keys, cos, sin), keys
            projected = (one(self.states) for one in (module.q_proj, module.k_proj))
            queries, keys = (one.unflatten(-1, (-1, module.head_dim)).float() for one in projected)
        return queries.transpose(1, 2), keys.transpose(1, 2), keys.transpose(1, 2)

    @cached_property
    def _segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys of patches that see one another, and which entries are patches.

        Returns:
            Float32 [segments, heads, patches, size] twice, and bool [segments, patches]; shorter segments are
            filled up on the right.
        """
        queries, keys, _ = self._projected
        ends = self.given.get("cu_seqlens")
        if ends is None:
            return queries, keys, torch.ones_like(queries[:, 0, :, 0], dtype=torch.bool)
        lengths = ends.diff().to(queries.device)
        queries, keys = (
            pad_sequence([*torch.split(one[0].transpose(0, 1), lengths.tolist())], batch_first=True)
            for one in (queries, keys)
        )
        real = torch.arange(queries.shape[1], device=lengths.device) < lengths[:, None]
        return queries.transpose(1, 2), keys.transpose(1, 2), real

    def _paid(self, start: int, end: int, asking: Tensor | None = None) -> Tensor:
        """Return what a run of patches of each segment pays to all of it, summed, mean over heads.

        Args:
            start: Where the run begins.
            end: Where it ends.
            asking: Which patches count, bool [segments, patches]; all unless given.

        Returns:
            Float32 [segments, patches].
        """
        queries, keys, real = self._segments
        asking = real if asking is None else asking
        scores = queries[:, :, start:end] @ keys.transpose(2, 3) * self.module.head_dim**-0.5
        paid: Tensor = scores.masked_fill_(~real[:, None, None], -torch.inf).softmax(-1).mean(1)
        return (paid * asking[:, start:end, None]).sum(1)

    @cached_property
    def received(self) -> Tensor:
        """Return what patches receive, mean over heads, summed over queries, shape as the states'."""
        return self._in_order(self._summed(self._segments[2]))

    def from_sinks(self, times: float) -> Tensor:
        """Return as much of `received` as if all asked as those that receive so many times the mean.

        Where none of those that see one another receives more, all ask.
        """
        real = self._segments[2]
        every = self._summed(real)
        # What all receive adds up to how many they are: the mean is one.
        sinks = (every > times) & real
        asking = torch.where(sinks.any(1, keepdim=True), sinks, real)
        found = every if torch.equal(asking, real) else self._summed(asking)
        return self._in_order(found * (real.sum(1) / asking.sum(1))[:, None])

    def _summed(self, asking: Tensor) -> Tensor:
        """Return what patches receive from some, mean over heads, float32 [segments, patches]."""
        found = torch.zeros_like(asking, dtype=torch.float32)
        for start in range(0, asking.shape[1], CHUNK):
            found += self._paid(start, start + CHUNK, asking)
        return found

    def _in_order(self, values: Tensor) -> Tensor:
        """Return values of segments in the shape of the states."""
        return values if self.states.ndim == 3 else values[self._segments[2]]

    @cached_property
    def paid_by_first(self) -> Tensor:
        """Return what the first patch of each square pays, mean over heads, float32 [squares, patches]."""
        return self._paid(0, 1)

    @property
    def keys(self) -> Tensor:
        """Return keys before rotation, mean over heads, float32, shape as the states'."""
        found = self._projected[2].mean(1)
        return found if self.states.ndim == 3 else found[0]
