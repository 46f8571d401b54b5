"""Layers of a cache that hold fewer rows than the prompt has tokens, and report the prompt's length.

Every layer knows the logical columns of its rows, so masks, positions, beams, repeats and further turns need
no state anywhere else. Lengths are logical everywhere but in the tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from structprune.errors import UsageError


class PrunedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # its parent's hook is not annotated
    """A dynamic layer of which some columns were dropped.

    Attributes:
        columns: Logical columns of the rows that the last selection left, shape [batch, rows]; None where
            nothing was dropped. Rows appended since follow one another.
        valid: Whether each of them is visible, shape [batch, rows].
        shift: By how much positions of later tokens move down, shape [batch]; None where positions are kept.
        selected: Logical length when that selection was made.
        length: Logical length.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated there
        self.columns: Tensor | None = None
        self.valid: Tensor | None = None
        self.shift: Tensor | None = None
        self.even = True
        self.selected = 0
        self.length = 0
        self._next: tuple[Tensor, Tensor, Tensor | None, bool, int] | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> "PrunedLayer":
        """Return a layer with the rows of a dense one."""
        mine = cls()
        if layer.keys is not None and layer.values is not None:
            mine.lazy_initialization(layer.keys, layer.values)
            mine.keys, mine.values = layer.keys, layer.values
            mine.length = layer.get_seq_length()
        return mine

    def seen_columns(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the logical columns of all rows and whether they are visible, shape [batch, rows] each."""
        tail = torch.arange(self.selected, self.length, device=device).expand(batch, -1)
        if self.columns is None or self.valid is None:
            return tail, torch.ones_like(tail, dtype=torch.bool)
        return (
            torch.cat([self.columns, tail], 1),
            torch.cat([self.valid, torch.ones_like(tail, dtype=torch.bool)], 1),
        )

    def plain(self, mask: object) -> bool:
        """Tell whether a forward that drops nothing is given what a dense model is, with such a mask."""
        return self.columns is None or (mask is None and self.even and self.shift is None)

    def expect(
        self, columns: Tensor, valid: Tensor, shift: Tensor | None, *, even: bool, tokens: int
    ) -> None:
        """Say what all rows will be after the next `update`.

        Args:
            columns: Their logical columns, shape [batch, rows].
            valid: Whether each is visible, shape [batch, rows].
            shift: By how much positions of later tokens move down, shape [batch]; None for not at all.
            even: Whether all rows are visible.
            tokens: How many tokens the forward has.
        """
        self._next = columns, valid, shift, even, self.length + tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append rows; the logical length grows by the tokens that they stand for."""
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        if self._next is None:
            self.length += key_states.shape[-2]
        else:
            self.columns, self.valid, self.shift, self.even, self.length = self._next
            self.selected, self._next = self.length, None
        return found

    def get_seq_length(self) -> int:
        """Return the logical length."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            UsageError: Some of them were there when tokens were selected, which they may have decided.
        """
        left = self.length - abs(tokens_to_remove)
        if self.columns is not None and left < self.selected:
            raise UsageError(
                "the cache is cut into the tokens that were there when tokens were dropped",
                hint="token pruners do not go with assisted or prompt-lookup decoding: generate without it",
            )
        super().crop(tokens_to_remove)
        self.length = left if self.is_initialized else 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.columns = self.valid = self.shift = self._next = None
        self.even, self.selected, self.length = True, 0, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let every row of the batch go on from another one."""
        super().reorder_cache(beam_idx)
        self._each_row(lambda one: one.index_select(0, beam_idx.to(one.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda one: one.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        self._each_row(lambda one: one[indices])

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("columns", "valid", "shift"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, change(value))


def pruned_layer(cache: Cache, index: int, count: int) -> PrunedLayer:
    """Return a layer of a cache as one that can lose columns; a dense one is exchanged for its like.

    Args:
        cache: Of a model with `count` blocks; one that `check_cache` is content with.
        index: Which layer.
        count: How many there must be.
    """
    while len(cache.layers) < count:
        cache.layers.append(PrunedLayer())
    layer = cache.layers[index]
    if not isinstance(layer, PrunedLayer):
        assert isinstance(layer, DynamicLayer)
        layer = cache.layers[index] = PrunedLayer.adopt(layer)
    return layer


def check_cache(cache: Cache) -> None:
    """Check that a cache can lose columns.

    Raises:
        UsageError: It keeps its rows in a way that cannot lose some.
    """
    # A cache that was not told how many blocks there are grows with them, by layers of one kind.
    kinds = [cache.layer_class_to_replicate or DynamicLayer, *map(type, cache.layers)]
    wrong = ["offloaded"] * cache.offloading
    wrong += [kind.__name__ for kind in kinds if kind not in (DynamicLayer, PrunedLayer)]
    if wrong:
        raise UsageError(
            f"a cache of kind {wrong[0]} cannot lose tokens",
            hint="use the default cache, DynamicCache, without cache_implementation",
        )
