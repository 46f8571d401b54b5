"""The parent of `tests.fresh`: what fresh processes import, imported once; a child per line of JSON on stdin.

Run by its path: `python -P fresh_parent.py NAME...`, what its children will run or import: paths of scripts
and names of modules. It does nothing with what it imports, and imports nothing else of ours.
"""

import gc
import importlib
import json
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any


def _serve(names: list[str]) -> None:
    for name in names:
        if name.endswith(".py"):
            runpy.run_path(name)
        else:
            importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would copy one of several threads"
    gc.freeze()  # a collection in a child would copy every page
    sys.stdout.write("\n")
    sys.stdout.flush()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_a_process(job)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    os._exit(0)  # to take all that was imported apart takes a second


def _be_a_process(job: dict[str, Any]) -> None:
    """Become a Python that runs a program, in a process of its own; never returns."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["place"])
        os.environ.clear()
        os.environ.update(job["environment"])
        sys.argv = [job["program"], *job["words"]]
        if job["program"].endswith(".py"):
            runpy.run_path(job["program"], run_name="__main__")
        else:
            warnings.simplefilter("ignore", RuntimeWarning)  # imported before, which is what this is for
            runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what Python does with it: the traceback, and exit code 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])
