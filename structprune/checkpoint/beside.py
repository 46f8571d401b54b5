"""What stands beside the output while a run works on it, and what each of these is called."""

import hashlib
import os
import re
from pathlib import Path

LOCK = ".lock"
# What names allow on every common file system, and the longest of our endings (".partial-" and 16 digits).
_NAME_BYTES = 255
_ENDING_BYTES = 32


def beside(final: Path, ending: str) -> Path:
    """Return the path beside the output whose name is the output's and `ending`.

    The beginning of a name that leaves no room for an ending is kept, with a hash of the whole of it.
    """
    raw = os.fsencode(final.name)
    if len(raw) + _ENDING_BYTES <= _NAME_BYTES:
        return final.with_name(final.name + ending)
    digest = f"~{hashlib.sha256(raw).hexdigest()[:16]}"
    kept = raw[: _NAME_BYTES - _ENDING_BYTES - len(digest)].decode(errors="ignore")
    return final.with_name(kept + digest + ending)


def find_beside(final: Path, ending: str) -> list[Path]:
    """Return what stands beside the output and ends in a full match of a regular expression, sorted.

    Raises:
        OSError: The folder that holds the output cannot be listed.
    """
    stem = beside(final, "").name
    if not final.parent.is_dir():
        return []
    return sorted(
        final.with_name(entry.name)
        for entry in os.scandir(final.parent)
        if entry.name.startswith(stem) and re.fullmatch(ending, entry.name[len(stem) :])
    )


def partial_of(final: Path, fingerprint: str) -> Path:
    """Return the folder in which the run with this fingerprint (hexadecimal) builds its result."""
    return beside(final, f".partial-{fingerprint[:16]}")
