"""Writing files that are whole or absent: write beside, flush, rename; and what the disk may answer."""

import errno
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from structprune.errors import EnvironmentFailure
from structprune.storage.safe_open import CHUNK_BYTES
from structprune.storage.scratch import HINT, is_scratch

# While a file is being written it carries this ending, so that a killed run leaves nothing that looks whole.
UNFINISHED = ".tmp"
# linux/fs.h: _IOW(0x94, 9, int). A kernel that numbers it otherwise refuses.
_FICLONE = 0x40049409


class DurableFile:
    """Write a file under another name; rename it into place when the `with` block ends without an exception.

    Raises:
        EnvironmentFailure: The disk is full, read-only or fails; the unfinished file is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unfinished = path.with_name(path.name + UNFINISHED)
        self._hash = hashlib.sha256()
        with blame(path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptor = os.open(self._unfinished, flags, 0o666)

    @property
    def sha256(self) -> str:
        """Return the hash of all bytes written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, however many the system takes at a time."""
        view = memoryview(data)
        with blame(self.path):
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                self._hash.update(chunk)
                while chunk:
                    chunk = chunk[os.write(self._descriptor, chunk) :]

    def clone(self, descriptor: int) -> bool:
        """Take over all bytes of an open file, where the file system lets files share them until an edit.

        Whoever clones hands the same bytes to `pass_over`.

        Returns:
            Whether it does; if not, nothing was written.
        """
        if not sys.platform.startswith("linux"):  # elsewhere the number may mean anything
            return False
        try:
            fcntl.ioctl(self._descriptor, _FICLONE, descriptor)
        except OSError:
            return False  # whatever else is wrong with the disk, writing the bytes will tell
        return True

    def pass_over(self, data: bytes | memoryview) -> None:
        """Hash bytes that stand there already."""
        self._hash.update(data)

    def close(self, *, keep: bool) -> None:
        """Flush and rename the file, or remove it where `keep` is false."""
        try:
            if keep:
                with blame(self.path):
                    os.fsync(self._descriptor)
        except EnvironmentFailure:
            keep = False
            raise
        finally:
            os.close(self._descriptor)
            if not keep:
                with suppress(OSError):
                    self._unfinished.unlink()
        if keep:
            rename(self._unfinished, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=kind is None)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder and make the new name survive a power cut.

    Raises:
        EnvironmentFailure: The system refuses; then `source` is still where it was.
    """
    with blame(target):
        source.replace(target)
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    with blame(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network and FUSE file systems cannot flush a folder; they keep names in order themselves.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Turn an operating system error inside the block into an `EnvironmentFailure` that names `path`."""
    hints = {
        errno.ENOSPC: "free some space, or choose an output on another disk; then run the same command again",
        errno.EDQUOT: "your quota is used up: free some space, then run the same command again",
        errno.EROFS: "the disk is read-only; choose another output",
        errno.EACCES: "choose an output that you may write to",
        errno.EPERM: "choose an output that you may write to",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    try:
        yield
    except OSError as error:
        hint = hints.get(error.errno or 0, "check the disk, then run the same command again")
        if is_scratch(path):
            hint = HINT
        raise EnvironmentFailure(
            f"{path}: cannot be written: {error.strerror or error}", hint=hint
        ) from error
