"""Stdout and stderr that outlast what they lead to: no run stops because nobody can read what it says."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class Outlet:
    """A text stream that never refuses: once the disk is full or the reader has left, the rest is dropped.

    Libraries print and warn as they like; a full log file must not end hours of work in one of their lines.

    Args:
        stream: Where the text goes; None where the descriptor was closed before the program began.

    Attributes:
        lost: Why text was dropped; None as long as all of it went out.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: TextIO = open(os.devnull, "w") if stream is None else stream  # noqa: PTH123, SIM115
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write text.

        Raises:
            UnicodeEncodeError: The stream's encoding lacks a character.
        """
        with self._given_up_on_failure():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Send out what is buffered."""
        with self._given_up_on_failure():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Return everything else as the stream has it: its encoding, its descriptor ..."""
        return getattr(self._stream, name)

    @contextmanager
    def _given_up_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error
            # The descriptor itself, because Python flushes what is left in the buffer when it exits, and
            # would complain then with an exit code of its own.
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def lasting_streams() -> Iterator[Outlet]:
    """Put an `Outlet` in the place of stdout and of stderr as long as the context lasts.

    Yields:
        That of stdout.
    """
    _occupy_closed()
    out, err = Outlet(sys.stdout), Outlet(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


def _occupy_closed() -> None:
    """Open what was closed before the program began, on nothing.

    The next file that is opened would otherwise get the number of stdout or stderr, and whatever a library
    prints from C would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
