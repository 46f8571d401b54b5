"""The processes that a launcher such as torchrun started for one run: what they add up and tell each other.

Tensors and JSON travel, never pickles. Every process comes to every call, in the same order; whatever is
decided from what was added up or told is then decided alike everywhere.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from structprune.errors import EnvironmentFailure, InputError, MethodError, QualityError, RankLost, UsageError
from structprune.machine import launch
from structprune.meeting import check_launch, exchange, joined, on_cards

# Of a tensor that is added up this much travels at once.
PIECE_BYTES = 32 << 20
# What one process meets and all raise.
_TOLD = (MethodError, UsageError, InputError, EnvironmentFailure, QualityError)


@dataclass(frozen=True)
class Ranks:
    """All processes of a run, seen from one of them; a run that nobody launched is one process.

    Attributes:
        number: Which one this is, from 0.
        count: How many there are.
    """

    number: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Self:
        """Return those that this process has joined; itself alone where there are none."""
        joined = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if joined else cls()

    @property
    def alone(self) -> bool:
        """Tell whether there is no other."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Tell whether this is the one that writes and speaks."""
        return self.number == 0

    def wait(self) -> None:
        """Return once every process has come here."""
        if not self.alone:
            exchange(dist.barrier)

    def add_apart(self, values: Tensor) -> None:
        """Add up what all hold, in place; exact in any order, since each element is that of one of them.

        Args:
            values: Zero wherever another process may hold something.
        """
        if not self.alone:
            there = _sendable(values)
            exchange(dist.all_reduce, there)
            values.copy_(there)

    def add_in_order(self, values: Tensor, owner: int | None = None) -> None:
        """Add up what all hold, in place, from the first process to the last: the same bits every time.

        Args:
            values: Shape [rows, ...].
            owner: The only process that gets the sum, what the others hold stays as it is; None: all get it.
        """
        if self.alone:
            return
        # However many there are, each holds as much beside the values.
        rows = max(1, PIECE_BYTES // max(1, values[:1].numel() * values.element_size()))
        for piece in torch.split(values, rows):
            self._add_piece(piece, owner)

    def _add_piece(self, piece: Tensor, owner: int | None) -> None:
        # Each process adds up a part of its own, so that none adds, and receives, more than the others.
        there = _sendable(piece).view(-1, 1)
        sizes = [len(replace(self, number=number).portion(len(there))) for number in range(self.count)]
        mine = sizes[self.number]
        total, *others = torch.split(self.exchange(there, sizes, [mine] * self.count), mine)
        for part in others:
            total += part
        if owner is None:
            found = self.exchange(total.repeat(self.count, 1), [mine] * self.count, sizes)
        else:
            sent = [mine * (number == owner) for number in range(self.count)]
            found = self.exchange(total, sent, [size * (owner == self.number) for size in sizes])
        if owner in (None, self.number):
            piece.copy_(found.view_as(piece))

    def gather(self, values: Tensor) -> Tensor:
        """Return values [values] of all, as many from each, one after the other, shape [count * values]."""
        if self.alone:
            return values
        there = _sendable(values)
        parts = [torch.empty_like(there) for _ in range(self.count)]
        exchange(dist.all_gather, parts, there)
        return torch.cat(parts).to(values.device)

    def exchange(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send each process rows of its own; return what all sent to this one, from the first to the last.

        Args:
            values: Rows for the first process, then for the second ..., shape [rows, features].
            sent: How many of them go to each.
            received: How many come from each.
        """
        if self.alone:
            return values
        # As bytes: not every way of talking knows every kind of number.
        there = _sendable(values).view(torch.uint8)
        rows = there.new_empty(sum(received), there.shape[1])
        exchange(dist.all_to_all_single, rows, there, list(received), list(sent))
        return rows.view(values.dtype).to(values.device)

    def average(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean of each tensor over all processes; all of them travel as one."""
        if self.alone:
            return list(values)
        flat = torch.cat([one.flatten() for one in values])
        self.add_in_order(flat)
        parts = torch.split(flat / self.count, [one.numel() for one in values])
        return [part.view_as(one) for part, one in zip(parts, values, strict=True)]

    def tell(
        self, source: int, said: Any = None, tensors: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return what one of the processes says.

        Args:
            source: Which one.
            said: JSON values; what the others give is not looked at.
            tensors: By name.
        """
        if self.alone:
            return said, dict(tensors or {})
        message = torch.empty(0, dtype=torch.uint8)
        if self.number == source:
            here = {name: value.detach().cpu().contiguous() for name, value in (tensors or {}).items()}
            # A safetensors file needs a tensor to be one.
            blank = {} if here else {"": torch.zeros(1, dtype=torch.uint8)}
            head = json.dumps(said).encode()
            body = save(here | blank)
            sizes = torch.tensor([len(head), len(body), len(blank)])
            content = bytearray(head)
            content += body
            del body  # As large as a block's answers: each copy that stays counts.
            message = torch.frombuffer(content, dtype=torch.uint8)
        else:
            sizes = torch.zeros(3, dtype=torch.int64)
        sizes = _sendable(sizes)
        _broadcast(sizes, source)
        length, rest, blanks = sizes.tolist()
        if self.number != source:
            message = torch.empty(length + rest, dtype=torch.uint8)
        message = _sendable(message)
        _broadcast(message, source)
        if self.number == source:
            return said, dict(tensors or {})
        received = message.cpu().numpy()
        found = load(received[length:].tobytes()) if not blanks else {}
        return json.loads(received[:length].tobytes()), found

    def tell_each(
        self, said: Any = None, tensors: Mapping[str, Tensor] | None = None
    ) -> list[tuple[Any, dict[str, Tensor]]]:
        """Return what every process says, from the first to the last."""
        return [self.tell(source, said, tensors) for source in range(self.count)]

    def share(
        self, work: Callable[[], tuple[Any, Mapping[str, Tensor]]]
    ) -> list[tuple[Any, dict[str, Tensor]]]:
        """Do this process's part of something and return what all made of theirs, from the first to the last.

        Args:
            work: Returns JSON values, and tensors by name.

        Raises:
            StructpruneError: One process met it; all raise what the first of those did. What is none of ours
                ends its process, and the others with a RankLost.
        """
        said, tensors, failure = None, dict[str, Tensor](), None
        try:
            said, found = work()
            tensors |= found
        except _TOLD as error:
            if self.alone or isinstance(error, RankLost):
                raise
            failure = [type(error).__name__, error.message, error.hint]
        made = self.tell_each({"failure": failure, "said": said}, tensors)
        for number, (one, _) in enumerate(made):
            if one["failure"]:
                kind, message, hint = one["failure"]
                known = next(each for each in _TOLD if each.__name__ == kind)(message, hint=hint)
                known.rank = number
                raise known
        return [(one["said"], found) for one, found in made]

    def copy_files(self, folder: Path) -> None:
        """Write what the first process has in a folder into the others' folder of that name.

        Args:
            folder: Each process's own; that of the first need not exist.
        """
        if self.alone:
            return
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()] if self.first else []
        names, _ = self.tell(0, [str(file.relative_to(folder)) for file in files])
        for name in names:
            here = folder / name
            content = (
                {"": torch.frombuffer(bytearray(here.read_bytes()), dtype=torch.uint8)}
                if self.first
                else None
            )
            _, found = self.tell(0, None, content)
            if not self.first:
                here.parent.mkdir(parents=True, exist_ok=True)
                here.write_bytes(found[""].numpy().tobytes())

    def check_alike(self, what: str, said: Mapping[str, Any]) -> None:
        """Check that all say the same.

        Args:
            what: What it is about, in words.
            said: JSON values.

        Raises:
            InputError: One says something else; names it, and the keys.
        """
        every = [one for one, _ in self.tell_each(dict(said))]
        for number, one in enumerate(every):
            differing = sorted(key for key in said.keys() | one.keys() if one.get(key) != every[0].get(key))
            if differing:
                raise InputError(
                    f"{what}: rank {number} differs from rank 0 in {', '.join(differing)}",
                    hint="give every rank the same model, data, recipe and versions",
                )

    def portion(self, count: int) -> range:
        """Return which of so many things in a row are this process's: neighbours."""
        return range(count * self.number // self.count, count * (self.number + 1) // self.count)

    def divide(self, costs: Sequence[float]) -> list[int]:
        """Return for every one of some jobs which process does it, so that all end at nearly the same time.

        Args:
            costs: Of each job, in any unit.
        """
        load, owners = [0.0] * self.count, [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
            owners[job] = load.index(min(load))
            load[owners[job]] += costs[job]
        return owners


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that a launcher started beside this one, for the length of a `with`.

    Raises:
        EnvironmentFailure: They cannot be reached.
    """
    check_launch()
    if launch().count == 1 or not dist.is_available() or dist.is_initialized():
        yield Ranks.here()
        return
    with joined():
        yield Ranks.here()


def _sendable(values: Tensor) -> Tensor:
    """Return values where the processes' way of talking takes them from, in one piece."""
    device = torch.device("cuda" if on_cards() else "cpu")
    return values.detach().to(device).contiguous()


def _broadcast(values: Tensor, source: int) -> None:
    exchange(dist.broadcast, values, src=source)
