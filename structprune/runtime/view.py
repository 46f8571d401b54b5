"""What a method sees where it chooses: the images side by side, with the tokens they have left.

Methods see no batch: rows of a batch do not influence each other, and padding is not there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from structprune.runtime.attention import AttentionInput
from structprune.runtime.images import Images
from structprune.runtime.keep_set import KeepSet, gather
from structprune.runtime.tower_seen import ImageShown, unseen
from structprune.runtime.tower_tokens import TowerTokens

# Queries whose attention is in memory at once: rows of all tokens would be as large as an eager kernel's.
CHUNK = 64


@dataclass(frozen=True, eq=False)
class View:
    """The images of a forward at one place.

    Attributes:
        images: Where they were at first.
        kept: The tokens that are computed here; None for all.
        states: Of those, shape [batch, slots, hidden].
        there: Which tokens of the forward go on so far, bool [batch, tokens].
        candidates: Which tokens of the forward may be dropped here, bool [batch, tokens].
        read: What the attention of the block read that decides; None where none ran yet.
        block: Number of the block where tokens are dropped.
        notes: What the method noted at its earlier stages in this forward.
        passed: What attention and feed-forward of the block before read, after their norms, and returned,
            before they were added, where the method watches; each [batch, slots, hidden].
    """

    images: Images
    kept: KeepSet | None
    states: Tensor
    there: Tensor
    candidates: Tensor
    read: AttentionInput | None
    block: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    passed: Sequence[tuple[Tensor, Tensor]] = ()

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return row and place of every candidate, and which image it belongs to; images ascending."""
        row, place = self.candidates.nonzero(as_tuple=True)
        image = torch.searchsorted(self.number, self.images.number[row, place])
        return row, place, image

    @cached_property
    def number(self) -> Tensor:
        """Return the number that each image seen has among all of the forward, shape [images]."""
        found: Tensor = torch.unique(self.images.number[self.candidates])
        return found

    @cached_property
    def latest(self) -> Tensor:
        """Return which of the images are the last of their row, bool [images]."""
        return self.number == self.images.number.amax(1)[self.images.row[self.number]]

    @cached_property
    def sizes(self) -> Tensor:
        """Return how many tokens each image had at first, shape [images]."""
        return self.images.sizes[self.number]

    @cached_property
    def protected(self) -> Tensor:
        """Return how many tokens of each image go on whatever is chosen, shape [images]."""
        return self._counted(self._staying)

    @cached_property
    def shown(self) -> Tensor:
        """Return whether a patch of each image goes on whatever is chosen, shape [images]."""
        return self._counted(self._staying & ~self.images.newline) > 0

    @property
    def _staying(self) -> Tensor:
        return self.images.visual & self.there & ~self.candidates

    def _counted(self, tokens: Tensor) -> Tensor:
        """Return how many of some tokens of the forward each image has, shape [images]."""
        return torch.bincount(self.images.number[tokens], minlength=len(self.images.sizes))[self.number]

    @cached_property
    def left(self) -> Tensor:
        """Return how many tokens of each image may be dropped, shape [images]."""
        return torch.bincount(self._tokens[2], minlength=len(self.number))

    @cached_property
    def real(self) -> Tensor:
        """Return which entries of [images, tokens] are tokens; shorter images are filled up on the right."""
        width = torch.arange(int(self.left.max()), device=self.left.device)
        return width < self.left[:, None]

    @cached_property
    def computed(self) -> Tensor:
        """Return which slots hold a token that is no padding, bool [batch, slots]."""
        real = self._here(self.images.real)
        return real if self.kept is None else real & self.kept.valid

    def spread(self, values: Tensor, *, whole: bool = False) -> Tensor:
        """Return values of tokens [batch, slots, ...] with images side by side, [images, tokens, ...].

        Args:
            values: Of the tokens seen, or of all tokens of the forward.
            whole: Which of the two.
        """
        row, place, _ = self._tokens
        if self.kept is not None and not whole:
            place = self._slots[row, place]
        found = values.new_zeros(*self.real.shape, *values.shape[2:])
        found[self.real] = values[row, place]
        return found

    def merged(self, chosen: Tensor, weights: Tensor, states: Tensor, *, whole: bool = False) -> Tensor:
        """Return states in which the tokens that stay hold what is merged into them.

        Args:
            chosen: Which tokens stay, bool [images, tokens].
            weights: How much of every token goes into each of them, float32 [images, tokens, tokens].
            states: Of the tokens seen [batch, slots, hidden], or of all tokens of the forward.
            whole: Which of the two.
        """
        row, place, _ = self._tokens
        slot = place if whole or self.kept is None else self._slots[row, place]
        mine = states.new_zeros(*self.real.shape, states.shape[-1], dtype=torch.float32)
        mine[self.real] = states[row, slot].float()
        mixed = torch.bmm(weights.to(mine), mine).to(states.dtype)[self.real]
        stays = chosen[self.real]
        found = states.clone()
        found[row[stays], slot[stays]] = mixed[stays]
        return found

    def text(self, *, until_next: bool = False) -> tuple[Tensor, Tensor]:
        """Return the states of the text after each image, up to the end of its row.

        Args:
            until_next: Up to the next image of the row, if there is one.

        Returns:
            States, float32 [images, text, hidden], and which entries are text, bool [images, text]; shorter
            texts are filled up on the right.
        """
        number, real = self._here(self.images.number), self._here(self.images.real)
        if self.kept is not None:
            real = real & self.kept.valid
            number = torch.where(self.kept.valid, number, -1)
        slots = torch.arange(number.shape[1], device=number.device)
        asking = []
        for one in self.number:
            row = int((number == one).any(1).nonzero()[0])
            mine = real[row] & (number[row] < 0) & (slots > slots[number[row] == one].max())
            later = slots[number[row] > one]
            if until_next and len(later):
                mine &= slots < later.min()
            asking.append(self.states[row][mine].float())
        lengths = torch.tensor([len(one) for one in asking], device=number.device)
        padded = torch.nn.utils.rnn.pad_sequence(asking, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=number.device) < lengths[:, None]

    def mean(self, tokens: Tensor) -> Tensor:
        """Return the mean state of some tokens, of those that are computed here; zero where there is none.

        Args:
            tokens: Which of the forward, for each image seen, bool [images, tokens].

        Returns:
            Float32, shape [images, hidden].
        """
        row = self.images.row[self.number]
        mine = (tokens if self.kept is None else gather(tokens, self.kept.index[row])) & self.computed[row]
        sums = torch.bmm(mine[:, None].float(), self.states[row].float())[:, 0]
        return sums / mine.sum(1, keepdim=True).clamp(min=1)

    def marked(self, values: Tensor) -> Tensor:
        """Return values [images, tokens], such as a choice, at the tokens of the forward, [batch, tokens].

        Other tokens have zeros, or False.
        """
        row, place, _ = self._tokens
        found = values.new_zeros(self.candidates.shape)
        found[row, place] = values[self.real]
        return found

    @cached_property
    def _slots(self) -> Tensor:
        assert self.kept is not None
        slots = torch.arange(self.kept.index.shape[1], device=self.kept.index.device)
        table = torch.zeros_like(self.images.number)
        row = torch.arange(len(table), device=table.device)[:, None].expand_as(self.kept.index)
        table[row[self.kept.valid], self.kept.index[self.kept.valid]] = slots.expand_as(self.kept.index)[
            self.kept.valid
        ]
        return table

    def _here(self, values: Tensor) -> Tensor:
        """Return what a tensor of all tokens of the forward holds of those computed here."""
        return values if self.kept is None else self.kept.gather(values)

    def features(self) -> Tensor:
        """Return the states of the images' tokens, float32 [images, tokens, hidden]."""
        return self.spread(self.states).float()

    def tower(self, layer: float) -> TowerTokens:
        """Return what one of the `tower_layers` of the method showed of the images' tokens.

        Raises:
            UsageError: The features of an image were not made by the tower as it runs here.
        """
        return TowerTokens(self.placed, self._shown, layer)

    @cached_property
    def places(self) -> Tensor:
        """Return where tokens stand in their image, long [images, tokens, 3].

        Part (0 the whole image, 1 its stitched tiles), row, and column; the column is -1 where a token only
        ends a line.

        Raises:
            UsageError: The features of an image were not made by the tower as it runs here.
        """
        return self.placed([one.places for one in self._shown])

    def filled(self) -> Tensor | None:
        """Return which tokens a tower made that computes fewer, bool [images, tokens]; None for all."""
        found = [one.filled for one in self._shown if one.filled is not None]
        return self.placed(found) if len(found) == len(self._shown) else None

    @property
    def patches(self) -> Tensor:
        """Return which entries do more than end a line, bool [images, tokens]."""
        return self.real & (self.places[..., 2] >= 0)

    @property
    def _shown(self) -> list[ImageShown]:
        found = [one for one in self.images.shown if one is not None]
        if len(found) < len(self.images.sizes):
            raise unseen("they were not made by the vision tower as it runs here")
        return found

    def placed(self, values: Sequence[Tensor]) -> Tensor:
        """Return values [tokens, ...] of every image of the forward side by side, [images, tokens, ...]."""
        visual = self.images.visual
        every = torch.cat([*values]).to(visual.device)
        whole = every.new_zeros(*visual.shape, *every.shape[1:])
        whole[visual] = every
        return self.spread(whole, whole=True)

    def paid_by_last(self) -> Tensor:
        """Return the attention that the last real token pays, mean over heads, float32 [images, tokens]."""
        last = self._here(self.images.last).int().argmax(1, keepdim=True)
        return self.spread(self._own(self._attention().rows(last).mean(1))[:, 0])

    def paid_by_text(self, asking: Tensor | None = None) -> Tensor:
        """Return the attention that text pays, mean over heads and over what asks, float32 [images, tokens].

        Args:
            asking: Of every image of the forward which tokens ask about it, bool [images, tokens]; the text
                after it unless given. Where none does, the last real token of its row asks.
        """
        images = self.images
        asking = images.after if asking is None else asking
        asking = torch.where(asking.any(1, keepdim=True), asking, images.last[images.row])
        number, length = self._here(images.number), asking.shape[1]
        places = self._here(torch.arange(length, device=number.device).expand(len(images.number), -1))
        asks = torch.zeros_like(images.number).index_add_(0, images.row, asking.long()) > 0
        queries = KeepSet.of(self._here(asks) & self.computed)
        found = self.states.new_zeros(number.shape, dtype=torch.float32)
        for slots, real in zip(*(torch.split(one, CHUNK, 1) for one in (queries.index, queries.valid))):
            rows = self._own(self._attention().rows(slots).mean(1))
            mine = asking[number[:, None].clamp(min=0), gather(places, slots)[..., None]]
            found += (rows * (mine & real[..., None])).sum(1)
        return self.spread(found) / asking.sum(1)[self.number][:, None]

    @cached_property
    def received(self) -> tuple[Tensor, Tensor]:
        """Return the attention that tokens receive, the largest of all heads, summed over queries.

        Returns:
            That of the image's own tokens, and that of the text after the image, float32 [images, tokens].
        """
        number, real = self._here(self.images.number), self._here(self.images.real)
        if self.kept is not None:
            real = real & self.kept.valid
            number = torch.where(self.kept.valid, number, -1)
        slots = torch.arange(number.shape[1], device=number.device)
        # Where an image ends is where its last token is: text counts from there on.
        first = int((number >= 0).any(0).nonzero().min())
        own, text = (self.states.new_zeros(number.shape, dtype=torch.float32) for _ in range(2))
        for queries in torch.split(slots[first:], CHUNK):
            most = self._own(self._attention().rows(queries.expand(len(number), -1)).amax(1))
            asking = number[:, queries]
            alike = (asking[..., None] == number[:, None]) & (number >= 0)[:, None]
            own += (most * alike).sum(1)
            after = (asking < 0) & real[:, queries]
            text += (most * (after[..., None] & (queries[:, None] > slots))).sum(1)
        return self.spread(own), self.spread(text)

    def _attention(self) -> AttentionInput:
        assert self.read is not None, "no attention ran before the embeddings"
        return self.read

    def _own(self, rows: Tensor) -> Tensor:
        """Return probabilities over the tokens of this forward alone, of all of them."""
        own = self.states.shape[1]
        found = rows[..., self._attention().keys.shape[2] - own :]
        return torch.nn.functional.pad(found, (0, own - found.shape[-1]))
