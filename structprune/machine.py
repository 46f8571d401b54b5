"""The machine a run happened on: what it is, what is installed on it, and how much memory the run took."""

import ctypes
import os
import platform
import resource
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from structprune.errors import EnvironmentFailure

PACKAGES = (
    "structprune",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "accelerate",
    "peft",
    "lm_eval",
    "datasets",
    "huggingface_hub",
    "pydantic",
    "numpy",
    "matplotlib",
)

# What torch and transformers map before there is any model; below it their C++ parts abort or never end.
IMPORTS_BYTES = 1 << 30

_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


@dataclass(frozen=True)
class Launch:
    """What a launcher such as torchrun told a process; one that nobody launched is alone.

    Attributes:
        rank: Which of the processes of a run this one is, from 0.
        count: How many there are.
        local_rank: Which of those on this machine.
        local_count: How many are on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


# What launchers tell a process of its place, in the order of `Launch`, and where the others are.
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


def launch() -> Launch:
    """Return what a launcher told this process."""
    found = [os.environ.get(name, "") for name in PLACE]
    return Launch(*map(int, found)) if all(one.isdecimal() for one in found) else Launch()


def is_launchers(variable: str) -> bool:
    """Tell whether an environment variable is for one process of a launch alone, and for no child of it."""
    told = ("TORCHELASTIC_", "GROUP_", "ROLE_", "ACCELERATE_", "FSDP_")
    return variable in PLACE + MEETING or variable.startswith(told)


def check_process() -> None:
    """Refuse a process in which neither structprune nor what it is made of can work.

    Raises:
        EnvironmentFailure: Python was told to drop asserts and docstrings, or may map too little memory.
    """
    if sys.flags.optimize:
        # transformers reads the docstrings of its classes, and what code guarantees is checked by asserts.
        raise EnvironmentFailure(
            f"Python runs with PYTHONOPTIMIZE={sys.flags.optimize} (-{'O' * sys.flags.optimize}), "
            "which removes asserts and docstrings",
            hint="unset PYTHONOPTIMIZE, and leave away -O",
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < IMPORTS_BYTES:
        raise EnvironmentFailure(
            f"this process may map {limit >> 20} MiB of memory, torch and transformers alone need "
            f"{IMPORTS_BYTES >> 20}",
            hint="raise the limit: `ulimit -v unlimited`",
        )


def peak_rss() -> int:
    """Return the largest high-water mark of memory, of this process and its finished children, in bytes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _maxrss_unit()
    return max(own_peak_rss(), children)


def own_peak_rss() -> int:
    """Return the high-water mark of this process's memory, in bytes."""
    # VmHWM belongs to this program alone; ru_maxrss on Linux also remembers the process that started it.
    found = _proc_line("/proc/self/status", "VmHWM:")
    if found:
        return int(found.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _maxrss_unit()


def reset_peak_rss() -> bool:
    """Make the high-water mark what is held now; tell whether the system lets us, which only Linux does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # from proc(5): reset the peak resident set size
    except OSError:
        return False
    return True


def available_memory() -> int:
    """Return the bytes of memory that are free to take; all there are where the system does not tell."""
    found = _proc_line("/proc/meminfo", "MemAvailable:")
    return int(found.split()[0]) * 1024 if found else _memory()


def give_back_memory() -> None:
    """Give freed memory back to the system, and from now on large blocks at once; only with glibc.

    By itself glibc learns to keep freed blocks of up to 32 MiB. Tensors of many sizes that come and go then
    leave holes, and the peak of a run that holds one block at a time grows with the number of blocks.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.malloc_trim(0)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of all packages that matter; None where one is missing."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


@cache  # what is imported stays what it is; to read it again is an eighth of a small run
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return what the machine is: system, processor, cores it may use, threads, memory, accelerators."""
    import torch  # here, because it takes seconds and every other function does without

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def environment() -> dict[str, Any]:
    """Return what a bug report needs: the machine and the versions."""
    return {"machine": machine(), "versions": versions()}


def _maxrss_unit() -> int:
    # macOS counts bytes, every other system kilobytes.
    return 1 if sys.platform == "darwin" else 1024


def _processor() -> str:
    named = _proc_line("/proc/cpuinfo", "model name")
    return named.lstrip(": \t") or platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _proc_line(path: str, start: str) -> str:
    """Return the rest of the first line of a /proc file that starts so; "" where there is none."""
    file = Path(path)
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return next((line[len(start) :].strip() for line in lines if line.startswith(start)), "")
