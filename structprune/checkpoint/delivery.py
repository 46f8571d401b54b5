"""From nothing to a published folder: lock, partial folder with the run's fingerprint, manifest, rename.

An interrupted run leaves `OUT.partial-<hash>` behind; the same command finds it by its fingerprint and goes
on. A run that differs in anything that shapes the bytes is told what differs, and starts over only with
`restart`.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from structprune.checkpoint.beside import LOCK, beside, partial_of
from structprune.checkpoint.lock import Lock
from structprune.checkpoint.manifest import MANIFEST, RECIPE_FILE, RUN_PLACES, check_manifest, write_manifest
from structprune.checkpoint.partial import FINGERPRINT, FINGERPRINT_LIMIT, PLANS, Partial, partials_of
from structprune.checkpoint.publishing import discard, is_occupied, publish, settle
from structprune.checkpoint.writing import Writing
from structprune.errors import (
    EnvironmentFailure,
    InputError,
    MethodError,
    QualityError,
    UsageError,
    VerificationError,
)
from structprune.plan.block import canonical
from structprune.storage.durable import DurableFile, blame
from structprune.storage.strict_json import read_json
from structprune.storage.tensor_file import Entry
from structprune.version import __version__

logger = logging.getLogger(__name__)


class Delivery:
    """A folder under work.

    Attributes:
        final: Where it will stand.
        folder: Where it stands until it is complete.
        writing: How it is written.
        plans: Where its plans go.
        hashes: sha256 of files that were hashed while they were written, by relative path.
        digests: sha256 of the bytes of every stored tensor, where the folder will hold a model.
        weights: Bytes of its weight files by how they came there, as `Exported` has them.
        scratch: What only a resumed run reads, files or folders; removed in this order before publishing.
    """

    def __init__(self, final: Path, folder: Path, writing: Writing, lock: Lock) -> None:
        self.final = final
        self.folder = folder
        self.plans = folder / PLANS
        self.hashes: dict[str, str] = {}
        self.digests: dict[Entry, str] = {}
        self.weights: dict[str, int] = {}
        self.scratch: list[Path] = []
        self.writing = writing
        self._lock = lock

    def write_text(self, name: str, text: str) -> None:
        """Write a small file of the folder; `name` is relative to it."""
        path = self.folder / name
        with blame(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with DurableFile(path) as file:
            file.write(text.encode())

    def note(self, hashes: Mapping[str, str], digests: Mapping[Entry, str]) -> None:
        """Remember what was hashed while it was written: files by relative path, and stored tensors."""
        self.hashes |= hashes
        self.digests |= digests

    def publish(self, *, stages: list[str], facts: Mapping[str, Any]) -> None:
        """Write the manifest as the last file, then rename the folder into place.

        The scratch goes before. What runs that ended left for this output is then of no more use, and goes.
        """
        partial = Partial(self.folder)
        partial.refuse_foreign(self.hashes)
        for path in self.scratch:
            with blame(path):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        partial.close()
        write_manifest(
            self.folder, self.hashes, self.digests, version=__version__, stages=stages, facts=facts
        )
        publish(self.folder, self.final, self._lock, overwrite=self.writing.overwrite)
        for left in partials_of(self.final):
            if left.has_ended:
                try:
                    _forget(left, self._lock)
                except EnvironmentFailure as failure:
                    logger.warning("%s", failure.message)

    def drop(self) -> None:
        """Remove the folder, if it was not published: no later run goes on from it."""
        discard(self.folder, self._lock)


@contextmanager
def deliver(
    final: Path, fingerprint: Mapping[str, Any], writing: Writing = Writing(), *, files: Iterable[str] = ()
) -> Iterator[Delivery]:
    """Hold the output's lock and its partial folder for the length of a `with`.

    Args:
        final: The output, as `check_output` returned it.
        fingerprint: Everything that shapes the bytes of the result; JSON values only.
        writing: Whether what earlier runs for this output left is removed, and what stands there replaced.
        files: Names of the source's files that the result may hold copies of.

    Raises:
        EnvironmentFailure: Another run holds the lock, one with another fingerprint was interrupted, or what
            stands there may not be replaced.
    """
    with Lock(final) as lock:
        settle(final, lock)
        if is_occupied(final) and not writing.overwrite:
            raise EnvironmentFailure(
                f"{final}: exists", hint="choose another output, or pass --overwrite to replace it"
            )
        folder = work_folder(final, fingerprint)
        for left in partials_of(final):
            if writing.restart or left.is_empty:
                _forget(left, lock)
            elif left.folder != folder and not left.has_ended:
                _refuse_or_forget(left, fingerprint, lock)
        partial = Partial(folder)
        partial.begin(fingerprint, files)
        try:
            yield Delivery(final, folder, writing, lock)
        except (MethodError, UsageError, InputError, QualityError, VerificationError) as error:
            if folder.exists():
                _end(partial, error.message, lock)
            if isinstance(error, InputError) and str(folder) in error.message:
                hint = "what a former run left is damaged: pass --restart to forget it"
                raise InputError(error.message, hint=hint) from error
            raise


def tidy(final: Path) -> None:
    """Settle what a run that was killed after it had published left beside its result: its lock, mostly.

    Raises:
        EnvironmentFailure: Another run holds the lock.
    """
    if os.path.lexists(beside(final, LOCK)):
        with Lock(final) as lock:
            settle(final, lock)


def work_folder(final: Path, fingerprint: Mapping[str, Any]) -> Path:
    """Return where the run with this fingerprint builds its result."""
    return partial_of(final, hashlib.sha256(canonical(dict(fingerprint)).encode()).hexdigest())


def is_delivered(final: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Tell whether a folder is the complete and untouched result of a run with this fingerprint.

    Raises:
        EnvironmentFailure: A file cannot be read.
    """
    file = final / FINGERPRINT
    same = file.is_file() and read_json(file, limit_bytes=FINGERPRINT_LIMIT) == dict(fingerprint)
    return same and (final / MANIFEST).is_file() and not check_manifest(final)


def _end(partial: Partial, reason: str, lock: Lock) -> None:
    """Leave the decisions of a run that ended; the reason is told even if the disk refuses that."""
    with suppress(EnvironmentFailure):
        partial.end(reason)
        if not partial.has_state:
            _forget(partial, lock)


def _forget(left: Partial, lock: Lock) -> None:
    """Remove an unfinished folder, but never a file that no run wrote."""
    left.refuse_foreign()
    discard(left.folder, lock)


def _refuse_or_forget(left: Partial, fingerprint: Mapping[str, Any], lock: Lock) -> None:
    """Refuse to work beside an interrupted run, unless nothing would be lost with it."""
    if not left.has_state:
        return _forget(left, lock)
    try:
        known = read_json(left.folder / FINGERPRINT, limit_bytes=FINGERPRINT_LIMIT)
    except InputError:
        known = {}
    differing = sorted(_differences(known, dict(fingerprint)))
    again = command_again(left.folder)
    command = f"`{again}`" if again else "its own command"
    raise EnvironmentFailure(
        f"{left.folder}: an interrupted run differs in {', '.join(differing[:5]) or 'its fingerprint'}; "
        f"it left {left.describe()}",
        hint=f"finish it with {command}, or pass --restart to forget it",
    )


def command_again(folder: Path) -> str:
    """Return the command that runs again what made a folder, from any place; empty where it does not say."""
    recipe, places = folder / RECIPE_FILE, folder / RUN_PLACES
    if not recipe.is_file():
        return ""
    try:
        said = read_json(places, limit_bytes=FINGERPRINT_LIMIT)
    except (InputError, FileNotFoundError):
        return ""
    command = said.get("command") if isinstance(said, dict) else None
    return f"structprune {command} {recipe}" if command in ("apply", "prune", "recover") else ""


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted paths at which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path
