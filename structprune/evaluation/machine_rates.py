"""Measuring this machine: a few seconds of the operations that a run consists of.

Each is repeated, and the best round counts: whatever else runs on the machine can only make a round slower.
"""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from structprune.calibration.statistics import InputSums
from structprune.decide.select import mask_rows
from structprune.evaluation.rates import Rates, Site
from structprune.models.opening import DTYPES
from structprune.ranks import Ranks
from structprune.storage.durable import blame
from structprune.storage.safe_open import CHUNK_BYTES, open_regular, read_at
from structprune.storage.scratch import scratch_folder

# So long one operation is repeated.
SECONDS = 0.4
# Rows and columns of what is multiplied, squared and ranked. On a processor a round takes less than the
# millisecond or two that it is left to itself where others want it, too; an accelerator wants to be filled.
WIDTH, DEVICE_WIDTH = 384, 4096
# Larger than any cache, small enough for any memory.
MOVED_BYTES, READ_BYTES = 128 << 20, 256 << 20
# What processes send each other of one matrix.
SENT_BYTES, ROUNDS = 16 << 20, 3


def measure_rates(device: str, ranks: Ranks, file: Path | None = None) -> Rates:
    """Measure this machine; of several processes all measure side by side, and the slowest counts.

    Args:
        device: Where to compute.
        ranks: Those who measure.
        file: What to read from; unless given, a file is written to the temporary folder for it.

    Raises:
        InputError: It cannot be read.
        EnvironmentFailure: The disk is full or fails.
    """
    place = torch.device(device)

    def slowest(amount: float, work: Callable[[], object]) -> float:
        ranks.wait()
        rate = torch.tensor([amount / _best_seconds(work, place)], dtype=torch.float64)
        return float(ranks.gather(rate).min())

    width = WIDTH if place.type == "cpu" else DEVICE_WIDTH
    one = torch.randn(width, width, device=place)
    factors = {name: one.to(dtype) for name, dtype in DTYPES.items()}
    flops = {name: slowest(2 * width**3, partial(torch.mm, each, each)) for name, each in factors.items()}
    moved, target = torch.zeros(2, MOVED_BYTES // 8, device=place)
    sums = InputSums(frozenset({"norm"}), width, place)
    return Rates(
        Site.here(device, ranks.count),
        flops,
        moved_bytes=slowest(MOVED_BYTES, lambda: target.copy_(moved)),
        read_bytes=_reading_rate(file, slowest),
        squared=slowest(width**2, lambda: sums.add(one)),
        ranked=slowest(width**2, lambda: mask_rows(one.abs() * one[0], width // 2)),
        sent_bytes=None if ranks.alone else _sending_rate(ranks, place),
    )


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long some work takes in its best round."""
    best, began = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) < began + SECONDS:
        work()
        _finish(device)
        best = min(best, time.perf_counter() - start)
    return best


def _finish(device: torch.device) -> None:
    """Wait until a device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


Slowest = Callable[[float, Callable[[], object]], float]


def _reading_rate(file: Path | None, slowest: Slowest) -> float:
    """Return how many bytes a second come from a file that the system does not hold in memory."""
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8).numpy().data
    with ExitStack() as stack:
        if file is None:
            file = Path(stack.enter_context(scratch_folder("rates"))) / "read"
            with blame(file), file.open("wb") as written:
                for _ in range(READ_BYTES // CHUNK_BYTES):
                    written.write(buffer)
                written.flush()
                os.fsync(written.fileno())
        descriptor = stack.enter_context(open_regular(file))
        size = min(os.fstat(descriptor).st_size, READ_BYTES)

        def read() -> None:
            if hasattr(os, "posix_fadvise"):  # elsewhere it may be memory that is measured
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            for start in range(0, size, CHUNK_BYTES):
                read_at(descriptor, buffer[: size - start], start, file)

        return slowest(size, read)


def _sending_rate(ranks: Ranks, device: torch.device) -> float:
    """Return how many bytes a second pass the process that adds up a sum, which all then get."""
    sums, best = torch.zeros(SENT_BYTES // 4 // WIDTH, WIDTH, device=device), float("inf")
    for _ in range(ROUNDS):  # however fast: every process must come as often as the others
        ranks.wait()
        start = time.perf_counter()
        ranks.add_in_order(sums)
        _finish(device)
        best = min(best, time.perf_counter() - start)
    # Gathered from all others, and told once to them.
    sent = ranks.count * sums.nbytes
    return float(ranks.gather(torch.tensor([sent / best], dtype=torch.float64)).min())
