"""What reaches the terminal: results on stdout, progress and errors on stderr, signals on the way in.

Only the command line, the scripts and the demo use it; the library logs and calls back.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from structprune.errors import Interrupted, StructpruneError
from structprune.report.figures import plain

# Often enough that silence is no hang, seldom enough for a log file.
SECONDS_BETWEEN_LINES = 30.0
# Columns from which on the time left, and a bar, fit beside the name of a stage.
NARROW, WIDE = 40, 72
# "1000/1000" and the time left, with what separates them.
COUNT, TIME = 10, 7
PARTIAL = re.compile(r"\.partial-[0-9a-f]+")
# A closed terminal (SIGHUP) and a cluster's scheduler (SIGTERM) stop a run as Ctrl-C does.
STOPPING: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Report = Callable[[str, int, int], None]


def say(text: str, stream: TextIO | None = None) -> None:
    """Write a line to stdout, or to `stream`."""
    target = sys.stdout if stream is None else stream
    try:
        target.write(f"{text}\n")
        target.flush()
    except UnicodeEncodeError as error:
        # Part of the text may be in the buffer; what cannot be encoded is escaped, not lost.
        # The stream's own encoding: for the code pages of Windows the error's is "charmap".
        known = getattr(target, "encoding", None) or error.encoding
        target.write(f"{text.encode(known, 'backslashreplace').decode(known)}\n")
        target.flush()


def say_json(data: Mapping[str, Any]) -> None:
    """Write one JSON object as one line to stdout; numbers that are not finite become null."""
    say(json.dumps(plain(data), allow_nan=False))


def complain(error: StructpruneError) -> None:
    """Write an error and its hint to stderr, one line each."""
    say(f"error: {_one_line(error.message)}", sys.stderr)
    say(f"hint: {_one_line(error.hint)}", sys.stderr)


def error_json(error: StructpruneError, figures: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object of a failed command, with the figures it still has."""
    said = {"kind": error.kind, "message": _one_line(error.message), "hint": _one_line(error.hint)}
    return {"status": "error", "code": error.exit_code, **(figures or {}), "error": said}


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Turn the first stopping signal into `Interrupted`; the second one kills as usual.

    Yields:
        A function that raises again when a signal came and whatever ran then swallowed the exception.
    """
    received: list[int] = []
    former: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature that signal calls
        received.append(number)
        for other in former:
            signal.signal(other, signal.SIG_DFL)
        raise Interrupted(number)

    def check() -> None:
        if received:
            raise Interrupted(received[0])

    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            # Started under nohup a signal is ignored, and stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                former[number] = signal.signal(number, stop)
    try:
        yield check
    except BaseException as error:
        # Whatever ran may have turned it into an error of its own; transformers does while it imports.
        if received and not isinstance(error, Interrupted):
            raise Interrupted(received[0]) from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unstoppable() -> Iterator[None]:
    """Ignore the stopping signals for the length of a `with`."""
    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def logging_to_stderr(*, verbose: bool = False, silent: bool = False) -> Iterator[None]:
    """Show the library's warnings, all it notes, or nothing on stderr, as long as the context lasts."""
    level = logging.INFO if verbose else logging.WARNING
    if silent:  # Without any handler Python's own would show them.
        level = logging.CRITICAL + 1
    handler = _StderrHandler(level)
    logger = logging.getLogger("structprune")
    former = logger.level
    logger.addHandler(handler)
    if verbose:
        logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former)


@contextlib.contextmanager
def progress_on_stderr(check: Callable[[], None] = lambda: None, *, quiet: bool = False) -> Iterator[Report]:
    """Show progress on stderr: bars with the time left on a terminal, else a plain line now and then.

    Args:
        check: Called at every report; may raise to stop the run.
        quiet: Show nothing.

    Yields:
        A function to be told (stage, done, total).
    """
    shown: _Bars | _Lines = _Bars() if _can_draw(sys.stderr) else _Lines()

    def report(stage: str, done: int, total: int) -> None:
        check()
        if not quiet:
            shown.report(stage, done, total)

    try:
        yield report
    finally:
        shown.close()


class _Bars:
    """One bar per stage, drawn by rich; nothing is drawn before the first report."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def report(self, stage: str, done: int, total: int) -> None:
        if self._progress is None:
            console = Console(stderr=True)
            self._progress = Progress(*_columns(console.width), console=console)
            self._progress.start()
        if stage not in self._tasks or (done < self._progress.tasks[self._tasks[stage]].completed):
            # A stage that begins again (a second pruner, a second text) gets a bar of its own.
            self._tasks[stage] = self._progress.add_task(
                _fitting(stage, self._progress.console.width), total=total
            )
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _columns(width: int) -> list[ProgressColumn]:
    """Return what of a stage is shown on so many columns: name and count always, its bar where it fits."""
    # Rich would break any column that may be broken before it cuts one.
    count = MofNCompleteColumn(table_column=Column(no_wrap=True))
    if width < NARROW:
        return [TextColumn("{task.description}", table_column=Column(no_wrap=True)), count]
    name, left = (
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    if width < WIDE:
        return [name, count, left]
    return [name, BarColumn(), count, TimeElapsedColumn(), TextColumn("left"), left]


def _fitting(stage: str, width: int) -> str:
    """Return a stage's name, cut where its count and the time left would not fit beside it."""
    room = max(width - (COUNT if width < NARROW else COUNT + TIME), 1)
    return stage if width >= WIDE or len(stage) <= room else f"{stage[: room - 1]}\u2026"


class _Lines:
    """Plain ASCII lines: when a stage starts and ends, and every half minute between."""

    def __init__(self) -> None:
        self._stage = ""
        self._first = self._done = 0
        self._started = self._last = 0.0

    def report(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage or done < self._done:
            self._stage, self._first = stage, done
            self._started = self._last = now
            say(stage if total == 1 else f"{stage}: {done} of {total}", sys.stderr)
        elif done >= total > self._done:
            counted = "" if total == 1 else f"{done} of {total}, "
            say(f"{stage}: {counted}done in {duration(now - self._started)}", sys.stderr)
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            say(f"{stage}: {done} of {total}{self._left(now, done, total)}", sys.stderr)
        self._done = done

    def close(self) -> None:
        """Nothing is left open."""

    def _left(self, now: float, done: int, total: int) -> str:
        advanced = done - self._first
        if advanced <= 0:
            return ""
        return f", about {duration((now - self._started) / advanced * (total - done))} left"


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is at the moment: while bars are drawn, rich puts itself there.

    Each line is said once: a run opens the same folder several times, each time with the same warnings.
    """

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        # A model's copy under work has the oddities of its source: which folder it is makes no other fact.
        told = record.args if isinstance(record.args, tuple) else ()
        told = tuple("" if isinstance(one, Path) else one for one in told)
        fact = str(record.msg) % told if told else str(record.msg)
        if fact not in self._said:
            self._said.add(fact)
            # A partial folder is the output under work, and that is how the user knows it.
            said = PARTIAL.sub("", _one_line(record.getMessage()))
            say(f"{record.levelname.lower()}: {said}", sys.stderr)


def _can_draw(stream: TextIO) -> bool:
    if not stream.isatty() or os.environ.get("TERM", "") in ("", "dumb", "unknown"):
        return False
    # Python answers LANG=C with UTF-8, but the terminal behind it need not know that.
    named = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or "C"
    return "utf" in named.lower()


def duration(seconds: float) -> str:
    """Return a time in words, to the second."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _one_line(text: str) -> str:
    return " ".join(text.split())
