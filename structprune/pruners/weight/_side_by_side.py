"""Independent work on the threads that PyTorch may use, and on the processes of a run."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from structprune.ranks import Ranks
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix, read_pruned, written_pruned

T = TypeVar("T")
R = TypeVar("R")

# By label what becomes of matrices.
Solved = dict[str, PrunedMatrix]


def run_side_by_side(work: Callable[[T], R], jobs: Sequence[T], of: int) -> list[R]:
    """Do independent work, each job with one thread of those that PyTorch may use; return the results.

    Args:
        work: Does one job.
        jobs: Those of this process.
        of: How many jobs all processes have: a single one gets all threads.
    """
    threads = torch.get_num_threads()
    # Not by the jobs that are here: with how many threads one is done shows in its last bits.
    if threads == 1 or of < 2 or not jobs:
        return [work(job) for job in jobs]
    try:
        # One thread a job: to split the small steps of a solver among threads costs more than it gains.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, jobs))
    finally:
        torch.set_num_threads(threads)


def solve_on_ranks(
    solve: Callable[[Sequence[MatrixToPrune]], Solved],
    groups: Sequence[Sequence[MatrixToPrune]],
    owners: Mapping[str, int],
    ranks: Ranks,
) -> Solved:
    """Return what becomes of the matrices of a block; every process solves some groups and is told the rest.

    Args:
        solve: Solves one group.
        groups: Matrices that read the same input are one.
        owners: Which process solves a matrix, by label; one and the same all of a group.
        ranks: Those who solve.

    Raises:
        StructpruneError: One process met it; all raise it.
    """
    solved: Solved = {}

    def work() -> tuple[dict[str, Any], dict[str, Tensor]]:
        mine = [group for group in groups if owners[group[0].label] == ranks.number]
        for part in run_side_by_side(solve, mine, len(groups)):
            solved.update(part)
        return written_pruned(solved)

    devices = {one.label: one.weight.device for group in groups for one in group}
    for number, told in enumerate(ranks.share(work)):
        if number != ranks.number:
            solved |= read_pruned(*told, devices)
    return solved
