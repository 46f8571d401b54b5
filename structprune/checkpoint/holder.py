"""Who holds a lock: a process, told apart from one that had its number before, on this machine or another."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Return what a lock file says of its holder."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": boot(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def may_live(holder: Mapping[str, Any], *, free: bool) -> bool:
    """Tell whether the process that wrote a lock file may still run.

    Args:
        holder: What the file says.
        free: The system has locks on this disk, and sees none on the file.
    """
    if holder.get("released"):
        return False
    here = this_process()
    if holder.get("boot") != here["boot"]:
        # After a restart of this machine nobody is left; another machine cannot be looked into.
        return bool(holder.get("host") != here["host"])
    if holder.get("host") != here["host"]:
        # Another container on this machine: its processes cannot be seen, but one kernel keeps all locks.
        return not free
    started = _start_of(holder["pid"]) if isinstance(holder.get("pid"), int) else None
    return started is not None and started == holder.get("started")


def boot() -> str:
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
