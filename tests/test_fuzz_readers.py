"""Whatever stands in a file, its reader gives a value or one clean line; it never hangs or fills the memory.

`scripts/test --all` does 100 000 damages. One that fails prints itself: it goes into `KNOWN`.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from structprune.errors import StructpruneError
from tests.fuzzing import Change, change
from tests.reading import READERS, Reader

QUICK = 100
HANGS_AFTER = 60
GROWS_BY = 2**30


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise where the block takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def complaint(reader: Reader, path: Path, original: bytes, damage: Change, right: object) -> str:
    """Return what is wrong with how a reader takes a damage; empty where nothing is."""
    changed = damage.of(original)
    path.write_bytes(changed)
    try:
        with limited(HANGS_AFTER):
            found = reader.read(path)
    except StructpruneError as error:
        if error.exit_code not in (2, 3, 4, 5, 6):
            return f"exit {error.exit_code}: {error}"
        if not error.hint:
            return f"no hint: {error}"
        return "more than one line" if "\n" in str(error) else ""
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "what was read is not what was written" if reader.exact and found != right else ""


def complaints(name: str, specimens: Path, damages: Iterator[Change]) -> list[str]:
    """Damage the file of a reader in each of these ways; return what went wrong, ready for `KNOWN`."""
    reader = READERS[name]
    path = specimens / reader.file
    original = path.read_bytes() if path.exists() else b'{"pid": 1, "host": "x", "boot": "y", "started": "1"}'
    path.write_bytes(original)
    right = reader.read(path) if reader.exact else None
    found = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for damage in damages:
            wrong = complaint(reader, path, original, damage, right)
            if wrong:
                found.append(f'("{name}", {damage}),  # {wrong}')
    finally:
        path.write_bytes(original)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return found if grown < GROWS_BY else [*found, f"{name}: grew by {grown} bytes"]


def by_chance(name: str, specimens: Path, count: int) -> Iterator[Change]:
    path = specimens / READERS[name].file
    original = path.read_bytes() if path.exists() else b'{"pid": 1, "host": "x", "boot": "y", "started": "1"}'
    return (change(original, str(path), seed) for seed in range(count))


# Damages that once ended in a traceback.
KNOWN: list[tuple[str, Change]] = []


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_rightly_or_refused_in_one_line(name: str, specimens: Path) -> None:
    count = max(QUICK * READERS[name].share // 5_000, 10)
    assert complaints(name, specimens, by_chance(name, specimens, count)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_hundred_thousand_damaged_files_are_read_rightly_or_refused(name: str, specimens: Path) -> None:
    assert complaints(name, specimens, by_chance(name, specimens, READERS[name].share)) == []


@pytest.mark.parametrize(("name", "damage"), KNOWN)
def test_what_once_ended_in_a_traceback_does_not_again(name: str, damage: Change, specimens: Path) -> None:
    assert complaints(name, specimens, iter([damage])) == []


def test_the_readers_are_damaged_a_hundred_thousand_times() -> None:
    assert sum(reader.share for reader in READERS.values()) >= 100_000
