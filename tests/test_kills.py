"""kill -9, wherever: the same command again gives the bytes of an undisturbed run, and nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forks import ROOT, VARIABLES, Ended, Parent, Stop
from tests.specimens import stamps
from tests.stories import LOOK_ALIKES, STORIES, Place, undisturbed

# 240 of 10 stories, by forks; and by the command line itself, proof in a fresh process and all.
CALLS, SECONDS, ON_THE_COMMAND_LINE = 14, 6, 20


def stops(name: str, ended: Ended, *, lines: bool, calls: int, seconds: int) -> list[Stop]:
    """Return where to kill: at every log line, and by chance at calls that change the disk and at times."""
    chance = random.Random(name)
    found = [Stop("line", number) for number in range(1, ended.lines + 1)] if lines else []
    found += [Stop("call", number) for number in chance.sample(range(1, len(ended.calls) + 1), calls)]
    # The last calls are those of publishing: never left to chance alone.
    found += [Stop("call", len(ended.calls) - back) for back in range(4)] if lines else []
    return found + [Stop("seconds", round(chance.uniform(0.02, ended.seconds), 3)) for _ in range(seconds)]


def wrong_after_kill(
    parent: Parent, place: Place, stop: Stop, right: dict[str, str], before: dict[str, object]
) -> list[str]:
    """Kill a command at one point, look, run it again, look again; return what is wrong."""
    killed = parent.run(place.words, place.folder, stop)
    if killed.code not in (0, -signal.SIGKILL):
        return [f"exit {killed.code} before the kill: {killed.err[-300:]}"]
    wrong = place.wrong_with_output(right) + place.wrong_with_neighbours()
    wrong += place.wrong_after(parent.run(place.words, place.folder), right)
    if stamps(place.specimens) != before:
        wrong.append("an input was touched")
    return [f"{stop}: {problem}" for problem in wrong]


def kill_everywhere(
    name: str, parent: Parent, specimens: Path, folder: Path, **where: int | bool
) -> tuple[list[str], int]:
    story = STORIES[name]
    ended, right = undisturbed(parent, folder / "undisturbed", story, specimens)
    before = stamps(specimens)
    wrong = []
    points = stops(name, ended, **where)  # type: ignore[arg-type]  # lines is the only bool
    for number, stop in enumerate(points):
        place = Place.furnish(folder / str(number), story, specimens)
        wrong += wrong_after_kill(parent, place, stop, right, before)
        shutil.rmtree(place.folder)
    return wrong, len(points)


@pytest.mark.parametrize(
    "name",
    [
        "prune",
        "prune in place of a former result",
        pytest.param("recover", marks=pytest.mark.slow),
        pytest.param("prune and recover", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_loses_nothing(name: str, parent: Parent, specimens: Path, tmp_path: Path) -> None:
    wrong, _ = kill_everywhere(name, parent, specimens, tmp_path, lines=False, calls=2, seconds=0)
    assert wrong == []


@pytest.mark.parametrize("neighbour", LOOK_ALIKES[:4])
def test_what_only_looks_like_ours_is_left_alone(
    neighbour: str, parent: Parent, specimens: Path, tmp_path: Path
) -> None:
    place = Place.furnish(tmp_path / "place", STORIES["apply"], specimens, [neighbour])
    for more in ([], ["--overwrite"]):
        ended = parent.run([*place.words, *more], place.folder)
        assert ended.code == 0, ended.err
        assert place.wrong_with_neighbours() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_a_run_killed_anywhere_loses_nothing(
    name: str, parent: Parent, specimens: Path, tmp_path: Path
) -> None:
    wrong, count = kill_everywhere(
        name, parent, specimens, tmp_path, lines=True, calls=CALLS, seconds=SECONDS
    )
    assert wrong == []
    assert count >= CALLS + SECONDS + 4


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_a_command_line_killed_at_any_time_loses_nothing(name: str, specimens: Path, tmp_path: Path) -> None:
    chance = random.Random(f"{name} on the command line")
    story = STORIES[name]
    # By the command line too: its report tells of the fresh process, which a fork leaves out.
    alone = Place.furnish(tmp_path / "undisturbed", story, specimens)
    assert run_killed(alone, None).code == 0
    right = alone.contents()
    before = stamps(specimens)
    whole = 0.0
    for number in range(ON_THE_COMMAND_LINE // len(STORIES)):
        place = Place.furnish(tmp_path / str(number), story, specimens)
        # Most of a command's first seconds are imports, in which there is nothing to lose.
        after = chance.uniform(0.4, 1.0) * (whole or 10)
        run_killed(place, after)
        assert place.wrong_with_output(right) + place.wrong_with_neighbours() == [], after
        began = time.monotonic()
        done = run_killed(place, None)
        whole = time.monotonic() - began
        assert place.wrong_after(done, right) == [], after
    assert stamps(specimens) == before


def run_killed(place: Place, after: float | None) -> Ended:
    """Run the command line of a place in a process of its own; kill it after some seconds."""
    words = [sys.executable, "-m", "structprune", *map(str, place.words)]
    pipe = subprocess.PIPE
    variables = os.environ | VARIABLES | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words, stdout=pipe, stderr=pipe, text=True, cwd=place.folder, env=variables, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        # With the fresh process that it may have started.
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return Ended(process.returncode, out, err, 0.0, 0)
