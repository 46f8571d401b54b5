"""From nothing to a published folder: lock, partial folder with the run's fingerprint, manifest, rename.

A killed run leaves `OUT.partial-<hash>` behind; the same command finds it by its fingerprint and goes on. A
run that differs in anything that shapes the bytes is told what differs, and starts over only with `restart`.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from structprune.checkpoint.lock import Lock
from structprune.checkpoint.manifest import MANIFEST, OURS, check_manifest, write_manifest
from structprune.checkpoint.output import discard, partial_of, partials_of, publish, settle
from structprune.checkpoint.writing import Writing
from structprune.errors import EnvironmentFailure
from structprune.plan.block import canonical
from structprune.storage.durable import UNFINISHED, DurableFile, blame
from structprune.storage.strict_json import read_json
from structprune.storage.tensor_file import Entry
from structprune.version import __version__

logger = logging.getLogger(__name__)

FINGERPRINT = f"{OURS}/fingerprint.json"
FINGERPRINT_LIMIT = 2**20


class Delivery:
    """A folder under work.

    Attributes:
        final: Where it will stand.
        folder: Where it stands until it is complete.
        writing: How it is written.
        plans: Where its plans go.
        hashes: sha256 of files that were hashed while they were written, by relative path.
        digests: sha256 of the bytes of every stored tensor, where the folder will hold a model.
        scratch: What only a resumed run reads, files or folders; removed in this order before publishing.
    """

    def __init__(self, final: Path, folder: Path, writing: Writing) -> None:
        self.final = final
        self.folder = folder
        self.plans = folder / OURS / "plans"
        self.hashes: dict[str, str] = {}
        self.digests: dict[Entry, str] = {}
        self.scratch: list[Path] = []
        self.writing = writing

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
        """Remove the scratch, write the manifest as the last file, then rename the folder into place."""
        for path in self.scratch:
            with blame(path):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        write_manifest(
            self.folder, self.hashes, self.digests, version=__version__, stages=stages, facts=facts
        )
        publish(self.folder, self.final, overwrite=self.writing.overwrite)


@contextmanager
def deliver(final: Path, fingerprint: Mapping[str, Any], writing: Writing = Writing()) -> Iterator[Delivery]:
    """Hold the output's lock and its partial folder for the length of a `with`.

    Args:
        final: The output, as `check_output` returned it.
        fingerprint: Everything that shapes the bytes of the result; JSON values only.
        writing: Whether what earlier runs for this output left is removed, and what stands there replaced.

    Raises:
        EnvironmentFailure: Another run holds the lock, or one with another fingerprint left its work behind.
    """
    with blame(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(Lock(final))
        settle(final)
        folder = work_folder(final, fingerprint)
        for left in partials_of(final):
            if writing.restart:
                discard(left)
            elif left != folder:
                _refuse(left, fingerprint)
        with blame(folder):
            folder.mkdir(exist_ok=True)
            for unfinished in folder.rglob(f"*{UNFINISHED}"):
                unfinished.unlink()
        work = Delivery(final, folder, writing)
        work.write_text(FINGERPRINT, json.dumps(dict(fingerprint), indent=1, sort_keys=True) + "\n")
        yield work


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


def _refuse(left: Path, fingerprint: Mapping[str, Any]) -> None:
    file = left / FINGERPRINT
    known = read_json(file, limit_bytes=FINGERPRINT_LIMIT) if file.is_file() else {}
    differing = sorted(_differences(known, dict(fingerprint)))
    raise EnvironmentFailure(
        f"{left}: an unfinished run differs in {', '.join(differing[:5]) or 'its fingerprint'}",
        hint="finish it with its own command, or pass --restart to forget it",
    )


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted paths at which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path
