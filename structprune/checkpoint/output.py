"""The output folder: checked before the work, completed beside its final place, renamed at the end.

`OUT.partial-<hash of the run>` is under work; `OUT.old-<number>` is the former result while the new one
takes its place; what ends in `.removed` is on its way out. Between the two renames of a replacement `OUT`
does not exist; a run killed there leaves the old one aside, and `settle`, called at the next start, puts it
back. Old and new are never mixed.
"""

import itertools
import logging
import os
import shutil
import stat
from pathlib import Path

from structprune.checkpoint.manifest import MANIFEST
from structprune.errors import EnvironmentFailure, UsageError
from structprune.storage.durable import blame, rename, sync_folder

logger = logging.getLogger(__name__)

# File systems slow down and fail close to full; plans, tokenizer and report come on top of the weights.
_SPARE_BYTES = 64_000_000
_REMOVED = ".removed"


def check_output(model: Path | None, output: Path, *, overwrite: bool, needed_bytes: int = 0) -> Path:
    """Check that a result may be written to `output`, before any work; nothing is created.

    Args:
        model: The input folder; None where the model is not a folder.
        output: The folder asked for.
        overwrite: An existing folder may be replaced (never a file, a home, the working folder or one above).
        needed_bytes: Expected size of the result.

    Returns:
        The real path of the output, links resolved.

    Raises:
        UsageError: Output and input are the same or one inside the other, or the output is to be protected.
        EnvironmentFailure: The output exists and may not be replaced or written, or the disk is too full.
    """
    final = Path(os.path.realpath(output))
    if model is not None:
        _refuse_overlap(Path(os.path.realpath(model)), final, model, output)
    here = Path.cwd().resolve()
    if final in (here, *here.parents, Path.home().resolve()) or final.is_mount():
        raise UsageError(
            f"{output}: is the working folder, one above it, a home or a disk",
            hint="name a new folder for the result",
        )
    if final.exists() and not final.is_dir():
        raise EnvironmentFailure(f"{output}: is a file, expected a folder", hint="choose another output")
    if not overwrite and _occupied(final):
        kind = (
            "a result of structprune"
            if (final / MANIFEST).exists()
            else "not empty and not made by structprune"
        )
        raise EnvironmentFailure(
            f"{output}: exists and is {kind}", hint="choose another output, or pass --overwrite"
        )
    _check_disk(final, needed_bytes)
    return final


def partial_of(final: Path, fingerprint: str) -> Path:
    """Return the folder in which the run with this fingerprint (hexadecimal) builds its result."""
    return final.with_name(f"{final.name}.partial-{fingerprint[:16]}")


def partials_of(final: Path) -> list[Path]:
    """Return the unfinished folders of all runs for this output, sorted."""
    return _beside(final, "partial")


def settle(final: Path) -> None:
    """Repair what a run killed during `publish` left: put the old result back, or clear it away.

    Call it while the lock is held and before anything looks at the output.

    Raises:
        EnvironmentFailure: The folders cannot be renamed or removed.
    """
    old = _beside(final, "old")
    if old and not final.exists():
        logger.warning("%s: a former run stopped while replacing it; its old content is put back", final)
        rename(old.pop(), final)
    for folder in old:
        if (final / MANIFEST).exists():
            discard(folder)
    for folder in [*_beside(final, "old", removed=True), *_beside(final, "partial", removed=True)]:
        _delete(folder)


def publish(partial: Path, final: Path, *, overwrite: bool) -> None:
    """Rename a complete folder into its final place; what stood there is removed afterwards.

    Args:
        partial: A folder with its manifest, on the same disk as `final`.
        final: The place, as `check_output` returned it.
        overwrite: Whether a folder that is not empty may be replaced.

    Raises:
        ValueError: The partial folder has no manifest.
        EnvironmentFailure: `final` came into being meanwhile, or the system refuses; the old one is in place.
    """
    if not (partial / MANIFEST).exists():
        raise ValueError(f"{partial} has no {MANIFEST}: it is not complete")
    if _occupied(final) and not overwrite:
        raise EnvironmentFailure(
            f"{final}: came into being during the run",
            hint=f"the result is complete in {partial}; move it yourself",
        )
    sync_folder(partial)
    aside: Path | None = None
    if final.exists():
        number = next(
            n for n in itertools.count(1) if not final.with_name(f"{final.name}.old-{n:04d}").exists()
        )
        aside = final.with_name(f"{final.name}.old-{number:04d}")
    try:
        if aside is not None:
            rename(final, aside)
        rename(partial, final)
    except EnvironmentFailure:
        if aside is not None and aside.exists() and not final.exists():
            rename(aside, final)
        raise
    if aside is not None:
        discard(aside)


def discard(folder: Path) -> None:
    """Remove a folder that stands beside the output, if it exists.

    It is renamed first: half a folder must neither be resumed nor be put back.

    Raises:
        EnvironmentFailure: It cannot be removed.
    """
    if folder.exists():
        removed = folder.with_name(folder.name + _REMOVED)
        if removed.exists():
            _delete(removed)
        rename(folder, removed)
        _delete(removed)


def _refuse_overlap(source: Path, final: Path, model: Path, output: Path) -> None:
    if source == final:
        relation = "is the input itself"
    elif final.is_relative_to(source):
        relation = f"lies inside the input {model}"
    elif source.is_relative_to(final):
        relation = f"holds the input {model}"
    else:
        return
    raise UsageError(
        f"{output}: the output {relation}, which is never written to", hint="choose an output beside it"
    )


def _occupied(folder: Path) -> bool:
    with blame(folder):
        return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _check_disk(final: Path, needed_bytes: int) -> None:
    # The unfinished folder stands beside the final one, so the parent must be writable.
    place = next(parent for parent in final.parents if parent.exists())
    if not stat.S_ISDIR(place.stat().st_mode):
        raise EnvironmentFailure(f"{place}: is a file, expected a folder", hint="choose another output")
    disk = os.statvfs(place)
    if disk.f_flag & os.ST_RDONLY or not os.access(place, os.W_OK | os.X_OK):
        raise EnvironmentFailure(f"{place}: cannot be written to", hint="choose another output")
    free = disk.f_bavail * disk.f_frsize
    needed = needed_bytes + _SPARE_BYTES
    if free < needed:
        raise EnvironmentFailure(
            f"{place}: {free / 1e9:.2f} GB free, the result needs about {needed / 1e9:.2f} GB",
            hint="free some space, or choose an output on another disk",
        )


def _beside(final: Path, kind: str, *, removed: bool = False) -> list[Path]:
    prefix = f"{final.name}.{kind}-"
    if not final.parent.is_dir():
        return []
    with blame(final.parent):
        folders = [path for path in final.parent.iterdir() if path.is_dir()]
    return sorted(
        path for path in folders if path.name.startswith(prefix) and path.name.endswith(_REMOVED) == removed
    )


def _delete(folder: Path) -> None:
    with blame(folder):
        shutil.rmtree(folder)
