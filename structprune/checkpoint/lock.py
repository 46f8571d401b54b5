"""One run per output: a lock file beside it that names its holder, and the journal of what it sets aside.

The file is written whole under a name of its own and only then linked to `OUT.lock`, which succeeds for one
process alone: nobody ever reads half of it, and an existing file is never opened for writing, followed or
truncated. Whatever is not a lock of ours is refused by name and left alone.

Two things say that the holder lives. The system's own lock (flock), taken before the file gets its name, ends
with its process, however that dies; the content (process, host, boot) decides where there are no such locks.

A change (the journal, a take-over) is a new file renamed over the old one, so it is there whole or not at
all. A system lock belongs to the file, not to the name: whoever has locked one looks whether it still has
the name, and begins anew if not. While it is locked and has the name, nobody else may rename over it, so of
two processes that find the lock of a dead one exactly one replaces it; the other then finds the new one.
Without system locks the same is reached by a second lock, called after the dead one's token.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import stat
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from structprune.checkpoint.aside import Aside
from structprune.checkpoint.beside import LOCK, beside, find_beside
from structprune.checkpoint.holder import may_live, this_process
from structprune.checkpoint.lock_file import HEAD, MOST_BYTES, LockFile, lock_file, parse
from structprune.errors import EnvironmentFailure
from structprune.storage.durable import blame, sync_folder

logger = logging.getLogger(__name__)

_TEMPORARY = r"\.lock-[0-9a-f]{16}"
_FOLDER_HAS_NO_LINKS = (
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
)


class Lock:
    """Hold `OUT.lock` while the `with` block runs.

    Args:
        output: The output folder that is protected; neither it nor its parent need exist.
        replacing: Token of a lock of a dead process; then this one is the right to replace that.

    Attributes:
        journal: What is set aside beside the output; of a killed run, too, whose lock was taken over.

    Raises:
        EnvironmentFailure: Another run holds the lock, the file is none of ours, or it cannot be written.
    """

    def __init__(self, output: Path, *, replacing: str = "") -> None:
        # Not the dead one's token itself, which its own leftovers may be called after.
        right = f"-{hashlib.sha256(replacing.encode()).hexdigest()[:16]}" if replacing else ""
        self.path = beside(output, LOCK + right)
        self.journal: tuple[Aside, ...] = ()
        self._output = output
        self._replacing = replacing
        self._token = secrets.token_hex(8)
        self._descriptor = -1

    def __enter__(self) -> Self:
        with blame(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                while not self._take():
                    pass
                if not self._replacing:
                    _remove_leftovers(self._output)
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._leave()
        except (OSError, EnvironmentFailure) as failure:
            # Once this process has ended the file is stale anyway.
            logger.warning("%s: the lock stays: %s", self.path, failure)

    def note(self, *journal: Aside) -> None:
        """Make durable what is about to be set aside, before it is; nothing, once all is where it belongs.

        Raises:
            EnvironmentFailure: It cannot be written; the former journal stands.
        """
        before, self.journal = self.journal, journal
        try:
            with blame(self.path):
                while not self._replace():
                    pass
        except BaseException:
            self.journal = before
            raise

    def _take(self) -> bool:
        """Take the lock; return False where it changed hands meanwhile: look anew."""
        if self._create():
            return True
        with LockFile(self.path) as found:
            if not found.has_its_name():
                return False
            if found.locked is False or _may_live(found):
                raise self._held_by(found.content)
            logger.info("%s: taking over from process %s, which is gone", self.path, found.content.get("pid"))
            with self._right_to_replace(found):
                if not found.has_its_name():
                    return False
                self.journal = found.journal
                return self._replace()

    def _right_to_replace(self, found: LockFile) -> AbstractContextManager[object]:
        if found.locked:
            return nullcontext()
        return Lock(self._output, replacing=found.token)

    def _create(self) -> bool:
        """Give the lock its name, which only one process can; return whether it was this one."""
        temporary, descriptor = self._write_temporary()
        named = False
        try:
            named = _link(temporary, self.path, descriptor)
        except FileNotFoundError:
            pass  # Another run took the file, not yet whole, for a leftover.
        except OSError as error:
            if error.errno not in _FOLDER_HAS_NO_LINKS:
                raise
            os.close(descriptor)
            descriptor = -1
            # Without links the name is there before the content. Whoever reads it in between refuses.
            with suppress(FileExistsError):
                descriptor = self._write(self.path)
                named = True
        finally:
            temporary.unlink(missing_ok=True)
            if not named and descriptor >= 0:
                os.close(descriptor)
        if named:
            self._hold(descriptor)
        return named

    def _replace(self, **more: object) -> bool:
        """Rename a new file over the one that this process alone may replace; False: write it again."""
        temporary, descriptor = self._write_temporary(**more)
        try:
            temporary.replace(self.path)
        except FileNotFoundError:
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        self._hold(descriptor)
        return True

    def _hold(self, descriptor: int) -> None:
        # The new file is locked already, so there is no moment without a lock.
        former, self._descriptor = self._descriptor, descriptor
        if former >= 0:
            os.close(former)
        sync_folder(self.path.parent)

    def _write_temporary(self, **more: object) -> tuple[Path, int]:
        temporary = beside(self._output, f"{LOCK}-{secrets.token_hex(8)}")
        return temporary, self._write(temporary, **more)

    def _write(self, path: Path, **more: object) -> int:
        """Write the content to a new file and return its descriptor, locked."""
        content = {"structprune": "lock", "token": self._token, **this_process(), **more}
        content["journal"] = [entry.as_json() for entry in self.journal]
        data = memoryview(json.dumps(content).encode())
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            lock_file(descriptor)
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return descriptor

    def _leave(self) -> None:
        """Remove the lock where it is this one's; with a journal it stays, for the next run to settle."""
        try:
            with LockFile(self.path, lock=False) as found:
                if not found.there or found.token != self._token:
                    return
            if self.journal:
                while not self._replace(released=True):
                    pass
            else:
                self.path.unlink(missing_ok=True)
        finally:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def _held_by(self, holder: dict[str, Any]) -> EnvironmentFailure:
        who = f"pid {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"
        return EnvironmentFailure(
            f"{self.path}: locked by {who}",
            hint="wait for that run; delete the lock file only if you know that it is gone",
        )


def _may_live(found: LockFile) -> bool:
    if found.torn:
        # Only where folders have no links is a lock seen before it is whole; its writer has locked it.
        return not found.locked
    return may_live(found.content, free=found.locked is True)


def _link(temporary: Path, path: Path, descriptor: int) -> bool:
    try:
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError:
        # A network disk may answer so to its own second try of a link that the first one made.
        with suppress(FileNotFoundError):
            return os.path.samestat(path.lstat(), os.fstat(descriptor))
        return False
    return True


def _remove_leftovers(output: Path) -> None:
    """Remove what processes that were killed while they wrote or replaced a lock left.

    What a living process is about to name is known by its content; if it is not whole yet, it is written
    again. The right to replace a lock may go, too: the lock is held by now, so nobody replaces that one.
    """
    for path in find_beside(output, _TEMPORARY):
        with suppress(OSError):
            if not stat.S_ISREG(path.lstat().st_mode) or path.lstat().st_size > MOST_BYTES:
                continue
            data = path.read_bytes()
            if data[: len(HEAD)] != HEAD[: len(data)]:
                continue
            whole = parse(data, path) if data.startswith(HEAD) else {}
            if not whole or not may_live(whole, free=False):
                path.unlink()
