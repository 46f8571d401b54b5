"""What goes wrong in one of several processes: all end soon, the one that failed says so, the run resumes."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forks import TIMED_OUT, Around, Ended, Parent, Stop
from tests.specimens import TEXT
from tests.tiny import save_tiny

# A process that lost another ends at once; and one that failed waits for the word of the first so long.
MOST_SECONDS = 60
# At so many of the calls that change the disk a process is killed, or finds it full.
CALLS = 8


@dataclass(frozen=True)
class Failure:
    """What happens to one of three processes, and how all end.

    Attributes:
        rank: To which.
        patch: What, in `tests.stand_ins`.
        codes: The exit code of each.
        said: What the one that failed says, as a pattern; empty where nobody can.
    """

    rank: int
    patch: str
    codes: tuple[int, ...]
    said: str


FAILURES = {
    "killed": Failure(1, "killed_at_a_block", (4, -9, 4), "rank 0: another process of the run has ended"),
    "the first is killed": Failure(0, "killed_at_a_block", (-9, 4, 4), ""),
    "interrupted": Failure(1, "interrupted_at_a_block", (4, 130, 4), ""),
    "the first is interrupted": Failure(0, "interrupted_at_a_block", (130, 4, 4), ""),
    "terminated": Failure(2, "terminated_at_a_block", (4, 4, 143), ""),
    "out of memory": Failure(1, "no_memory_at_a_block", (4, 4, 4), "rank 1: out of memory"),
    "the disk is full": Failure(0, "full_disk_at_a_block", (4, 4, 4), "rank 0: .*No space left on device"),
    "the disk of another is full": Failure(2, "full_disk_at_a_block", (4, 4, 4), "rank 2: .*No space left"),
    "a bug": Failure(1, "bug_at_a_block", (4, 1, 4), "rank 1: KeyError: 'nobody'"),
}


# The others run where nobody waits.
QUICK = ("killed", "interrupted", "out of memory", "the disk is full")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model and a text beside it."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("launched") / "model", depth=3)
    folder.with_name("text.txt").write_text(TEXT)
    return folder


def line(model: Path, output: Path, *more: object) -> list[object]:
    data = ["--calibration", model.with_name("text.txt"), "--length", 16, "--samples", 6]
    words = ["prune", model, output, "--method", "wanda", "--no-evaluate", *data]
    return [*words, "--set", "calibration.batch_size=2", *more]


def errors(ended: list[Ended]) -> list[str]:
    return [row for one in ended for row in one.err.splitlines() if row.startswith("error: ")]


@pytest.fixture(scope="module")
def whole(model: Path, parent: Parent) -> bytes:
    """Return the weights that a run of one process writes."""
    output = model.with_name("whole")
    assert parent.run(line(model, output), model.parent).code == 0
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAILURES]
)
def test_all_end_one_says_why_and_the_same_command_resumes(
    name: str, model: Path, whole: bytes, tmp_path: Path, parent: Parent
) -> None:
    failure, words = FAILURES[name], line(model, tmp_path / "out", "--json")

    ended = parent.launch([words] * 3, tmp_path, {failure.rank: Around(patch=f"stand_ins:{failure.patch}")})

    assert tuple(one.code for one in ended) == failure.codes, [one.err for one in ended]
    assert max(one.seconds for one in ended) < MOST_SECONDS
    found = errors(ended)
    assert len(found) == bool(failure.said)
    assert all(re.match(f"error: {failure.said}", row) for row in found)
    again = parent.launch([words] * 3, tmp_path)
    assert [one.code for one in again] == [0, 0, 0], [one.err for one in again]
    assert json.loads(again[0].out)["blocks_resumed"] >= 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("by", ["kill", "ENOSPC"])
def test_at_whichever_call_one_fails_all_end_and_the_same_command_resumes(
    by: str, rank: int, model: Path, whole: bytes, tmp_path: Path, parent: Parent
) -> None:
    def launch(place: Path, stops: dict[int, Stop]) -> list[Ended]:
        (place / "scratch").mkdir(parents=True, exist_ok=True)  # where the second keeps its plan
        there = Around(variables={"TMPDIR": str(place / "scratch")}, patch="stand_ins:own_scratch")
        words = line(model, place / "out", "--json")
        return parent.launch([words] * 2, place, {0: there, 1: there}, stops, limit=MOST_SECONDS)

    count = len(launch(tmp_path / "undisturbed", {})[rank].calls)
    assert count > CALLS
    wrong = []
    for number in range(1, count + 1, max(1, count // CALLS)):
        place = tmp_path / str(number)
        ended = launch(place, {rank: Stop("call", number, by)})
        # Whoever fails while it cleans up behind itself has done its part.
        again = launch(place, {}) if ended[0].code else ended
        if any(one.code == TIMED_OUT for one in ended) or len(errors(ended)) > 1:
            wrong.append((number, [(one.code, one.err) for one in ended]))
        if again[0].code or (place / "out" / "model.safetensors").read_bytes() != whole:
            wrong.append((number, [(one.code, one.err) for one in again]))
    assert not wrong
