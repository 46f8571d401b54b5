"""Temporary folders, where the system keeps such, and what to do when that place is full."""

import tempfile
from pathlib import Path

from structprune.errors import EnvironmentFailure

PREFIX = "structprune-"
HINT = "free some space there, or set TMPDIR to a folder on another disk"


def scratch_folder(purpose: str, within: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is removed when the `with` block around it ends.

    Args:
        purpose: A word for its name.
        within: Where; unless given, where the system keeps temporary files (TMPDIR).

    Raises:
        EnvironmentFailure: It cannot be made; names the place.
    """
    try:
        return tempfile.TemporaryDirectory(prefix=f"{PREFIX}{purpose}-", dir=within)
    except OSError as error:
        place = within or error.filename or "TMPDIR"
        raise EnvironmentFailure(
            f"{place}: no temporary folder can be made: {error.strerror or error}",
            hint="choose an output that you may write to" if within else HINT,
        ) from error


def is_scratch(path: Path) -> bool:
    """Tell whether a path lies in a temporary folder of ours, and not in one beside an output."""
    place = Path(tempfile.gettempdir())
    return any(parent.parent == place and parent.name.startswith(PREFIX) for parent in path.parents)
