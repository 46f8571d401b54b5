"""One forward of a language model with fewer tokens: what is kept so far, and what its blocks are given."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from structprune.decide.answers import check_mask
from structprune.errors import QualityError, UsageError
from structprune.runtime.attention import AttentionInput
from structprune.runtime.cache import PrunedLayer, pruned_layer
from structprune.runtime.drop import Drop
from structprune.runtime.images import Images
from structprune.runtime.keep_set import KeepSet, gather
from structprune.runtime.masks import narrow
from structprune.runtime.view import View

logger = logging.getLogger(__name__)

# Labels of this value count in no loss, by transformers' convention.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class _Given:
    """What a block is given, and what its cache layer is told.

    Attributes:
        given: Keyword arguments of the block.
        columns: Logical columns of its keys, shape [batch, keys].
        valid: Whether each may be seen, shape [batch, keys].
        even: Whether all of them may.
        moved: By how much positions of later tokens move down, shape [batch]; None for not at all.
    """

    given: dict[str, Any]
    columns: Tensor
    valid: Tensor
    even: bool
    moved: Tensor | None


class Forward:
    """What belongs to one forward.

    Args:
        batch: Rows.
        length: Tokens, before anything is dropped.
        past: Logical length of the cache before.
        device: Where the language model computes.

    Attributes:
        images: Where the images are; None where there are none, or nothing shall be dropped.
        kept: The tokens that blocks compute now; None for all.
        pending: Those that go on from the feed-forward that runs now; None where it is no narrower.
        compact: Whether who chose last counts positions anew.
        read: What the last attention read that a stage may look at.
        watched: Whether a stage watches the block that runs now.
        passed: What its attention and its feed-forward read and returned, each [batch, slots, hidden].
        notes: What choosers note for their later stages, by the chooser's identity.
        merges: What was merged so far: where it was seen, what stayed there, and the weights.
        entered: The tokens that each block computed so far.
    """

    def __init__(self, batch: int, length: int, past: int, device: torch.device) -> None:
        self.batch, self.length, self.past, self.device = batch, length, past, device
        self.images: Images | None = None
        self.kept: KeepSet | None = None
        self.pending: KeepSet | None = None
        self.compact = False
        self.read: AttentionInput | None = None
        self.watched = False
        self.passed: list[tuple[Tensor, Tensor]] = []
        self.notes: dict[int, dict[str, Any]] = {}
        self.merges: list[tuple[View, Tensor, Tensor]] = []
        self.entered: list[KeepSet | None] = []
        self._given: tuple[tuple[object, ...], _Given] | None = None

    def part_of(self, narrower: KeepSet, states: Tensor) -> Tensor:
        """Return the states of a narrower set from those that are computed now."""
        return gather(states, narrower.slots_in(self.kept, self.length))

    def back(self, narrower: KeepSet, states: Tensor) -> Tensor:
        """Return states of a narrower set among those that are computed now, zero elsewhere."""
        slots = KeepSet(narrower.slots_in(self.kept, self.length), narrower.valid)
        return slots.scatter(states, self.length if self.kept is None else self.kept.index.shape[1])

    def move_to(self, narrower: KeepSet, states: Tensor) -> Tensor:
        """Compute only a narrower set from now on; return its states."""
        states = self.part_of(narrower, states)
        self.kept, self.pending = narrower, None
        return states

    def visual_tokens(self, images: Images) -> Tensor:
        """Return which visual tokens go on from here, bool [batch, tokens]."""
        kept = self.pending or self.kept
        return images.visual if kept is None else images.visual & kept.mask(self.length)

    @property
    def rows(self) -> Tensor:
        """Return the places of the tokens that are computed, shape [batch, slots]."""
        every = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        return every if self.kept is None else self.kept.index

    def dropped(self) -> Tensor:
        """Return how many real tokens stand before each one that are not computed, shape [batch, tokens]."""
        assert self.kept is not None and self.images is not None
        gone = self.images.real & ~self.kept.mask(self.length)
        return gone.cumsum(1)

    def choose(self, drop: Drop, states: Tensor) -> Tensor:
        """Let a method choose what goes on from one place, if not all does.

        Args:
            drop: The place.
            states: Of the tokens that are computed there, shape [batch, slots, hidden].

        Returns:
            The states, with what was merged into those that stay.

        Raises:
            QualityError: It chose more or fewer than it was asked for.
        """
        images = self.images
        if images is None:
            return states
        current = self.pending or self.kept
        there = images.real if current is None else current.mask(self.length)
        free = images.visual & there & ~images.last
        if drop.chooser.newlines == "protect":
            free = free & ~images.newline
        if not bool(free.any()):
            return states
        notes = self.notes.setdefault(id(drop.chooser), {})
        seen = View(images, self.kept, states, there, free, self.read, drop.block, notes, self.passed)
        if drop.watches:
            drop.chooser.watch(seen)
            return states
        # What may not be dropped counts as kept, so that a count is what is computed; newlines alone show
        # nothing of an image.
        least = (~seen.shown).long()
        keep = (drop.keep(seen.sizes) - seen.protected).maximum(least).minimum(seen.left)
        if drop.tokens is not None and bool((keep == seen.left).all()):
            return states
        whose, found = f"{drop.chooser.method()}: the visual tokens", drop.chooser.choose(seen, keep)
        chosen = check_mask(found, seen.real.shape, whose, "choose") & seen.real
        counts = chosen.sum(1)
        asked = (counts == keep) | drop.pooled | (drop.at_most & (counts < keep) & (counts >= least))
        if drop.tokens is not None and not bool(asked.all()):
            raise QualityError(
                f"{drop.chooser.method()} kept {counts.tolist()} tokens of images, not {keep.tolist()}",
                hint="its score is not finite: look whether the model computes NaN on this input",
            )
        if torch.equal(counts, seen.left):
            return states
        self.pending = KeepSet.of(there & (~free | seen.marked(chosen)))
        self.compact = drop.compact
        weights = drop.chooser.merge(seen, chosen)
        if weights is None:
            return states
        assert not drop.within, "a feed-forward reads what its norm made of the states, not the states"
        self.merges.append((seen, chosen, weights))
        return seen.merged(chosen, weights, states)

    def merged(self, features: Tensor) -> Tensor:
        """Return features of all tokens [batch, tokens, hidden] with all that was merged so far."""
        for seen, chosen, weights in self.merges:
            features = seen.merged(chosen, weights, features, whole=True)
        return features

    def narrowed(
        self, index: int, count: int, cache: Cache | None, given: dict[str, Any], language: Any
    ) -> dict[str, Any] | None:
        """Return what a block is given, of the tokens that it computes; None where nothing differs.

        Args:
            index: The block's number.
            count: How many there are.
            cache: The model's.
            given: What the model passes to every block, of all tokens.
            language: The language model, for rotary tables of other positions.
        """
        there = None if cache is None or index >= len(cache.layers) else cache.layers[index]
        layer = there if isinstance(there, PrunedLayer) else None
        if self.kept is None and (layer is None or layer.plain(given.get("attention_mask"))):
            return None
        if cache is not None and self.kept is not None:
            layer = pruned_layer(cache, index, count)
        # Blocks between two stages are given the same; only their caches may know columns of their own.
        signature = id(self.kept), None if layer is None else id(layer.columns)
        if self._given is None or self._given[0] != signature:
            self._given = signature, self._narrow(layer, given, language)
        mine = self._given[1]
        if layer is not None and self.kept is not None:
            layer.expect(mine.columns, mine.valid, mine.moved, even=mine.even, tokens=self.length)
        return mine.given

    def _narrow(self, layer: PrunedLayer | None, given: dict[str, Any], language: Any) -> _Given:
        rows, even = self.rows, self.kept is None or self.kept.even
        valid = torch.ones_like(rows, dtype=torch.bool) if self.kept is None else self.kept.valid
        columns = self.past + rows
        if layer is not None:
            old, seen = layer.seen_columns(self.batch, self.device)
            columns, valid = torch.cat([old, columns], 1), torch.cat([seen, valid], 1)
            even = even and layer.even
        elif self.past:
            old = torch.arange(self.past, device=self.device).expand(self.batch, -1)
            columns = torch.cat([old, columns], 1)
            valid = torch.cat([torch.ones_like(old, dtype=torch.bool), valid], 1)
        flash = "flash" in str(language.config._attn_implementation)
        mask = given.get("attention_mask")
        if mask is None and flash and not even:
            mask = torch.ones(self.batch, self.past + self.length, dtype=torch.long, device=self.device)
        mine = dict(given)
        mine["attention_mask"] = narrow(mask, rows, columns, valid, past=self.past, even=even)
        mine["position_embeddings"] = self._rotary(layer, given, language)
        places = given.get("position_ids")
        # The rotary tables carry the positions; kernels that take lengths read gaps as several sequences.
        mine["position_ids"] = None if places is None or flash else gather(places, rows)
        moved = None if layer is None else layer.shift
        if self.compact and self.kept is not None:
            gone = self.dropped()[:, -1]
            moved = gone if moved is None else moved + gone
        return _Given(mine, columns, valid, even, moved)

    def _rotary(
        self, layer: PrunedLayer | None, given: dict[str, Any], language: Any
    ) -> tuple[Tensor, Tensor]:
        cos, sin = given["position_embeddings"]
        earlier = None if layer is None else layer.shift
        if earlier is None and not (self.compact and self.kept is not None):
            return (cos, sin) if self.kept is None else (gather(cos, self.rows), gather(sin, self.rows))
        places = given["position_ids"].expand(self.batch, -1)
        if self.compact and self.kept is not None:
            places = places - self.dropped()
        if earlier is not None:
            places = places - earlier[:, None]
        tables: tuple[Tensor, Tensor] = language.rotary_emb(cos, gather(places, self.rows).clamp(min=0))
        return tables

    def filled(self, output: Any) -> Any:
        """Return what the language model returns, with zeros where a token was not computed to the end.

        Args:
            output: As a tuple, of which only the last states are known; or by names.

        Raises:
            UsageError: Attention was asked for, which dropped tokens do not have.
        """
        states = output[0]
        if self.pending is not None:
            states = self.move_to(self.pending, states)
        assert self.kept is not None
        states = self.kept.scatter(states, self.length)
        if isinstance(output, tuple):
            return (states, *output[1:])
        if output.get("attentions") is not None:
            raise UsageError(
                "output_attentions: tokens were dropped, which pay and receive no attention",
                hint="ask for it under structprune.paused(model)",
            )
        output["last_hidden_state"] = states
        if output.get("hidden_states") is not None:
            # What enters the first block, then what leaves each of them; the last is the final one.
            pairs = zip([self.entered[0], *self.entered[:-1]], output["hidden_states"], strict=False)
            each = [
                one if kept is None or one is None else kept.scatter(one, self.length) for kept, one in pairs
            ]
            last = output["hidden_states"][-1]
            output["hidden_states"] = (*each, last if last is None else states)
        return output

    def forget_labels(self, labels: Tensor) -> None:
        """Let no label count that a dropped token would predict."""
        last = self.pending or self.kept
        assert last is not None
        gone = ~last.mask(self.length)
        lost = torch.zeros_like(gone)
        lost[:, 1:] = gone[:, :-1]
        lost = lost.to(labels.device) & (labels != IGNORED)
        if bool(lost.any()):
            logger.warning(
                "%d labels are predicted by tokens that were dropped: they do not count in the loss",
                int(lost.sum()),
            )
            labels[lost] = IGNORED
