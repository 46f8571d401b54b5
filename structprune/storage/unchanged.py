"""A weight file of which a run changes nothing: shared with the source where that can be, else copied."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from structprune.errors import EnvironmentFailure, InputError
from structprune.storage.durable import DurableFile, blame, sync_folder
from structprune.storage.header import Header, TensorInfo, stamp_of
from structprune.storage.safe_open import CHUNK_BYTES, open_regular, read_at
from structprune.storage.tensor_file import Entry

Way = Literal["copied", "reflinked", "linked", "referred"]
"""How an unchanged file came into a result: its bytes copied; shared by the file system until either file is
written to; one file with two names; or only told of."""


@dataclass(frozen=True)
class StoredFile:
    """A weight file as a reader found it.

    Attributes:
        path: Where it is.
        root: See `safe_open.check_link`.
        header: What it said of itself when it was opened.
    """

    path: Path
    root: Path | None
    header: Header

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return self.header.stamp[0]


@dataclass(frozen=True)
class Placed:
    """What became of an unchanged file.

    Attributes:
        way: How it came into the result.
        sha256: Hash of its bytes.
        digests: sha256 of the bytes of each of its tensors.
    """

    way: Way
    sha256: str
    digests: dict[Entry, str]


def place_file(stored: StoredFile, target: Path, *, link: bool = False) -> Placed:
    """Put an unchanged file into a folder; every byte is read once, for its hashes.

    A copy and a reflink are independent of the source, and may be written to whatever the source allows.

    Args:
        stored: The file; it is never written to.
        target: Where it is to stand; a file of this name is replaced.
        link: Give the file itself a second name, instead of a copy.

    Raises:
        InputError: The file was changed since its header was read.
        EnvironmentFailure: The disk is full or refuses; or there can be no link.
    """
    if link:
        _link(stored, target)
        return Placed("linked", *read_hashes(stored))
    parts = _Parts()
    with open_regular(stored.path, stored.root) as descriptor, DurableFile(target) as output:
        cloned = output.clone(descriptor)
        for info, chunk in _chunks(descriptor, stored):
            parts.update(info, chunk)
            if cloned:
                output.pass_over(chunk)
            else:
                output.write(chunk)
    return Placed("reflinked" if cloned else "copied", output.sha256, parts.digests)


def read_hashes(stored: StoredFile) -> tuple[str, dict[Entry, str]]:
    """Return the sha256 of a file and of each of its tensors; errors are those of `place_file`."""
    whole, parts = hashlib.sha256(), _Parts()
    with open_regular(stored.path, stored.root) as descriptor:
        for info, chunk in _chunks(descriptor, stored):
            whole.update(chunk)
            parts.update(info, chunk)
    return whole.hexdigest(), parts.digests


class _Parts:
    """The hashes of the tensors of a file."""

    def __init__(self) -> None:
        self._found: dict[Entry, hashlib._Hash] = {}

    def update(self, info: TensorInfo | None, chunk: memoryview) -> None:
        """Go on with a piece of a tensor; None stands for the header."""
        if info is not None:
            self._found.setdefault((info.name, info.dtype, info.shape), hashlib.sha256()).update(chunk)

    @property
    def digests(self) -> dict[Entry, str]:
        return {entry: found.hexdigest() for entry, found in self._found.items()}


def _chunks(descriptor: int, stored: StoredFile) -> Iterator[tuple[TensorInfo | None, memoryview]]:
    """Yield every byte of a file in order, with the tensor that it is of; the file must stay as it is."""
    _check_stamp(descriptor, stored)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    infos = list(stored.header.tensors.values())
    first = infos[0].start if infos else stored.header.stamp[0]
    for info, start, end in [(None, 0, first), *((info, info.start, info.end) for info in infos)]:
        if start == end:
            yield info, buffer[:0]
        for place in range(start, end, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, end - place)]
            read_at(descriptor, chunk, place, stored.path)
            yield info, chunk
    _check_stamp(descriptor, stored)


def _check_stamp(descriptor: int, stored: StoredFile) -> None:
    if stamp_of(descriptor) != stored.header.stamp:
        raise InputError(f"{stored.path}: the file was changed while it was being read", hint="start again")


def _link(stored: StoredFile, target: Path) -> None:
    with open_regular(stored.path, stored.root):
        pass  # whether it may be read, and lies where it may
    with blame(target):
        target.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(stored.path), target)
    except OSError as error:
        raise EnvironmentFailure(
            f"{target}: cannot be a hard link to {stored.path}: {error.strerror or error}",
            hint="choose an output on the disk of the model, which must be yours, or leave --link out",
        ) from error
    sync_folder(target.parent)
