"""How fast masks are selected, beside the way the papers' code does it, on one thread.

N:M: the baseline goes over the column groups and calls top-k for each, as the published implementations do.
Rows: the baseline is a stable sort of every row. Both take turns on the same scores, all distinct, and must
select the same mask. Every timed call follows an untimed one of its own, so that neither pays for what the
other left in the caches. The figure is the median of the repeats.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from structprune.decide.select import mask_groups, mask_matrix, mask_rows


@dataclass(frozen=True)
class Case:
    """One selection, timed both ways; seconds are medians."""

    name: str
    shape: tuple[int, int]
    ours: float
    baseline: float

    @property
    def ratio(self) -> float:
        """Return how many times faster than the baseline."""
        return self.baseline / self.ours


def column_groups(scores: Tensor, kept: int, of: int) -> Tensor:
    """Select N:M as the papers' code does: one top-k per group of columns."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], of):
        lowest = torch.topk(scores[:, start : start + of], of - kept, dim=1, largest=False).indices
        mask.scatter_(1, start + lowest, False)
    return mask


def sorted_rows(scores: Tensor, removed: int) -> Tensor:
    """Select the highest of every row by sorting it."""
    order = torch.sort(scores, dim=1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :removed], False)


def distinct(shape: tuple[int, int]) -> Tensor:
    """Return shuffled float32 scores without ties, which top-k would settle in its own way."""
    count = shape[0] * shape[1]
    assert count <= 2**24, "float32 counts no further"
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order.float().reshape(shape)


def compare(
    name: str,
    shape: tuple[int, int],
    ours: Callable[[Tensor], Tensor],
    baseline: Callable[[Tensor], Tensor],
    repeats: int,
) -> Case:
    """Time both on the same scores, taking turns, after one untimed round that compares the masks."""
    scores = distinct(shape)
    assert torch.equal(ours(scores), baseline(scores)), f"{name} {shape}: the masks differ"
    taken: dict[Callable[[Tensor], Tensor], list[float]] = {ours: [], baseline: []}
    for _ in range(repeats):
        for select, seconds in taken.items():
            select(scores)
            start = time.perf_counter()
            select(scores)
            seconds.append(time.perf_counter() - start)
    return Case(name, shape, statistics.median(taken[ours]), statistics.median(taken[baseline]))


def main() -> None:
    """Time every case and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        compare(
            f"{kept}:{of}",
            shape,
            partial(mask_groups, kept=kept, of=of),
            partial(column_groups, kept=kept, of=of),
            options.repeats,
        )
        for kept, of in ((2, 4), (1, 4), (4, 8), (16, 32))
        for shape in ((1024, 1024), (4096, 4096))
    ]
    half = 2048
    cases.append(
        compare(
            "rows",
            (4096, 4096),
            lambda s: mask_rows(s, half),
            lambda s: sorted_rows(s, half),
            options.repeats,
        )
    )
    total = 1024 * 4096 // 2
    cases.append(
        compare(
            "matrix",
            (1024, 4096),
            lambda s: mask_matrix(s, total),
            lambda s: sorted_rows(s.reshape(1, -1), total).view(s.shape),
            options.repeats,
        )
    )
    if options.json:
        print(json.dumps([asdict(case) | {"ratio": case.ratio} for case in cases]))
        return
    print(f"{'select':8} {'shape':>12} {'ours':>10} {'baseline':>11} {'ratio':>7}")
    for case in cases:
        shape = f"{case.shape[0]} x {case.shape[1]}"
        ours, baseline = case.ours * 1e3, case.baseline * 1e3
        print(f"{case.name:8} {shape:>12} {ours:7.2f} ms {baseline:8.1f} ms {case.ratio:6.1f}x")


if __name__ == "__main__":
    main()
