"""What an expert reads goes to the process of a run that keeps the expert's Gram matrix, in every batch.

Every process sees tokens of all experts. Would each keep all Gram matrices until they are added up, many
processes would help nobody's memory; so the tokens travel, and a matrix is in one place from its beginning.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from structprune.calibration.statistics import InputSums
from structprune.models.arch import Linear
from structprune.models.rank_batches import RankBatches
from structprune.ranks import Ranks

Weigh = Callable[[Sequence[Sequence[Linear]]], Sequence[float]]
"""Told groups of linears, those that read the same input in one; returns what solving each group takes."""


def count_products(groups: Sequence[Sequence[Linear]]) -> list[float]:
    """Return of each group of linears its weights times their inputs: what most updates take."""
    return [sum(float(one.weight.numel()) * one.weight.shape[1] for one in group) for group in groups]


class ExpertDispatch:
    """Puts tokens aside until some experts have read theirs, and then sends them where they are added.

    Args:
        experts: Linears of the experts of one block whose Gram matrices are wanted, in the order in which
            they read a batch.
        batches: Of this process; every one sends as often as the one with most batches.
        weigh: Tells what solving each takes.

    Attributes:
        owners: Which process has the Gram matrix of what an expert's linear reads, by label.
    """

    def __init__(self, experts: Sequence[Linear], batches: RankBatches, weigh: Weigh) -> None:
        self._ranks = batches.ranks
        self.owners = owners_of([[linear] for linear in experts], self._ranks, weigh)
        # About an expert for each process: all multiply at the same time, and few tokens are held.
        size = 2 * self._ranks.count
        self._rounds = [experts[first : first + size] for first in range(0, len(experts), size)]
        self._left = 0 if self._ranks.alone else batches.most * len(self._rounds)
        self._aside: dict[str, Tensor] = {}

    def keeps(self, linear: Linear) -> bool:
        """Tell whether this process adds what a linear reads to a Gram matrix; of no expert's all do."""
        return self.owners.get(linear.label, self._ranks.number) == self._ranks.number

    def add_pairs(self, linear: Linear, inputs: Tensor, sums: Mapping[str, InputSums]) -> None:
        """Add what a linear reads of a batch to its Gram matrix; what experts do waits for some more of them.

        Args:
            linear: The next of the block.
            inputs: Real tokens, shape [tokens, in].
            sums: By label.
        """
        if self._ranks.alone or linear.label not in self.owners:
            sums[linear.label].add_pairs(inputs)
            return
        self._aside[linear.label] = inputs
        if len(self._aside) == len(self._round):
            self._send(sums)

    def finish(self, sums: Mapping[str, InputSums]) -> None:
        """Take part in what processes with more batches still send."""
        while self._left:
            self._send(sums)

    @property
    def _round(self) -> Sequence[Linear]:
        """Return the linears whose tokens travel next; the rounds of a batch come again with the next one."""
        return self._rounds[-self._left % len(self._rounds)]

    def _send(self, sums: Mapping[str, InputSums]) -> None:
        # The linears of a projection read one width: theirs travel together, those of one owner side by side.
        projections: dict[str, list[Linear]] = {}
        for linear in sorted(self._round, key=lambda one: self.owners[one.label]):
            projections.setdefault(linear.name, []).append(linear)
        self._left -= 1
        for served in projections.values():
            nothing = served[0].weight.new_empty(0, served[0].weight.shape[1])
            mine = [self._aside.pop(one.label, nothing) for one in served]
            for linear, rows in self._exchange(served, mine):
                sums[linear.label].add_pairs(rows)

    def _exchange(self, served: Sequence[Linear], mine: Sequence[Tensor]) -> list[tuple[Linear, Tensor]]:
        """Return what each process read of the linears that are kept here, from the first to the last."""
        sent = [0] * self._ranks.count
        for linear, rows in zip(served, mine, strict=True):
            sent[self.owners[linear.label]] += len(rows)
        counts = torch.tensor([len(rows) for rows in mine])
        every = self._ranks.gather(counts).view(-1, len(served)).tolist()
        kept = [place for place, one in enumerate(served) if self.keeps(one)]
        received = [sum(row[place] for place in kept) for row in every]
        rows = self._ranks.exchange(torch.cat(list(mine)), sent, received)
        pieces = torch.split(rows, [row[place] for row in every for place in kept])
        return list(zip([served[place] for _ in every for place in kept], pieces, strict=True))


def owners_of(
    groups: Sequence[Sequence[Linear]], ranks: Ranks, weigh: Weigh = count_products
) -> dict[str, int]:
    """Return which process of a run solves a linear, by label.

    Args:
        groups: Linears that are solved together, as those that read the same input are.
        ranks: Those who share the run.
        weigh: Tells what solving each group takes.
    """
    pairs = zip(groups, ranks.divide(weigh(groups)), strict=True)
    return {one.label: owner for group, owner in pairs for one in group}
