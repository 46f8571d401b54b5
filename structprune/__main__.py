"""`structprune` and `python -m structprune`: signals are answered before the command line is imported."""

import contextlib
import importlib
import os
import signal
import sys
from types import FrameType

HINT = "is the memory limited (`ulimit -v`)? if not, install structprune again"


def run() -> int:
    """Run this process's command line and return its exit code.

    The imports take long enough for a Ctrl-C, and nothing has been begun then that would have to be ended.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name)
        # Started under nohup a signal is ignored, and stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    try:
        line = importlib.import_module("structprune.cli")
    except (ImportError, MemoryError) as error:
        os.write(2, f"error: the command line cannot be imported: {error}\nhint: {HINT}\n".encode())
        return 4
    code: int = line.main()
    return code


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature that signal calls
    # Of several processes that a launcher started the one that failed speaks, not those that it then ends.
    with contextlib.suppress(OSError):
        if os.environ.get("WORLD_SIZE", "1") == "1":
            os.write(2, f"error: stopped by signal {number}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(run())
