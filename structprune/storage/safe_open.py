"""Opening files of a model folder: regular files only, never blocking, no link that leaves the folder."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from structprune.errors import EnvironmentFailure, InputError

# Large enough that system calls cost nothing, small enough to stay in a core's cache while it is hashed.
CHUNK_BYTES = 1 << 20


def check_link(path: Path, root: Path | None) -> None:
    """Refuse a symbolic link whose target lies outside the model folder `root`.

    A Hugging Face cache snapshot consists of links into the `blobs` folder of the same `models--*` folder;
    those are accepted. `root=None` accepts every link.

    Raises:
        InputError: The link leaves the folder, or leads in a circle.
    """
    if root is None or not path.is_symlink():
        return
    try:
        target = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        return  # The caller reports a missing file in its own words.
    except OSError as error:
        raise InputError(
            f"{path}: the link cannot be followed: {error.strerror}",
            hint="copy the file into the folder in place of the link",
        ) from None
    folder = Path(os.path.realpath(root))
    allowed = [folder]
    allowed += [parent / "blobs" for parent in folder.parents if parent.name.startswith("models--")]
    if not any(target.is_relative_to(place) for place in allowed):
        raise InputError(
            f"{path}: the link leads out of the model folder, to {target}",
            hint="copy the file into the folder, or pass --allow-external-symlinks",
        )


@contextmanager
def open_regular(path: Path, root: Path | None = None) -> Iterator[int]:
    """Open a regular file for reading and yield its descriptor; close it afterwards.

    Raises:
        InputError: Missing, not a regular file (folder, pipe, device), or a link out of `root`.
        EnvironmentFailure: The file may not be read.
    """
    check_link(path, root)
    try:
        # Before opening: opening a pipe or a device can wait for ever or have effects of its own.
        _refuse_irregular(path, path.stat())
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file", hint="check the path; is the download complete?") from None
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        _refuse_irregular(path, os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def unreadable(path: Path, error: OSError) -> EnvironmentFailure:
    """Return the failure that stands for an operating system error while reading `path`."""
    return EnvironmentFailure(
        f"{path}: cannot be read: {error.strerror or error}", hint="check the permissions and the disk"
    )


def read_at(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill a writable byte buffer from the position `offset` of an open file.

    Raises:
        InputError: The file ends before the buffer is full.
        EnvironmentFailure: The disk reports an error.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise unreadable(path, error) from None
        if count == 0:
            raise InputError(
                f"{path}: ends at byte {offset + done}, expected {len(buffer) - done} more bytes",
                hint="was it changed while it was read?",
            )
        done += count


def read_whole(path: Path, *, limit_bytes: int, root: Path | None = None) -> bytes:
    """Read a small file into memory.

    Raises:
        InputError: As `open_regular`, or larger than `limit_bytes`, or changing while it is read.
    """
    with open_regular(path, root) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit_bytes:
            raise InputError(
                f"{path}: {size} bytes, at most {limit_bytes} are expected in such a file",
                hint="not the file that it is called, or damaged: fetch it again",
            )
        data = bytearray(size)
        read_at(descriptor, memoryview(data), 0, path)
    return bytes(data)


def hash_file(path: Path, root: Path | None = None) -> str:
    """Return the sha256 of a regular file.

    Raises:
        InputError: Missing, irregular, or a link out of `root`.
        EnvironmentFailure: The file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    with open_regular(path, root) as descriptor:
        size = path.stat().st_size
        for start in range(0, size, CHUNK_BYTES):
            chunk = memoryview(buffer)[: min(CHUNK_BYTES, size - start)]
            read_at(descriptor, chunk, start, path)
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(
            f"{path}: is {kind}, expected a regular file",
            hint="put the file itself there; folders, pipes and devices are not read",
        )
