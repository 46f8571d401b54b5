"""A lock file that is there: opened without following or changing anything, read, or refused by name."""

import errno
import fcntl
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from structprune.checkpoint.aside import Aside
from structprune.checkpoint.beside import LOCK, beside
from structprune.errors import EnvironmentFailure
from structprune.storage.durable import blame

# How every lock file begins: what a killed process left of one is told from a file of the user's.
HEAD = b'{"structprune": "lock", "token": "'
# A journal names two folders; far more than that is no lock of ours.
MOST_BYTES = 65536
# EBADF: a network disk that locks only what is open for writing.
_DISK_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)


class LockFile:
    """A lock file that is there, or the news that there is none.

    Args:
        path: Its name.
        lock: Whether to take the system's lock on it, for as long as the `with` block runs.

    Attributes:
        there: Whether there is one.
        content: What it says; empty where only its beginning was written.
        locked: Whether this process has the system's lock; None where the disk has none.

    Raises:
        EnvironmentFailure: Something else has the name: a file of the user's, a link, a folder.
    """

    def __init__(self, path: Path, *, lock: bool = True) -> None:
        self.content: dict[str, Any] = {}
        self.locked: bool | None = None
        self._path = path
        self._descriptor = -1
        try:
            self._descriptor = _open(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            if lock:
                self.locked = lock_file(self._descriptor)
            self.content = parse(os.pread(self._descriptor, MOST_BYTES, 0), path)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def there(self) -> bool:
        """Tell whether there is one."""
        return self._descriptor >= 0

    @property
    def torn(self) -> bool:
        """Tell whether only the beginning was written."""
        return self.there and not self.content

    @property
    def token(self) -> str:
        """Return what tells this lock from every other one; empty without one."""
        return str(self.content.get("token", ""))

    @property
    def journal(self) -> tuple[Aside, ...]:
        """Return what is set aside."""
        entries = self.content.get("journal")
        parsed = [Aside.parse(one) for one in entries] if isinstance(entries, list) else []
        return tuple(one for one in parsed if one is not None)

    def has_its_name(self) -> bool:
        """Tell whether the name still leads to this very file."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self._path.lstat(), os.fstat(self._descriptor))
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.there:
            os.close(self._descriptor)


def check_lock(output: Path) -> None:
    """Check that the name of the output's lock is free, or that of a lock; nothing is created.

    Raises:
        EnvironmentFailure: Something of the user's has that name.
    """
    path = beside(output, LOCK)
    with blame(path), LockFile(path, lock=False):
        pass


def _open(path: Path) -> int:
    """Open a lock file for reading; a link is not followed, and a pipe or a device never opened."""
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise _foreign(path, kind)
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _foreign(path, "a link") from None
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return os.open(path, os.O_RDONLY | flags)  # of another user: who holds it can be read all the same


def parse(data: bytes, path: Path) -> dict[str, Any]:
    """Return the content of a lock file; empty where a killed process wrote only its beginning."""
    if not data.startswith(HEAD):
        raise _foreign(path, f"a file of {len(data)} bytes" if len(data) < MOST_BYTES else "a large file")
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _foreign(path: Path, kind: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{path}: is {kind} and no lock of structprune, which needs this name during a run",
        hint="move it away, or choose another output",
    )


def lock_file(descriptor: int) -> bool | None:
    """Take the system's lock of a file; return False where another has it, None where there are none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _DISK_HAS_NO_LOCKS:
            raise
        return None
    return True
