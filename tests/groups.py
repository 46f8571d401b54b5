"""Groups of processes that work together: forks of one that has their imports behind it.

    python -m tests.groups MODULE COUNT FOLDER

runs `main` of a module in so many processes at once, each told where they meet, its number and the folder.
"""

import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_group(module: str, folder: Path, count: int) -> None:
    """Let a group of processes work in a folder; all must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.groups", module, str(count), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def _fork_all(module: str, count: int, folder: Path) -> None:
    main = importlib.import_module(module).main
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would copy one of several threads"
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _be_one(main, rank, folder)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(int(any(codes)))


def _be_one(main: Callable[[str, int, Path], None], rank: int, folder: Path) -> None:
    """Become a process of the group; never returns."""
    code = 1
    try:
        main(str(folder / "meeting"), rank, folder)
        code = 0
    except BaseException:  # noqa: BLE001 - what Python does with it: the traceback, and exit code 1
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _fork_all(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
