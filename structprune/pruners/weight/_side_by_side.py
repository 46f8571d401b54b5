"""Independent work on the threads that PyTorch may use, and on the processes of a run."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from structprune.ranks import Ranks
from structprune.solvers.matrix import MatrixToPrune, PrunedMatrix, read_pruned, written_pruned

T = TypeVar("T")
R = TypeVar("R")

# By label what becomes of matrices.
Solved = dict[str, PrunedMatrix]


def run_side_by_side(work: Callable[[T], R], jobs: Sequence[T]) -> list[R]:
    """Do independent work, each job with one thread of those that PyTorch may use; return the results."""
    threads = torch.get_num_threads()
    if threads == 1 or len(jobs) < 2:
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
    ranks: Ranks,
) -> Solved:
    """Return what becomes of the matrices of a block; every process solves some groups and is told the rest.

    Args:
        solve: Solves one group.
        groups: Matrices that read the same input are one.
        ranks: Those who solve.
    """
    # What a solver does to a row grows with the square of its length, to a matrix with the cube.
    costs = [sum(float(one.weight.numel()) * one.weight.shape[1] for one in group) for group in groups]
    owners = ranks.divide(costs)
    mine = [group for group, owner in zip(groups, owners, strict=True) if owner == ranks.number]
    solved = {label: one for part in run_side_by_side(solve, mine) for label, one in part.items()}
    if ranks.alone:
        return solved
    said, tensors = written_pruned(solved)
    devices = {one.label: one.weight.device for group in groups for one in group}
    for number, told in enumerate(ranks.tell_each(said, tensors)):
        if number != ranks.number:
            solved |= read_pruned(*told, devices)
    return solved
