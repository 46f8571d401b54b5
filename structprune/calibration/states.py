"""What the hidden states at both ends of a block say of it, noted batch by batch while a walk passes it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from structprune.models.walk import Block
from structprune.ranks import Ranks

Reduce = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Told a block's input and output of one batch, shape [batch, tokens, hidden], and which tokens are real,
bool, shape [batch, tokens]; returns the rows that are worth remembering, shape [rows, ...]."""


@dataclass
class StateNotes:
    """What was remembered of the states of a block.

    Attributes:
        rows: What `Reduce` returned of each batch.
    """

    rows: list[Tensor] = field(default_factory=list)

    def joined(self, ranks: Ranks = Ranks()) -> Tensor | None:
        """Return the rows of all batches of all processes, shape [rows, ...]; None: nothing was watched."""
        if not self.rows:
            return None
        told = ranks.tell_each(tensors={"rows": torch.cat(self.rows)})
        return torch.cat([tensors["rows"] for _, tensors in told])


@contextmanager
def noted_states(block: Block, reduce: Reduce | None) -> Iterator[StateNotes]:
    """Remember what a block makes of its input while it advances in a `with`.

    Args:
        block: The current block of a walk.
        reduce: What is remembered; None for nothing.
    """
    notes = StateNotes()
    if reduce is None:
        yield notes
        return

    def watch(before: Tensor, after: Tensor, real: Tensor | None) -> None:
        whole = (
            torch.ones(before.shape[:2], dtype=torch.bool) if real is None else real.view(before.shape[:2])
        )
        notes.rows.append(reduce(before, after, whole.to(before.device)).cpu())

    with block.watched(watch):
        yield notes


def token_cosines(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """Return the cosine similarity of every real token's input and output, shape [tokens], float32."""
    return cosine_similarity(before[real].float(), after[real].float(), dim=-1).clamp(-1, 1)


def last_states(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """Return the input and the output of each sequence's last real token, shape [batch, 2, hidden], float32.

    They are what blocks far apart can be compared by, without all states of the blocks between.
    """
    places = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, places, -1).argmax(dim=1)
    rows = torch.arange(len(last), device=last.device)
    return torch.stack([before[rows, last], after[rows, last]], dim=1).float()


def angular_distance(cosines: Tensor) -> Tensor:
    """Return arccos(cosine) / pi: 0 for one direction, 1 for opposite ones, in the shape and dtype given."""
    return cosines.clamp(-1, 1).arccos() / torch.pi
