import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from structprune.checkpoint.aside import Aside
from structprune.checkpoint.lock import Lock
from structprune.checkpoint.lock_file import check_lock
from structprune.errors import EnvironmentFailure
from tests.killing import is_killed_at
from tests.lock_races import DISKS, POETRY, limit_disk, lock_of, refuse_locks

HOLD = """
import os, sys
from pathlib import Path
from structprune.checkpoint.lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read() if sys.argv[2] == "wait" else os._exit(0)
"""
ROOT = Path(__file__).parents[1]


def start_holder(out: Path, then: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), then], stdin=pipe, stdout=pipe, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def race(name: str, *words: object) -> None:
    """Run a race of `tests.lock_races` in a small process, of which hundreds of forks are quick."""
    line = [sys.executable, "-m", "tests.lock_races", name, *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def refuse(out: Path) -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught, Lock(out):
        pass
    return caught.value


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    # Nothing here survives a power cut: waiting for the disk thousands of times would prove nothing.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=DISKS)
def disk(request, monkeypatch) -> str:
    """What the disk can do."""
    limit_disk(request.param, monkeypatch.setattr)
    return str(request.param)


def test_a_second_run_is_told_who_holds_the_output_and_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with start_holder(out, "wait") as holder:
        assert f"locked by pid {holder.pid} on " in refuse(out).message
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / "new" / "out.lock").exists()
        with Lock(out):
            content = json.loads((tmp_path / "new" / "out.lock").read_text())
            assert content["pid"] == os.getpid()
        assert list((tmp_path / "new").iterdir()) == []


def test_one_process_takes_a_lock_only_once(tmp_path: Path, disk: str) -> None:
    with Lock(tmp_path / "out"):
        assert f"locked by pid {os.getpid()}" in refuse(tmp_path / "out").message
        with Lock(tmp_path / "other"):
            pass
    with Lock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "held"),
    [
        ({}, True),  # a disk without file locks: the process still runs
        ({"pid": 2**22 + 1}, False),  # no such process
        ({"started": "1"}, False),  # the number was given to another process
        ({"boot": "before"}, False),  # this machine was started again
        ({"boot": "other", "host": "elsewhere"}, True),  # nobody here can tell
        ({"host": "a-container"}, False),  # same machine, and its lock is free
        ({"released": True}, False),  # its run is over, and left something to settle
    ],
)
def test_a_lock_file_without_a_system_lock_is_judged_by_its_content(tmp_path: Path, changed, held) -> None:
    (tmp_path / "out.lock").write_text(lock_of(**changed))
    if held:
        assert "locked by pid" in refuse(tmp_path / "out").message
        assert (tmp_path / "out.lock").read_text() == lock_of(**changed)
    else:
        with Lock(tmp_path / "out"):
            pass
        assert list(tmp_path.iterdir()) == []


def test_of_another_container_only_the_systems_lock_tells(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out.lock").write_text(lock_of(host="a-container"))
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    assert "locked by pid" in refuse(tmp_path / "out").message


def make_link(path: Path) -> None:
    (path.parent / "notes.txt").write_text(POETRY)
    path.symlink_to("notes.txt")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: path.write_text(POETRY), f"is a file of {len(POETRY)} bytes"),
        (lambda path: path.write_text('{"pid": 1'), "is a file of 9 bytes"),
        (lambda path: path.write_text(""), "is a file of 0 bytes"),
        (lambda path: path.write_text("x" * 100_000), "is a large file"),
        (make_link, "is a link"),
        (make_dangling_link, "is a link"),
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is no regular file"),
    ],
)
def test_a_file_that_is_no_lock_of_ours_is_refused_by_name_and_left_alone(
    tmp_path: Path, make: Callable[[Path], object], named: str, disk: str
) -> None:
    make(tmp_path / "poetry.lock")
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    error = refuse(tmp_path / "poetry")
    assert error.exit_code == 4
    assert f"poetry.lock: {named} and no lock of structprune" in error.message
    assert error.hint == "move it away, or choose another output"
    with pytest.raises(EnvironmentFailure, match="no lock of structprune"):
        check_lock(tmp_path / "poetry")
    after = {path.name: path.lstat() for path in tmp_path.iterdir()}
    assert {name: status[:-3] for name, status in after.items()} == {
        name: status[:-3] for name, status in before.items()
    }


def test_half_a_lock_of_ours_is_stale_where_the_system_says_that_nobody_writes_it(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "out.lock").write_text(lock_of()[:60])
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse_locks)
        assert "locked by pid ?" in refuse(tmp_path / "out").message
    with Lock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("stale", ["", "stale"])
def test_of_many_runs_that_start_at_once_exactly_one_has_the_output(
    tmp_path: Path, disk: str, stale: str
) -> None:
    race("start_at_once", tmp_path, disk, stale)


@pytest.mark.parametrize("disk", DISKS)
def test_wherever_a_holder_is_killed_the_lock_is_whole_or_absent_and_the_next_run_gets_it(
    tmp_path: Path, disk: str
) -> None:
    race("kill_everywhere", tmp_path, disk)


def test_what_is_set_aside_is_known_after_a_kill_and_after_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    entry = Aside("out.old-0001", 11, 22, "boot", successor=33)

    def die() -> None:
        with Lock(out) as lock:
            lock.note(entry)
            os.kill(os.getpid(), signal.SIGKILL)

    assert is_killed_at(0, die)
    for _ in range(2):
        with Lock(out) as lock:
            assert lock.journal == (entry,)
        assert json.loads((tmp_path / "out.lock").read_text())["released"]
    with Lock(out) as lock:
        lock.note()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "../models", "device": 1, "inode": 2, "boot": "b"},
        {"name": "models", "device": 1, "inode": 2, "boot": "b"},
        {"name": "out.old-0001", "device": "1", "inode": 2, "boot": "b"},
        {"name": "out.old-0001"},
        "out.old-0001",
    ],
)
def test_a_journal_that_no_run_wrote_names_nothing(tmp_path: Path, entry: object) -> None:
    (tmp_path / "out.lock").write_text(lock_of(released=True, journal=[entry]))
    with Lock(tmp_path / "out") as lock:
        assert lock.journal == ()
