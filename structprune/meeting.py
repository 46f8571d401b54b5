"""Where the processes that a launcher started find each other, and which of them says what went wrong."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from structprune.errors import EnvironmentFailure, RankLost
from structprune.machine import MEETING, PLACE, Launch, launch

# Until all have come: on a slow disk torch alone takes a minute to import.
PATIENCE_TO_MEET = timedelta(minutes=5)
# Longer than the longest solve: a rank waits for the answer of another.
PATIENCE = timedelta(hours=12)
# So long a process may take to find what another has found.
SECONDS_TO_AGREE = 10.0
# Whoever only lost another ends after it, so that a launcher shows the one that failed.
SECONDS_BEHIND = 1.0
# The word of a process that has nothing to say but that another has ended.
LOST = "lost"
# Counts those who have read the word of the first.
READ = "read"

# Where the processes of each meeting of this one have written, the last one's last.
_boards: list[Store] = []


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes of a launch for the length of a `with`; what ends one of them all can read.

    Raises:
        EnvironmentFailure: They cannot be reached.
    """
    place = launch()
    # Cards talk through NCCL, which waits for ever for a process that has ended; gloo notices.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local_rank)
        board = _meet(place)
        dist.init_process_group(
            backend, store=board, rank=place.rank, world_size=place.count, timeout=PATIENCE
        )
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise EnvironmentFailure(
            f"the {place.count} processes of this run do not find each other: {said}",
            hint="start them with torchrun, which tells each where the others are",
        ) from error
    _boards.append(board)
    try:
        yield
    except BaseException as error:
        # Before its connections close: whoever loses them looks here for the reason.
        with suppress(RuntimeError):
            board.set(_word_of(place.rank), _word(error))
        raise
    finally:
        dist.destroy_process_group()


def check_launch() -> None:
    """Check what a launcher told this process.

    Raises:
        EnvironmentFailure: It is one of several, and was not told which one or where the others are.
    """
    count, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    if not (count.isdecimal() and rank.isdecimal() and int(count) > 1):
        return
    missing = [name for name in PLACE + MEETING if not os.environ.get(name)]
    if missing or int(rank) >= int(count):
        said = f"RANK is {rank} of WORLD_SIZE {count}"
        raise EnvironmentFailure(
            f"{said}, and {', '.join(missing)} not set" if missing else said,
            hint="start them with torchrun, which sets them all; or unset RANK and WORLD_SIZE",
        )


def on_cards() -> bool:
    """Tell whether the joined processes exchange tensors between cards."""
    return "nccl" in dist.get_backend_config()


def exchange(call: Callable[..., object], *args: Any, **options: Any) -> None:
    """Do what all processes do together.

    Args:
        call: A collective of `torch.distributed`.
        *args: Its arguments.
        **options: Its other arguments.

    Raises:
        RankLost: Another process has ended.
    """
    with blaming_peers():
        if on_cards():
            dist.all_reduce(torch.zeros(1))  # over gloo: it notices who is gone
        call(*args, **options)


@contextmanager
def blaming_peers() -> Iterator[None]:
    """Turn a broken connection into a word on the other processes.

    Raises:
        RankLost: Another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo has no exception of its own: it names its source file before what happened, and guesses behind.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        said = " ".join(str(error).split()).rpartition("] ")[2].partition(". ")[0][:200]
        raise RankLost(
            f"another process of the run has ended: {said}",
            hint="see what that one says, and run the same command again: it resumes",
        ) from error


def is_told(error: BaseException) -> bool:
    """Tell whether another process of the launch says what ends this one.

    Of what several find alike the first of them speaks, and of a lost process, which says nothing, the first
    of all. Before they have met, each speaks.
    """
    place = launch()
    if not _boards:
        return False
    board = _boards[-1]
    if isinstance(error, RankLost):
        time.sleep(SECONDS_BEHIND)
        if place.rank:
            with suppress(RuntimeError):
                board.add(READ, 1)  # the first has nothing to wait for
            return True
        words = (_read(board, rank) for rank in range(place.count))
        return any(word not in (None, LOST) for word in words)
    with suppress(RuntimeError):  # The board is where no launcher keeps it the first one's, and goes with it.
        if place.rank == 0:
            # On a busy machine one of them may not even have met the others.
            _poll(SECONDS_TO_AGREE, lambda: board.add(READ, 0) == place.count - 1)
            return False
        _poll(SECONDS_TO_AGREE, lambda: _read(board, 0) is not None)
        told = any(_read(board, rank) == _word(error) for rank in range(place.rank))
        board.add(READ, 1)
        return told
    return False


def _poll(seconds: float, ends: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not ends() and time.monotonic() < deadline:
        time.sleep(0.05)


def _meet(place: Launch) -> Store:
    """Return where all processes of a launch can read what each has written, once all have come."""
    found, _, _ = next(rendezvous("env://", timeout=PATIENCE_TO_MEET))
    board = PrefixStore(f"structprune/{len(_boards)}", found)
    board.set(f"here/{place.rank}", "")
    try:
        board.wait([f"here/{rank}" for rank in range(place.count)], PATIENCE_TO_MEET)
    except RuntimeError as error:
        absent = [str(rank) for rank in range(place.count) if not board.check([f"here/{rank}"])]
        raise RuntimeError(f"rank {', '.join(absent)} did not come") from error
    board.set_timeout(PATIENCE)
    return board


def _word_of(rank: int) -> str:
    return f"word/{rank}"


def _word(error: BaseException) -> str:
    return LOST if isinstance(error, RankLost) else f"{type(error).__name__}: {error}"


def _read(board: Store, rank: int) -> str | None:
    """Return the last word of a process; None where it has given none."""
    return str(board.get(_word_of(rank)), "utf-8") if board.check([_word_of(rank)]) else None
