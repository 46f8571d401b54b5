"""Independent work on the threads that PyTorch may use."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


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
