"""Which calibration batches a process runs, where several share a run: whole batches, in fixed chunks."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import overload

from structprune.models.streamed import Batch
from structprune.ranks import Ranks

# Sums are made for every chunk and then added in order: so many, whoever runs them, give the same bits.
CHUNKS = 8


class RankBatches(Sequence[Batch]):
    """The batches of one process, out of those of a run.

    Batches are never cut. They form at most eight chunks of neighbours whatever the number of processes (as
    many as there are processes where those are more), and each process runs some neighbouring chunks.

    Args:
        every: The batches of the run, the same in all processes.
        ranks: Those who share them; at most as many as there are batches.

    Attributes:
        every: The batches of the run.
        ranks: Those who share them.
        chunks: How many chunks there are.
        most: How many batches the process with most of them runs.
    """

    def __init__(self, every: Sequence[Batch], ranks: Ranks = Ranks()) -> None:
        self.every, self.ranks = every, ranks
        self.chunks = max(1, min(max(CHUNKS, ranks.count), len(every)))
        owners = [self._rank_of(number) for number in range(len(every))]
        self._numbers = [number for number, owner in enumerate(owners) if owner == ranks.number]
        self.most = max(Counter(owners).values(), default=0)

    def chunk(self, position: int) -> int:
        """Return the chunk that the batch at a position of this process belongs to."""
        return self._chunk_of(self._numbers[position])

    def number(self, position: int) -> int:
        """Return which of the batches of the run the one at a position of this process is."""
        return self._numbers[position]

    def _chunk_of(self, number: int) -> int:
        return number * self.chunks // len(self.every)

    def _rank_of(self, number: int) -> int:
        return self._chunk_of(number) * self.ranks.count // self.chunks

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """Return one of this process's batches, or several."""
        if isinstance(index, slice):
            return [self.every[number] for number in self._numbers[index]]
        return self.every[self._numbers[index]]

    def __len__(self) -> int:
        """Return the number of this process's batches."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over this process's batches."""
        return (self.every[number] for number in self._numbers)


def rank_batches(batches: Sequence[Batch]) -> RankBatches:
    """Return batches as those of one process, unless they are divided already."""
    return batches if isinstance(batches, RankBatches) else RankBatches(batches)
