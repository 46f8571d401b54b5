"""Rows of a block's attention, computed anew for a few queries, whatever kernel the model runs.

What the projections returned to the attention is used again; adapters on them count, as they are part of the
module. Everything after is float32, because probabilities of one in thousands tie in bfloat16.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from structprune.errors import UsageError
from structprune.runtime.keep_set import gather

# The modules of an attention whose outputs its rows are computed from.
PROJECTIONS = frozenset({"q_proj", "k_proj"})


@dataclass(frozen=True, eq=False)
class AttentionInput:
    """What the attention of a block read, the tokens being those that the block computes.

    Attributes:
        module: The attention.
        states: Its input, after the norm, shape [batch, tokens, hidden].
        rotary: Cosine and sine, shape [batch or 1, tokens, rotated].
        mask: As its kernel gets it.
        layer: The block's cache layer, which holds keys of earlier forwards and of this one, rotated; None
            without a cache.
        projected: What the projections of queries and keys returned, [batch, tokens, heads * size], by name.
    """

    module: Any
    states: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    layer: CacheLayerMixin | None
    projected: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def keys(self) -> Tensor:
        """Return all keys, rotated, float32 [batch, key-value heads, keys, size]."""
        found = rotated(self._heads("k"), *self.rotary)
        earlier = 0 if self.layer is None or self.layer.keys is None else self.layer.keys.shape[2]
        if (earlier := earlier - self.states.shape[1]) <= 0:
            return found
        # Those of this forward are not taken from the cache, which rounds them: what is chosen shall not
        # depend on whether there is one.
        assert self.layer is not None and self.layer.keys is not None
        return torch.cat([self.layer.keys[:, :, :earlier].float(), found], 2)

    def rows(self, queries: Tensor) -> Tensor:
        """Return how the attention of some tokens spreads over the keys.

        Args:
            queries: Which tokens of the block, shape [batch, queries].

        Returns:
            Probabilities, float32 [batch, heads, queries, keys], of all keys up to the last one that any of
            the queries may see; a query that may see nothing has zeros.
        """
        seen = self._seen(queries, self.keys.shape[2])
        # Under a causal mask half of all products are those of keys that come later.
        last = int(seen.any(2).any(1).any(0).nonzero().max()) + 1 if bool(seen.any()) else 1
        seen = seen[..., :last]
        cos, sin = (gather(one, queries) for one in self.rotary)
        asked = rotated(self._heads("q", queries), cos, sin)
        keys = self.keys[:, :, :last]
        batch, groups = keys.shape[:2]
        asked = asked.view(batch, groups, -1, *asked.shape[2:]) * self.module.scaling
        scores: Tensor = torch.einsum("bghqd,bgkd->bghqk", asked, keys).flatten(1, 2)
        # In place: the scores of many queries are the largest thing here.
        shares = scores.masked_fill_(~seen, -torch.inf).softmax(-1)
        blind = ~seen.any(-1, keepdim=True)
        return shares.masked_fill_(blind, 0) if bool(blind.any()) else shares

    def _heads(self, which: Literal["q", "k"], tokens: Tensor | None = None) -> Tensor:
        """Return queries or keys of some tokens before rotation, float32 [batch, heads, tokens, size]."""
        module, name = self.module, f"{which}_proj"
        projection = getattr(module, name, None)
        if projection is None:
            raise UsageError(
                f"the attention {type(module).__name__} has no {name}, so its rows cannot be computed anew",
                hint="choose a method that asks for no attention, such as divprune",
            )
        known = self.projected.get(name)
        found = self.states if known is None else known
        found = found if tokens is None else gather(found, tokens)
        heads: Tensor = (projection(found) if known is None else found).unflatten(-1, (-1, module.head_dim))
        norm = getattr(module, f"{which}_norm", None)
        return (heads if norm is None else norm(heads)).transpose(1, 2).float()

    def _seen(self, queries: Tensor, keys: int) -> Tensor:
        """Return what each query may see, bool [batch, 1, queries, keys]."""
        own = self.states.shape[1]
        if self.mask is not None and self.mask.ndim == 4:
            found = gather(self.mask, queries, 2)
            # A float mask is zero where there is something to see, and the least number elsewhere.
            return found if found.dtype == torch.bool else found.ge(-1)
        places = torch.arange(keys, device=queries.device)
        seen = places <= (keys - own + queries)[..., None]
        if self.mask is not None:
            seen = seen & self.mask.bool()[:, None, :]
        return seen[:, None]


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys turned to their positions, [batch, heads, tokens, size]."""
    cos, sin = cos[:, None].float(), sin[:, None].float()
    first, second = states[..., : cos.shape[-1]].chunk(2, dim=-1)
    turned = states[..., : cos.shape[-1]] * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, states[..., cos.shape[-1] :]], -1)
