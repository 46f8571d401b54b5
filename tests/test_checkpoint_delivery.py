"""Unfinished runs: which are gone on from, which are in the way, and what in them is whose."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from structprune.checkpoint.beside import partial_of
from structprune.checkpoint.delivery import Delivery, deliver, work_folder
from structprune.checkpoint.manifest import check_manifest
from structprune.checkpoint.partial import partials_of
from structprune.checkpoint.writing import Writing
from structprune.errors import (
    EnvironmentFailure,
    InputError,
    Interrupted,
    MethodError,
    QualityError,
    StructpruneError,
    UsageError,
    VerificationError,
)
from tests.killing import is_killed_at

RUN, OTHER = {"prune": "wanda", "seed": 0}, {"prune": "wanda", "seed": 1}
RESTART, OVERWRITE = Writing(restart=True), Writing(overwrite=True)
ENDS = (MethodError, UsageError, InputError, QualityError, VerificationError)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing here survives a power cut: waiting for the disk thousands of times would prove nothing.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def decide(work: Delivery, blocks: int = 2) -> None:
    for number in range(blocks):
        work.write_text(f"structprune/plans/01-wanda/block-{number:04d}.safetensors", "decided")


def write_result(work: Delivery) -> None:
    for name in ("model.safetensors", "config.json", "merges.txt", "structprune/plots/sparsity.png"):
        work.write_text(name, "written")


def run(
    final: Path,
    fingerprint: dict[str, object] = RUN,
    writing: Writing = Writing(),
    error: BaseException | None = None,
) -> None:
    """Run as far as the end, or until an error after all was written."""
    with deliver(final, fingerprint, writing, files=["merges.txt"]) as work:
        decide(work)
        write_result(work)
        if error:
            raise error
        work.publish(stages=["01-wanda"], facts={})


def leave(final: Path, error: BaseException, fingerprint: dict[str, object] = RUN) -> Path:
    with pytest.raises(type(error)):
        run(final, fingerprint, error=error)
    return work_folder(final, fingerprint)


def refuse(
    final: Path, fingerprint: dict[str, object] = RUN, writing: Writing = Writing()
) -> StructpruneError:
    with pytest.raises(EnvironmentFailure) as caught:
        run(final, fingerprint, writing)
    return caught.value


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ENDS)
def test_a_run_that_ended_keeps_its_plans_drops_its_weights_and_is_in_nobodys_way(
    tmp_path: Path, kind: type[StructpruneError]
) -> None:
    final = tmp_path / "out"
    left = leave(final, kind("the gate was missed", hint="prune less"))
    assert names(left) == [
        "structprune/fingerprint.json",
        "structprune/partial.json",
        "structprune/plans/01-wanda/block-0000.safetensors",
        "structprune/plans/01-wanda/block-0001.safetensors",
    ]
    assert json.loads((left / "structprune" / "partial.json").read_text())["ended"] == "the gate was missed"
    # The same run finds its plans; another one does not mind them, and once it succeeds they are gone.
    with pytest.raises(Interrupted), deliver(final, RUN) as work:
        assert len(list(work.plans.glob("*/block-*"))) == 2
        raise Interrupted(15)
    leave(final, kind("the gate was missed", hint="prune less"))
    run(final, OTHER)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert check_manifest(final) == []
    assert "structprune/partial.json" not in names(final)


def test_a_run_that_was_refused_before_it_decided_anything_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError), deliver(tmp_path / "out", RUN):
        raise UsageError("no such task", hint="name one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [Interrupted(15), EnvironmentFailure("disk full", hint="free some")])
def test_an_interrupted_run_is_in_the_way_and_says_what_it_left_and_both_ways_on(
    tmp_path: Path, error: StructpruneError
) -> None:
    final = tmp_path / "out"
    left = leave(final, error)
    refusal = refuse(final, OTHER)
    assert refusal.exit_code == 4
    size = sum((left / name).stat().st_size for name in names(left))
    assert refusal.message == (
        f"{left}: an interrupted run differs in seed; "
        f"it left 01-wanda (2 blocks decided), weights; {size} bytes"
    )
    assert refusal.hint == "finish it with its own command, or pass --restart to forget it"
    (left / "structprune" / "recipe.yaml").touch()
    (left / "structprune" / "run.json").write_text('{"command": "prune", "places": {}}')
    assert f"finish it with `structprune prune {left}/structprune/recipe.yaml`" in refuse(final, OTHER).hint
    run(final, RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_restart_forgets_what_was_interrupted_and_what_ended(tmp_path: Path) -> None:
    final = tmp_path / "out"
    leave(final, QualityError("missed", hint="prune less"), {"seed": 2})
    leave(final, Interrupted(15))
    run(final, OTHER, RESTART)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_in_which_nothing_was_decided_is_dropped(tmp_path: Path) -> None:
    final = tmp_path / "out"
    partial_of(final, "a" * 64).mkdir()
    (partial_of(final, "b" * 64) / "structprune").mkdir(parents=True)
    (partial_of(final, "b" * 64) / "structprune" / "fingerprint.json.tmp").write_text("{")
    with pytest.raises(Interrupted), deliver(final, {"seed": 2}, files=["merges.txt"]) as work:
        write_result(work)
        raise Interrupted(15)
    with deliver(final, RUN) as work:
        assert [one.folder for one in partials_of(final)] == [work.folder]


def test_a_damaged_decision_of_a_former_run_says_how_to_be_rid_of_it(tmp_path: Path) -> None:
    final = tmp_path / "out"
    left = leave(final, Interrupted(15))
    block = left / "structprune" / "plans" / "01-wanda" / "block-0000.safetensors"
    with pytest.raises(InputError) as caught, deliver(final, RUN):
        raise InputError(f"{block}: header damaged", hint="fetch it again")
    assert caught.value.message == f"{block}: header damaged"
    assert caught.value.hint == "what a former run left is damaged: pass --restart to forget it"
    with pytest.raises(InputError, match="fetch it again"), deliver(final, RUN):
        raise InputError("model.safetensors: header damaged", hint="fetch it again")


@pytest.mark.parametrize(
    "name",
    [
        "thesis.txt",
        "structprune/notes.txt",
        "structprune/plans/01-wanda/mine.safetensors",
        "structprune/plans/notes.txt",
        "structprune/plots/deep/er.png",
        "mine/model.safetensors",
        "evil.safetensors",
        "thesis.tmp",
        ".hidden",
    ],
)
def test_a_file_that_no_run_writes_is_refused_by_name_neither_removed_nor_published(
    tmp_path: Path, name: str
) -> None:
    final = tmp_path / "out"

    def put(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")

    left = leave(final, Interrupted(15))
    put(left)
    # Neither the same run, nor one that forgets, nor one that ends, touches it.
    for fingerprint, writing in ((RUN, Writing()), (RUN, RESTART), (OTHER, RESTART)):
        refusal = refuse(final, fingerprint, writing)
        assert refusal.message.startswith(f"{left / name}: not written by the run")
        assert refusal.hint.startswith("move it away")
    assert (left / name).read_text() == "years of work"
    (left / name).unlink()
    for folder in (left / name).parents:
        if folder in (left, left / "structprune") or any(folder.iterdir()):
            break
        folder.rmdir()
    with pytest.raises(QualityError), deliver(final, RUN) as work:
        write_result(work)
        put(work.folder)
        with pytest.raises(EnvironmentFailure, match=re.escape(name)):
            work.publish(stages=[], facts={})
        raise QualityError("missed", hint="prune less")
    assert (left / name).read_text() == "years of work"
    assert not final.exists()


def test_what_was_half_written_when_a_run_was_killed_is_removed(tmp_path: Path) -> None:
    final = tmp_path / "out"
    left = leave(final, Interrupted(15))
    plan = left / "structprune" / "plans" / "01-wanda"
    (left / "model.safetensors.tmp").touch()
    (left / "merges.txt.tmp").touch()
    (plan / "block-0002.safetensors.tmp").touch()
    (plan / "structprune-backward-x1" / "block-0000").mkdir(parents=True)
    (plan / "structprune-backward-x1" / "block-0000" / "0").touch()
    run(final)
    assert not [name for name in names(final) if ".tmp" in name or "backward" in name]


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_something_else_under_the_name_of_the_unfinished_folder_is_refused(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "out"
    place = work_folder(final, RUN)
    if kind == "a file":
        place.write_text("years of work")
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to("elsewhere")
    assert f"{place.name}: is no folder" in refuse(final).message
    assert not list(tmp_path.glob("elsewhere/*"))


def test_an_output_that_a_killed_run_had_set_aside_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    final = tmp_path / "out"
    run(final)
    assert "out: exists" in refuse(final, OTHER).message
    run(final, OTHER, OVERWRITE)
    assert json.loads((final / "structprune" / "fingerprint.json").read_text()) == OTHER


@pytest.mark.parametrize(
    "error", [pytest.param(None, marks=pytest.mark.slow), QualityError("missed", hint="prune less")]
)
def test_wherever_a_run_is_killed_the_same_one_finishes_with_the_same_files(
    tmp_path: Path, error: StructpruneError | None
) -> None:
    final = tmp_path / "out"
    run(tmp_path / "whole")

    def attempt() -> None:
        try:
            run(final, error=error)
        except QualityError:
            return

    for number in range(1, 500):
        if not is_killed_at(number, attempt):
            break
        if not final.exists():
            run(final)
        assert names(final) == names(tmp_path / "whole")
        assert check_manifest(final) == []
        with deliver(final, OTHER, OVERWRITE):
            pass  # which settles
        for path in tmp_path.glob("out*"):
            shutil.rmtree(path)
    assert number > 60
