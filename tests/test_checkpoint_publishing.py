import errno
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest

from structprune.checkpoint import publishing
from structprune.checkpoint.lock import Lock
from structprune.checkpoint.partial import partials_of
from structprune.checkpoint.publishing import discard, publish, settle
from structprune.errors import EnvironmentFailure
from tests.checkpoints import fingerprint, tensors, write
from tests.killing import is_killed_at
from tests.results import begin, build, content_of, start

# What a user may keep beside an output; the names are those that runs once gave what they set aside.
MINE = ("out.old-backup", "out.old-2024", "out.old-0001", "out.old-x.removed", "out.partial-mine")


def keep_mine(folder: Path) -> dict[str, str]:
    for name in MINE:
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("years of work")
    return mine(folder)


def mine(folder: Path) -> dict[str, str]:
    return {name: (folder / name / "thesis.txt").read_text() for name in MINE}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing here survives a power cut: waiting for the disk thousands of times would prove nothing.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list[str]]:
    """Let the call with this number, counted over all that changes the disk, raise; yield what was called."""
    calls: list[str] = []

    def call(name: str, real: Callable[..., object], *args: object, **kwargs: object) -> object:
        calls.append(name)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        for name in ("write", "link", "replace", "rmdir", "fsync"):
            patch.setattr(os, name, partial(call, name, getattr(os, name)))
        yield calls


def test_whatever_fails_the_old_result_or_the_whole_new_one_is_there(tmp_path: Path, monkeypatch) -> None:
    old, new = write(tmp_path / "old"), write(tmp_path / "new", tensors(seed=1), shards=2)
    before = fingerprint(old) | fingerprint(new)
    final = tmp_path / "out"
    build(old, tmp_path / "former")
    kept = keep_mine(tmp_path)
    outcomes = []
    for number in range(1, 1000):
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(tmp_path / "former", final)
        told = ""
        with failing(monkeypatch, number) as calls:
            try:
                build(new, final)
            except EnvironmentFailure as failure:
                told = str(failure)
        if len(calls) < number:
            break
        # Once the result is published, nothing makes the run fail but that it may not last.
        assert told or content_of(final) == "new"
        assert not told or content_of(final) == "old" or calls[number - 1] == "fsync"
        assert not told or (str(tmp_path) in told and "No space left" in told)
        start(final)
        outcomes.append(content_of(final))
    assert outcomes.count("old") > 20
    assert outcomes == ["old"] * outcomes.count("old") + ["new"] * outcomes.count("new")
    assert fingerprint(old) | fingerprint(new) == before
    build(new, final)
    assert content_of(final) == "new"
    assert mine(tmp_path) == kept
    assert {path.name for path in tmp_path.iterdir()} == {"former", "new", "old", "out", *MINE}


def test_wherever_a_run_is_killed_the_old_result_or_the_whole_new_one_is_there(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old"), write(tmp_path / "new", tensors(seed=1), shards=2)
    final = tmp_path / "out"
    build(old, tmp_path / "former")
    kept = keep_mine(tmp_path)
    outcomes = []
    for number in range(1, 1000):
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(tmp_path / "former", final)
        if not is_killed_at(number, partial(build, new, final)):
            break
        start(final)
        outcomes.append(content_of(final))
        assert mine(tmp_path) == kept
        # Every run begins in the same place, so that each is killed one step later.
        for left in partials_of(final):
            shutil.rmtree(left.folder)
        assert {path.name for path in tmp_path.iterdir()} == {"former", "new", "old", "out", *MINE}
    assert outcomes.count("old") > 50
    assert outcomes.count("new") > 10
    assert outcomes == ["old"] * outcomes.count("old") + ["new"] * outcomes.count("new")


@pytest.mark.slow
def test_a_first_result_that_is_killed_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    final = tmp_path / "out"
    for number in range(1, 1000):
        if not is_killed_at(number, partial(build, source, final)):
            break
        start(final)
        assert content_of(final) in ("", "source")
        shutil.rmtree(final, ignore_errors=True)
    assert number > 30


@pytest.mark.slow
def test_wherever_a_run_that_settles_is_killed_the_next_one_settles_the_rest(tmp_path: Path) -> None:
    final = tmp_path / "out"
    build(write(tmp_path / "old"), tmp_path / "former")
    kept = keep_mine(tmp_path)
    work = begin(final)
    shutil.copytree(tmp_path / "former", work, dirs_exist_ok=True)
    work.rename(tmp_path / "ready")

    def replace() -> None:
        with Lock(final) as lock:
            settle(final, lock)
            publish(work, final, lock, overwrite=True)

    def is_killed_replacing(number: int) -> bool:
        for folder in (final, work):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "former", final)
        (final / "old.txt").touch()
        shutil.copytree(tmp_path / "ready", work)
        return is_killed_at(number, replace)

    found = []
    for first in range(1, 200):
        # Every sixth step, and others after every first one.
        for second in range(1 + first % 6, 200, 6):
            replaced = not is_killed_replacing(first)
            found.append("aside" if not final.exists() else "old" if (final / "old.txt").exists() else "new")
            settled = not is_killed_at(second, partial(start, final))
            start(final)
            assert (final / "old.txt").exists() == (found[-1] != "new")
            assert (final / "model.safetensors").exists()
            assert mine(tmp_path) == kept
            left = {path.name for path in tmp_path.iterdir()} - {work.name}
            assert left == {"former", "old", "out", "ready", *MINE}
            if settled or replaced:
                break
        if replaced:
            break
    assert [which for which, _ in groupby(found)] == ["old", "aside", "new"]


def stop_between_renames(source: Path, final: Path) -> None:
    """Let a run be killed while its output does not exist."""

    def die(former: Path, final: Path) -> None:
        if "partial" in former.name:
            os.kill(os.getpid(), signal.SIGKILL)
        former.rename(final)

    def run() -> None:
        publishing.rename = die
        build(source, final)

    assert is_killed_at(0, run)
    assert not final.exists()


def test_only_the_very_folder_that_a_run_set_aside_is_put_back_or_removed(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old"), write(tmp_path / "new", tensors(seed=1))
    final = tmp_path / "out"
    for after in ("nothing", "another"):
        build(old, final)
        stop_between_renames(new, final)
        aside = tmp_path / "out.old-0001"
        assert content_of(aside) == "old"
        # The user moves it away, and something else takes its name.
        aside.rename(tmp_path / "saved")
        if after == "another":
            shutil.copytree(tmp_path / "saved", aside)
        start(final)
        assert not final.exists()
        assert content_of(tmp_path / "saved") == "old"
        assert aside.exists() == (after == "another")
        for path in (tmp_path / "saved", aside):
            shutil.rmtree(path, ignore_errors=True)


def test_an_output_that_was_made_anew_since_is_kept_beside_what_was_set_aside(tmp_path: Path, caplog) -> None:
    old, new = write(tmp_path / "old"), write(tmp_path / "new", tensors(seed=1))
    final = tmp_path / "out"
    build(old, final)
    stop_between_renames(new, final)
    final.mkdir()
    (final / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        start(final)
    assert (
        f"{final}: was made anew since a run set the old one aside as {tmp_path}/out.old-0001" in caplog.text
    )
    assert content_of(tmp_path / "out.old-0001") == "old"
    assert (final / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out.lock").exists()


def test_a_former_result_that_cannot_be_removed_is_a_warning_and_goes_with_the_next_run(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    old, new = write(tmp_path / "old"), write(tmp_path / "new", tensors(seed=1))
    final = tmp_path / "out"
    build(old, final)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(shutil, "rmtree", refuse)
        build(new, final)
        assert f"{tmp_path}/out.old-0001: cannot be removed yet" in caplog.text
        start(final)
    assert content_of(final) == "new"
    assert content_of(tmp_path / "out.old-0001") == "old"
    build(old, final)
    assert content_of(final) == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "out"]


def test_only_folders_with_a_fingerprint_of_ours_are_unfinished_runs(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for print_ in ("a" * 64, "b" * 64):
        begin(final, print_)
    for other in ("out2.partial-c", "out.partial-mine", f"out.partial-{16 * 'd'}"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "thesis.txt").write_text("years of work")
    (tmp_path / f"out.partial-{16 * 'e'}").symlink_to(tmp_path / f"out.partial-{16 * 'a'}")
    assert [one.folder.name for one in partials_of(final)] == [
        f"out.partial-{16 * 'a'}",
        f"out.partial-{16 * 'b'}",
    ]
    with Lock(final) as lock:
        discard(partials_of(final)[0].folder, lock)
    assert [one.folder.name for one in partials_of(final)] == [f"out.partial-{16 * 'b'}"]


def test_half_a_folder_that_was_being_removed_is_never_gone_on_from(tmp_path: Path) -> None:
    final = tmp_path / "out"

    def forget() -> None:
        with Lock(final) as lock:
            settle(final, lock)
            discard(begin(final), lock)

    for number in range(1, 100):
        if not is_killed_at(number, forget):
            break
        start(final)
        # Whole, or gone: it is noted before it is touched.
        assert [one.is_ours for one in partials_of(final)] in ([], [True], [False])
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    assert number > 15


def test_an_incomplete_folder_is_never_published(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    with Lock(tmp_path / "out") as lock, pytest.raises(ValueError, match="not complete"):
        publish(tmp_path / "partial", tmp_path / "out", lock, overwrite=True)


def test_a_folder_that_came_into_being_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    build(write(tmp_path / "source"), tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "partial")
    with Lock(tmp_path / "out") as lock, pytest.raises(EnvironmentFailure, match="came into being"):
        publish(tmp_path / "partial", tmp_path / "out", lock, overwrite=False)
    assert content_of(tmp_path / "out") == "source"
