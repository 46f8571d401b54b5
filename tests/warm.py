"""The warm parent of `tests.forks`: one thread, everything imported, a job per line of JSON on stdin.

Each job is a command line in a child, in which calls that change the disk are counted, and can be the last.
"""

import errno
import importlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.forks import TIMED_OUT, Around, Ended, Stop

# What takes room fails while a disk is full; what only renames or removes does not.
STREAMS = ("out", "err")
TAKES_ROOM = ("open", "write", "pwrite", "fsync", "mkdir", "link", "symlink", "sendfile")


class Disk:
    """Counts what changes the disk below a folder; the call with a number is the last one, or fails."""

    def __init__(self, place: str, stop: Stop | None) -> None:
        self.place = place
        self.stop = stop if stop and stop.at == "call" else None
        self.calls: list[str] = []
        for name in ("write", "pwrite", "fsync", "ftruncate", "sendfile"):
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        sys.addaudithook(self._audit)

    def _wrapped(self, name: str, real: Any) -> Any:
        def call(descriptor: int, *rest: Any, **options: Any) -> Any:
            with suppress(OSError):
                self._meet(name, str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            if self._fails(name):
                raise self._error
            return real(descriptor, *rest, **options)

        return call

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        name = event.removeprefix("os.")
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif name not in ("rename", "mkdir", "remove", "rmdir", "link", "symlink", "truncate"):
            return
        path = args[1] if name in ("rename", "link", "symlink") else args[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        folder = args[-1] if isinstance(args[-1], int) and args[-1] >= 0 and event != "open" else None
        above = Path(f"/proc/self/fd/{folder}" if folder is not None else ".").resolve()
        self._meet(name, str(above / os.fsdecode(path)))
        if self._fails(name):
            raise self._error

    def _meet(self, name: str, path: str) -> None:
        self._error = OSError(0, "")
        self._here = path.startswith(self.place)
        if self._here:
            self.calls.append(f"{name} {path.removeprefix(self.place)}")
            number = self.stop.number if self.stop else None
            if self.stop and len(self.calls) == number and self.stop.by == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.stop and self.stop.by != "kill":
                code = getattr(errno, self.stop.by)
                self._error = OSError(code, os.strerror(code), path)

    def _fails(self, name: str) -> bool:
        if self.stop is None or not self._here or self.stop.by == "kill":
            return False
        if self.stop.by == "ENOSPC":
            return len(self.calls) >= self.stop.number and name in TAKES_ROOM
        return len(self.calls) == self.stop.number


def _serve() -> None:
    _warm_up()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would copy one of several threads"
    for line in sys.stdin:
        print(json.dumps([asdict(ended) for ended in _fork(json.loads(line))]), flush=True)
    os._exit(0)  # to take all that was imported apart takes a second


def _warm_up() -> None:
    import pytest
    import torch
    from tqdm import tqdm

    from tests import specimens

    torch.set_num_threads(1)
    # Its monitor is a thread.
    tqdm.monitor_interval = 0
    specimens.leave_out_fresh_process(pytest.MonkeyPatch())
    specimens.leave_out_waiting(pytest.MonkeyPatch())
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        specimens.write_specimens(Path(folder) / "specimens")


def _fork(jobs: Sequence[Mapping[str, Any]]) -> list[Ended]:
    """Run commands at the same time, each in a child; return how each ended."""
    with ExitStack() as folders:
        begun = []
        for job in jobs:
            told = Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="fork-")))
            for name in STREAMS:  # a child may be killed before it opens them
                (told / name).touch()
            before, moment = _resident(), time.monotonic()
            child = os.fork()
            if child == 0:
                _be_a_command(job, Stop(**job["stop"]) if job["stop"] else None, told)
            begun.append((job, told, before, moment, child))
        return [_wait_for(*one) for one in begun]


def _wait_for(job: Mapping[str, Any], told: Path, before: int, began: float, child: int) -> Ended:
    stops = job["stop"] is not None and job["stop"]["at"] == "seconds"
    limit = job["stop"]["number"] if stops else job["limit"]
    killed = not _ends_within(child, max(began + limit - time.monotonic(), 0))
    if killed:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    calls = told / "calls"
    return Ended(
        code=TIMED_OUT if killed and not stops else os.waitstatus_to_exitcode(status),
        out=(told / "out").read_text(errors="replace"),
        err=(told / "err").read_text(errors="replace"),
        seconds=time.monotonic() - began,
        growth=usage.ru_maxrss * 1024 - before,
        calls=tuple(json.loads(calls.read_text())) if calls.exists() else (),
    )


def _ends_within(child: int, seconds: float) -> bool:
    descriptor = os.pidfd_open(child)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _be_a_command(job: Mapping[str, Any], stop: Stop | None, told: Path) -> None:
    """Become a command line, in a process of its own; never returns."""
    code = 1
    try:
        from structprune.cli import main

        for number, name in enumerate(STREAMS, 1):
            os.dup2(os.open(told / name, os.O_WRONLY), number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(job["place"])
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - for as long as the process lives
        around = Around(**job["around"])
        _place_around(around)
        if stop and stop.at == "line":
            sys.stderr = _Lines(stop.number)  # type: ignore[assignment]  # all that anybody calls of it
        disk = Disk(job["place"], stop)
        try:
            code = main(job["words"])
        except Exception:  # noqa: BLE001 - what Python does with it: the traceback, and exit code 1
            traceback.print_exc()
        disk.stop = None
        sys.stdout.flush()
        sys.stderr.flush()
        (told / "calls").write_text(json.dumps(disk.calls))
    except BaseException:  # noqa: BLE001 - nothing may run on in the copy of the parent
        traceback.print_exc()
    finally:
        os._exit(code)


def _place_around(around: Around) -> None:
    os.environ.update(around.variables)
    if around.memory is not None:
        most = (
            int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + around.memory
        )
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if around.patch:
        module, _, name = around.patch.partition(":")
        getattr(importlib.import_module(f"tests.{module}"), name)()
    if around.signal is not None:
        sys.stderr = _Lines(1, around.signal)  # type: ignore[assignment]  # all that anybody calls of it


class _Lines:
    """Stderr, on which one line makes the process send itself a signal."""

    def __init__(self, number: float, sends: int = signal.SIGKILL) -> None:
        self._stream = sys.stderr
        self._left = number
        self._sends = sends

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        self._stream.flush()
        before, self._left = self._left, self._left - text.count("\n")
        if self._left <= 0 < before:
            os.kill(os.getpid(), self._sends)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    _serve()
