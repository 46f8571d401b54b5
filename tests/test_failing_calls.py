"""Every call that changes the disk, refused by its number: nothing is lost, the same command then succeeds.

ENOSPC stays, as a full disk does; EIO comes once. Two runs at once stand here too: what one does to the disk
is what the other meets.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.forks import Ended, Parent, Stop
from tests.specimens import stamps
from tests.stories import STORIES, Place, undisturbed

ERRORS = ("ENOSPC", "EIO")


def wrong_after_failure(parent: Parent, place: Place, stop: Stop, right: dict[str, str]) -> list[str]:
    """Let one call of a command fail, look, run it undisturbed, look again; return what is wrong."""
    failed = parent.run(place.words, place.folder, stop)
    wrong = place.wrong_with_output(right) + place.wrong_with_neighbours()
    if failed.code == 0:
        # What it can do without (a name that is gone already, a plot) need not stop it. A former result that
        # cannot be removed once the new one is published is told, and removed by the next run.
        found = place.contents()
        more = found.keys() - right.keys()
        left = {key for key in more if key.startswith("out.old-") or key.endswith(".lock")}
        if left and "warning: " not in failed.err:
            wrong.append(f"exit 0, and nobody says that {sorted(left)[0]} is left")
        if {key: value for key, value in found.items() if key not in left} != right:
            wrong.append("exit 0, but other than undisturbed")
    elif failed.code != 4:
        wrong.append(f"exit {failed.code}, expected 4: {failed.err.strip()[-500:]}")
    elif os.strerror(getattr(errno, stop.by)) not in failed.error["message"] or not failed.error["hint"]:
        wrong.append(f"does not say what failed: {failed.error}")
    wrong += place.wrong_after(parent.run(place.words, place.folder), right)
    return wrong


def refuse_each(
    name: str, parent: Parent, specimens: Path, folder: Path, errors: Sequence[str], stride: int
) -> tuple[list[str], int]:
    story = STORIES[name]
    ended, right = undisturbed(parent, folder / "undisturbed", story, specimens)
    before = stamps(specimens)
    wrong, count = [], 0
    for error in errors:
        for number in range(1 + count % stride, len(ended.calls) + 1, stride):
            place = Place.furnish(folder / f"{error}-{number}", story, specimens)
            what = f"{error} at {number}, {ended.calls[number - 1]}"
            wrong += [
                f"{what}: {one}"
                for one in wrong_after_failure(parent, place, Stop("call", number, error), right)
            ]
            if stamps(specimens) != before:
                wrong.append(f"{what}: an input was touched")
            shutil.rmtree(place.folder)
            count += 1
    return wrong, count


@pytest.mark.parametrize("name", ["prune in place of a former result", "apply"])
def test_a_failing_call_loses_nothing(name: str, parent: Parent, specimens: Path, tmp_path: Path) -> None:
    wrong, count = refuse_each(name, parent, specimens, tmp_path, ERRORS, stride=61)
    assert wrong == []
    assert count >= 4


# Every one of them where the stories differ most, of the others every seventh.
EVERY = ("prune in place of a former result", "apply", "export", "recover, adapter kept")


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", STORIES)
def test_whichever_call_fails_nothing_is_lost(
    name: str, error: str, parent: Parent, specimens: Path, tmp_path: Path
) -> None:
    wrong, count = refuse_each(name, parent, specimens, tmp_path, [error], stride=1 if name in EVERY else 7)
    assert wrong == []
    assert count > 15


@pytest.mark.parametrize("name", ["prune", pytest.param("recover", marks=pytest.mark.slow)])
def test_of_two_runs_at_once_one_delivers_and_the_other_says_that_it_is_locked(
    name: str, parent: Parent, specimens: Path, tmp_path: Path
) -> None:
    _, right = undisturbed(parent, tmp_path / "undisturbed", STORIES[name], specimens)
    place = Place.furnish(tmp_path / "both", STORIES[name], specimens)
    with Parent() as other:
        other.run(["env"], place.folder)  # it is warm
        parent.start(place.words, place.folder)
        other.start(place.words, place.folder)
        ended = [parent.finish(), other.finish()]
    assert any(one.code == 0 for one in ended)
    for one in ended:
        assert one.code == 0 or _is_refused(one), one.err
    assert place.contents() == right
    assert place.wrong_with_neighbours() == []


def _is_refused(ended: Ended) -> bool:
    """Tell whether a run was told that another one has the output, or had it meanwhile."""
    said = ended.error.get("message", "")
    return ended.code == 4 and ("locked by pid" in said or "exists" in said or "came into being" in said)
