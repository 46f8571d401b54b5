"""Commands in children of a warm parent: a second instead of ten; each can be killed, refused and measured.

The parent is `python -m tests.warm`. Nothing of a child survives it, so a test may do what it likes.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
VARIABLES = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TIMED_OUT = -99


@dataclass(frozen=True)
class Stop:
    """How a command is stopped.

    Attributes:
        at: What is counted: "line" of stderr, "call" that changes the disk, or "seconds".
        number: Which one, from 1; or how many seconds.
        by: "kill", or the name of the error that the call gives: from then on for ENOSPC, else once.
    """

    at: str
    number: float
    by: str = "kill"


@dataclass(frozen=True)
class Around:
    """What is around a command.

    Attributes:
        variables: Environment variables beside the usual ones.
        memory: Bytes of address space that it may take on top of the parent's; None for all there are.
        signal: Sent to it after its first line on stderr; None for none.
        patch: "module:name" of a stand-in in `tests`, called before the command; "" for none.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    memory: int | None = None
    signal: int | None = None
    patch: str = ""


ALONE = Around()


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for a signal.
        out: Its stdout.
        err: Its stderr.
        seconds: How long it took.
        growth: By how many bytes it outgrew the warm parent.
        calls: What it did to the disk, in order; empty where it was killed.
    """

    code: int
    out: str
    err: str
    seconds: float
    growth: int
    calls: tuple[str, ...] = ()

    @property
    def lines(self) -> int:
        """Return how many lines stand on stderr."""
        return self.err.count("\n")

    @property
    def error(self) -> dict[str, Any]:
        """Return kind, message and hint of a command that was run with --json and failed; else nothing."""
        rows = self.out.strip().splitlines()
        found = json.loads(rows[-1]) if rows else {}
        said: dict[str, Any] = found.get("error") or {}
        return said


class Parent:
    """A warm parent, as long as the `with` block lasts."""

    def __enter__(self) -> Self:
        words = [sys.executable, "-m", "tests.warm"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=os.environ | VARIABLES
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(
        self,
        words: Sequence[object],
        place: Path,
        stop: Stop | None = None,
        around: Around = ALONE,
        *,
        limit: float = 60.0,
    ) -> None:
        """Begin a command in the folder `place`; only what it does there is counted."""
        self._begin([_job(words, place, stop, around, limit)])

    def _begin(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()

    @property
    def is_running(self) -> bool:
        """Tell whether the parent lives."""
        return self._process.poll() is None

    def finish(self) -> Ended:
        """Wait for the command that was begun."""
        (ended,) = self._finish()
        return ended

    def _finish(self) -> list[Ended]:
        assert self._process.stdout is not None
        answers = json.loads(self._process.stdout.readline())
        return [Ended(**answer | {"calls": tuple(answer["calls"])}) for answer in answers]

    def launch(
        self,
        lines: Sequence[Sequence[object]],
        place: Path,
        arounds: Mapping[int, Around] = {},
        stops: Mapping[int, Stop] = {},
        *,
        limit: float = 60.0,
    ) -> list[Ended]:
        """Run command lines as the processes of one launch, told what a launcher tells them.

        Args:
            lines: One per process.
            place: As for `start`.
            arounds: What is around some of them, by number.
            stops: How some of them are stopped, by number.
            limit: As for `start`.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = str(len(lines))
        jobs = []
        for number, words in enumerate(lines):
            around = arounds.get(number, ALONE)
            told = {"RANK": str(number), "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            told |= {"LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": count, "MASTER_PORT": str(port)}
            around = replace(around, variables=told | dict(around.variables))
            jobs.append(_job(words, place, stops.get(number), around, limit))
        self._begin(jobs)
        return self._finish()

    def run(
        self,
        words: Sequence[object],
        place: Path,
        stop: Stop | None = None,
        around: Around = ALONE,
        *,
        limit: float = 60.0,
    ) -> Ended:
        """Run a command to its end."""
        self.start(words, place, stop, around, limit=limit)
        return self.finish()


def _job(
    words: Sequence[object], place: Path, stop: Stop | None, around: Around, limit: float
) -> dict[str, Any]:
    job = {"words": [str(word) for word in words], "place": str(place.resolve()), "limit": limit}
    return job | {"stop": asdict(stop) if stop else None, "around": asdict(around)}
