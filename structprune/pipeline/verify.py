"""Measures a folder from its files, and reloads it in a fresh process."""

from pathlib import Path
from typing import Any

from structprune.checkpoint.adapter import is_adapter
from structprune.checkpoint.locate import resolve
from structprune.models.opening import Opening
from structprune.progress import Progress, silent
from structprune.proof import verify as proof
from structprune.proof.adapter import verify_adapter


def verify(
    folder: str | Path,
    against: str | None = None,
    *,
    opening: Opening = Opening(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a folder from its files and reload it in a fresh process.

    Args:
        folder: What structprune wrote (a model, a packed one, a kept adapter), or any model folder.
        against: The model it was made from.
        opening: How both are opened, also in the fresh process; always on the CPU, in the dtype of the files.
        progress: Told (stage, done, total).
    """
    path = resolve(str(folder))
    source = resolve(against) if against else None
    check = verify_adapter if is_adapter(path) else proof.verify
    return check(path, source, opening=opening, progress=progress).as_json()
