"""Every row of the table of bad inputs, 1 to 52, through the real command line: 52 of 52 is one test run.

Each input is met by `main` in a child of a warm parent, so that it can have the process for itself. What
stands in for hardware or a disk says so in its name.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.forks import Ended, Parent
from tests.specimens import stamps
from tests.table_cases import Case
from tests.table_rows import ROWS

# No input may cost more than a run does; a header that says it is huge allocates nothing.
GROWS_BY = {3: 50 * 2**20}


def wrong_with(case: Case, parent: Parent, place: Path) -> tuple[list[str], Ended]:
    """Run a case; return what is wrong with how the command ends, and how it ended."""
    place.mkdir()
    line = case.line(place)
    before = stamps(place)
    ended = parent.run([*line, "--json"], place, case.stop, case.around)
    wrong = []
    if ended.code != case.code:
        wrong.append(f"exit {ended.code}, expected {case.code}")
    if "Traceback" in ended.err:
        wrong.append("a traceback")
    said = " ".join(ended.err.split())
    wrong += [f"{part!r} is not said" for part in case.told if part not in said]
    if case.code:
        wrong += ["no hint"] if not ended.error.get("hint") else []
        wrong += ["OUT is there"] if (place / "out").exists() else []
    after = stamps(place)
    changed = [name for name in before if name != str(place) and before[name] != after.get(name)]
    wrong += [f"{name} was touched" for name in changed]
    return [f"{case.what}: {one}: {ended.err.strip()[-500:]}" for one in wrong], ended


def wrong_with_row(number: int, cases: Sequence[Case], parent: Parent, folder: Path) -> list[str]:
    wrong = []
    for count, case in enumerate(cases):
        found, ended = wrong_with(case, parent, folder / str(count))
        wrong += found
        if ended.growth > GROWS_BY.get(number, 2**30):
            wrong.append(f"{case.what}: grew by {ended.growth} bytes")
    return wrong


@pytest.fixture
def folder(specimens: Path, tmp_path: Path) -> Path:
    (tmp_path / "specimens").symlink_to(specimens)
    return tmp_path


@pytest.mark.parametrize("number", ROWS)
def test_a_bad_input_ends_as_the_table_says(number: int, parent: Parent, folder: Path) -> None:
    assert wrong_with_row(number, ROWS[number][:1], parent, folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", ROWS)
def test_its_variants_end_as_the_table_says_too(number: int, parent: Parent, folder: Path) -> None:
    assert wrong_with_row(number, ROWS[number][1:], parent, folder) == []
