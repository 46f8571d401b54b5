"""The end of a run: its folder takes the output's place, and what a killed run left half done is settled.

Between the two renames of a replacement `OUT` does not exist; a run killed there leaves the old one aside,
and `settle`, called at the next start, puts it back. Old and new are never mixed. What is set aside or about
to be removed stands in the lock's journal before it is touched; nothing else beside the output ever is.
"""

import itertools
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from structprune.checkpoint.aside import Aside
from structprune.checkpoint.beside import beside
from structprune.checkpoint.lock import Lock
from structprune.checkpoint.manifest import MANIFEST
from structprune.errors import EnvironmentFailure
from structprune.storage.durable import blame, rename, sync_folder

logger = logging.getLogger(__name__)


def settle(final: Path, lock: Lock) -> None:
    """Repair what a run killed during `publish` or `discard` left: put the old result back, or clear it away.

    Call it while the lock is held and before anything looks at the output.

    Raises:
        EnvironmentFailure: A folder cannot be renamed, or half an unfinished one cannot be removed.
    """
    for entry in lock.journal:
        folder = final.with_name(entry.name)
        if not entry.is_at(folder):
            continue
        if entry.successor is None:
            _remove(folder, lock, must=".partial-" in entry.name)
        elif not os.path.lexists(final):
            logger.warning("%s: a former run stopped while replacing it; its old content is put back", final)
            rename(folder, final)
        elif entry.is_succeeded_by(final):
            lock.note(replace(entry, successor=None))
            _remove(folder, lock)
        else:
            logger.warning("%s: was made anew since a run set the old one aside as %s", final, folder)
    left = [one for one in lock.journal if one.successor is None and one.is_at(final.with_name(one.name))]
    if tuple(left) != lock.journal:
        lock.note(*left)


def publish(partial: Path, final: Path, lock: Lock, *, overwrite: bool) -> None:
    """Rename a complete folder into its final place; what stood there is removed afterwards.

    Args:
        partial: A folder with its manifest, on the same disk as `final`.
        final: The place, as `check_output` returned it.
        lock: Held, with nothing in its journal but what could not be removed.
        overwrite: Whether a folder that is not empty may be replaced.

    Raises:
        ValueError: The partial folder has no manifest.
        EnvironmentFailure: `final` came into being meanwhile, or the system refuses; the old one is in place.
    """
    if not (partial / MANIFEST).exists():
        raise ValueError(f"{partial} has no {MANIFEST}: it is not complete")
    if is_occupied(final) and not overwrite:
        raise EnvironmentFailure(
            f"{final}: came into being during the run",
            hint=f"the result is complete in {partial}; move it yourself",
        )
    sync_folder(partial)
    if not os.path.lexists(final):
        return rename(partial, final)
    aside = next(
        path
        for number in itertools.count(1)
        if not os.path.lexists(path := beside(final, f".old-{number:04d}"))
    )
    with blame(final):
        entry = Aside.of(final, aside.name, successor=partial)
    former = lock.journal
    lock.note(*former, entry)
    try:
        rename(final, aside)
        rename(partial, final)
    except EnvironmentFailure:
        if entry.is_at(aside) and not os.path.lexists(final):
            rename(aside, final)
        # Where only the flush of a rename failed, the new one stands, and the next run removes the old one.
        if not entry.is_at(aside):
            lock.note(*former)
        raise
    # From here on the result is published: nothing that fails makes the run fail.
    try:
        lock.note(*former, replace(entry, successor=None))
    except EnvironmentFailure as failure:
        logger.warning("%s: published; the former content is still in %s: %s", final, aside, failure)
    else:
        _remove(aside, lock)


def discard(folder: Path, lock: Lock) -> None:
    """Remove a folder that stands beside the output, if it exists; once begun, it is never used again.

    Raises:
        EnvironmentFailure: It cannot be removed.
    """
    if folder.exists():
        with blame(folder):
            entry = Aside.of(folder, folder.name)
        lock.note(*lock.journal, entry)
        _remove(folder, lock, must=True)


def is_occupied(folder: Path) -> bool:
    """Tell whether a path is taken by anything but an empty folder."""
    with blame(folder):
        return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _remove(folder: Path, lock: Lock, *, must: bool = False) -> None:
    """Remove a folder that the journal gives up, and its entry; or warn that it is still there.

    Args:
        folder: Beside the output.
        lock: Its journal says that the folder is only to be removed.
        must: Raise instead of warning.
    """
    try:
        with blame(folder):
            shutil.rmtree(folder)
            sync_folder(folder.parent)
        lock.note(*(one for one in lock.journal if one.name != folder.name))
    except EnvironmentFailure as failure:
        if must:
            raise
        logger.warning("%s: cannot be removed yet, the next run tries again: %s", folder, failure.message)
