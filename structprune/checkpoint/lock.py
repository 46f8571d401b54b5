"""One run per output: a lock file beside it that names its holder, and is stale when that is gone."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from structprune.errors import EnvironmentFailure
from structprune.storage.durable import blame

logger = logging.getLogger(__name__)


class Lock:
    """Hold `OUT.lock` while the `with` block runs.

    The system's own file lock decides where it works: it ends with its process, however that dies. The
    content of the file (process, host, boot) decides elsewhere (some network disks), and is what is told.

    Args:
        output: The output folder that is protected; neither it nor its parent need exist.

    Raises:
        EnvironmentFailure: Another run holds the lock, or the file cannot be written.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + ".lock")
        self._descriptor = -1

    def __enter__(self) -> Self:
        with blame(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._open():
                pass
        holder = _parse(os.pread(self._descriptor, 4096, 0))
        if holder and _may_live(holder):
            self._close()
            raise self._held_by(holder)
        if holder:
            logger.info("%s: taking over the lock of process %s, which is gone", self.path, holder.get("pid"))
        with blame(self.path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(_this_process()).encode(), 0)
            os.fsync(self._descriptor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        self._close()

    def _open(self) -> bool:
        """Open and lock the file; return False where its holder just removed it: it must be made anew."""
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _parse(os.pread(self._descriptor, 4096, 0))
            self._close()
            raise self._held_by(holder) from None
        except OSError as error:
            # No file locks on this disk: the content of the file decides.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        if self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self._descriptor)):
            return True
        self._close()
        return False

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _held_by(self, holder: dict[str, Any]) -> EnvironmentFailure:
        who = f"pid {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"
        return EnvironmentFailure(
            f"{self.path}: locked by {who}",
            hint="wait for that run; delete the lock file only if you know that it is gone",
        )


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _may_live(holder: dict[str, Any]) -> bool:
    """Tell whether the process that wrote a lock, which the system sees as free, may still run."""
    here = _this_process()
    if holder.get("boot") != here["boot"]:
        # After a restart of this machine nobody is left; another machine cannot be looked into.
        return bool(holder.get("host") != here["host"])
    if holder.get("host") != here["host"]:
        return False  # Another container on this machine: the system's lock, which is free, covers both.
    started = _start_of(holder["pid"]) if isinstance(holder.get("pid"), int) else None
    return started is not None and started == holder.get("started")


def _parse(data: bytes) -> dict[str, Any]:
    """Return the content of a lock file; empty where a killed process left half of it."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _boot() -> str:
    """Return what changes at every start of the machine; empty where the system does not tell."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _start_of(pid: int) -> str | None:
    """Return when a process was started, so that a reused number is told apart; None if it does not run."""
    if Path("/proc/self/stat").exists():
        try:
            # The 22nd field; the second, the command, is in parentheses and may itself hold spaces.
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except (FileNotFoundError, ProcessLookupError):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # It runs, under another user.
    return ""
