import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from structprune.checkpoint import lock
from structprune.checkpoint.lock import Lock
from structprune.errors import EnvironmentFailure

HOLD = """
import os, sys
from pathlib import Path
from structprune.checkpoint.lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read() if sys.argv[2] == "wait" else os._exit(0)
"""


def start_holder(out: Path, then: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), then], stdin=pipe, stdout=pipe, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_run_is_told_who_holds_the_output_and_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with start_holder(out, "wait") as holder:
        with pytest.raises(EnvironmentFailure, match=rf"locked by pid {holder.pid} on .+ since 2"), Lock(out):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / "new" / "out.lock").exists()
        with Lock(out):
            content = json.loads((tmp_path / "new" / "out.lock").read_text())
            assert content["pid"] == os.getpid()
        assert list((tmp_path / "new").iterdir()) == []


def test_one_process_takes_a_lock_only_once(tmp_path: Path) -> None:
    with Lock(tmp_path / "out"):
        with pytest.raises(EnvironmentFailure, match=f"locked by pid {os.getpid()}"), Lock(tmp_path / "out"):
            pass
        with Lock(tmp_path / "other"):
            pass
    with Lock(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("changed", "held"),
    [
        ({}, True),  # a disk without file locks: the process still runs
        ({"pid": 2**22 + 1}, False),  # no such process
        ({"started": "1"}, False),  # the number was given to another process
        ({"boot": "before"}, False),  # this machine was started again
        ({"boot": "other", "host": "elsewhere"}, True),  # nobody here can tell
        ({"host": "a-container"}, False),  # same machine, and its lock is free
    ],
)
def test_a_lock_file_without_a_system_lock_is_judged_by_its_content(tmp_path: Path, changed, held) -> None:
    holder = lock._this_process() | changed
    (tmp_path / "out.lock").write_text(json.dumps(holder))
    if held:
        with pytest.raises(EnvironmentFailure, match="locked by pid"), Lock(tmp_path / "out"):
            pass
        assert (tmp_path / "out.lock").exists()
    else:
        with Lock(tmp_path / "out"):
            pass


def test_half_a_lock_file_is_stale(tmp_path: Path) -> None:
    (tmp_path / "out.lock").write_text('{"pid": 1')
    with Lock(tmp_path / "out"):
        pass
