"""The place of the output: whether a result may be written there, checked before any work."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from structprune.checkpoint.inputs import Input, refuse_overlap
from structprune.checkpoint.lock_file import check_lock
from structprune.checkpoint.manifest import MANIFEST
from structprune.checkpoint.partial import partials_of
from structprune.checkpoint.publishing import is_occupied
from structprune.errors import EnvironmentFailure, UsageError
from structprune.storage.durable import blame

# File systems slow down and fail close to full; plans, tokenizer and report come on top of the weights.
_SPARE_BYTES = 64_000_000


def check_output(inputs: Sequence[Input], output: Path, *, overwrite: bool, needed_bytes: int = 0) -> Path:
    """Check that a result may be written to `output`, before any work; nothing is created.

    Args:
        inputs: Everything that the run reads.
        output: The folder asked for.
        overwrite: An existing folder may be replaced (never a file, a home, the working folder or one above).
        needed_bytes: Expected size of the result.

    Returns:
        The real path of the output, links resolved.

    Raises:
        UsageError: The output is an input, lies in one or holds one, or is itself to be protected.
        EnvironmentFailure: The output exists and may not be replaced or written, or the disk is too full.
    """
    final = _check_place(inputs, output)
    with blame(output):
        # In the folder of an unfinished run a file that is none of its own is refused whoever reads it.
        for left in partials_of(final):
            refuse_overlap([one for one in inputs if one.path.is_dir()], left.folder, output)
    here = Path.cwd().resolve()
    if final in (here, *here.parents, Path.home().resolve()) or final.is_mount():
        raise UsageError(
            f"{output}: is the working folder, one above it, a home or a disk",
            hint="name a new folder for the result",
        )
    if final.exists() and not final.is_dir():
        raise EnvironmentFailure(f"{output}: is a file, expected a folder", hint="choose another output")
    check_lock(final)
    if not overwrite and is_occupied(final):
        if (final / MANIFEST).exists():
            raise EnvironmentFailure(
                f"{output}: exists and is a result of structprune",
                hint="choose another output, or pass --overwrite",
            )
        raise EnvironmentFailure(
            f"{output}: exists and is not empty and not made by structprune",
            hint="choose another output: --overwrite would remove all that is in it",
        )
    if is_occupied(final):
        with blame(final):
            _check_removable(final, output)
    _check_disk(final, needed_bytes)
    return final


def check_output_file(inputs: Sequence[Input], output: Path, *, overwrite: bool) -> Path:
    """Check that one file may be written to `output`, before any work; nothing is created.

    Args:
        inputs: Everything that the run reads.
        output: The file asked for.
        overwrite: An existing file may be replaced.

    Returns:
        The real path of the output, links resolved.

    Raises:
        UsageError: The output is an input or lies in one.
        EnvironmentFailure: The output exists and may not be replaced or written, or the disk is too full.
    """
    final = _check_place(inputs, output)
    if final.exists() and not final.is_file():
        raise EnvironmentFailure(f"{output}: is no file", hint="choose another output")
    if final.exists() and not overwrite:
        raise EnvironmentFailure(
            f"{output}: exists", hint="choose another output, or pass --overwrite to replace it"
        )
    _check_disk(final, 0)
    return final


def _check_place(inputs: Sequence[Input], output: Path) -> Path:
    """Return the real path of an output whose name can be written and that harms no input."""
    try:
        str(output).encode()
    except UnicodeEncodeError:
        # Its name stands in the report, the card and the messages, all of which are UTF-8.
        raise UsageError(f"{str(output)!a}: the name is not UTF-8", hint="choose another output") from None
    final = Path(os.path.realpath(output))
    _check_name(final, output)
    with blame(output):
        refuse_overlap(inputs, final, output)
    return final


def check_linkable(files: Sequence[Path], output: Path) -> None:
    """Check that files can get a second name in the output.

    Raises:
        EnvironmentFailure: They lie on another disk.
    """
    place = _nearest(Path(os.path.realpath(output)))
    for file in files:
        with blame(output):
            elsewhere = file.exists() and file.stat().st_dev != place.stat().st_dev
        if elsewhere:
            raise EnvironmentFailure(
                f"--link: {file} and {output} are on different disks, where a file cannot have two names",
                hint="choose an output on the disk of the model, or leave --link out",
            )


def _check_removable(final: Path, output: Path) -> None:
    """Check that all of an existing folder can be removed once the new one is there."""
    folders = [(final, final.parent)]
    while folders:
        path, parent = folders.pop()
        status = path.lstat()
        if obstacle := _obstacle(path, status, parent):
            raise EnvironmentFailure(
                f"{output}: cannot be replaced: {path} {obstacle}",
                hint="remove it as its owner, or choose another output",
            )
        if stat.S_ISDIR(status.st_mode):
            folders += [(inner, path) for inner in path.iterdir()]


def _obstacle(path: Path, status: os.stat_result, parent: Path) -> str:
    """Return why a file or folder cannot be removed; empty where it can."""
    above, user = parent.stat(), os.geteuid()
    if user and above.st_mode & stat.S_ISVTX and user not in (status.st_uid, above.st_uid):
        return "belongs to another user, and its folder lets only owners remove"
    if status.st_dev != above.st_dev:
        return "is a disk of its own"
    if not _may_write(parent):
        return f"lies in {parent}, which may not be written to"
    if stat.S_ISLNK(status.st_mode):
        return ""
    if stat.S_ISDIR(status.st_mode):
        return "" if _may_write(path) else "may not be written to"
    # Removing a file takes no right on the file; but the system denies writing where it is set immutable.
    allowed = user == 0 or (user == status.st_uid and status.st_mode & stat.S_IWUSR)
    return "is protected by the system" if allowed and not _may_write(path, folder=False) else ""


def _may_write(path: Path, *, folder: bool = True) -> bool:
    mode = os.W_OK | os.X_OK | os.R_OK if folder else os.W_OK
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _check_name(final: Path, output: Path) -> None:
    place = _nearest(final)
    most = os.statvfs(place).f_namemax or 255
    if too_long := [part for part in final.relative_to(place).parts if len(os.fsencode(part)) > most]:
        raise EnvironmentFailure(
            f"{output}: a name of {len(os.fsencode(too_long[0]))} bytes, the disk takes {most}",
            hint="choose a shorter name",
        )


def _nearest(final: Path) -> Path:
    """Return the nearest folder above the output that exists."""
    return next((parent for parent in final.parents if os.path.lexists(parent)), final)


def _check_disk(final: Path, needed_bytes: int) -> None:
    # The unfinished folder stands beside the final one, so the parent must be writable.
    place = _nearest(final)
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
