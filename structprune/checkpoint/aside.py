"""What a run sets aside: entries of its journal, by which the next run knows these folders and no others."""

import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from structprune.checkpoint.holder import boot

_NAME = re.compile(r"[^/]+\.(old-\d{4,}|partial-[0-9a-f]{16})")


@dataclass(frozen=True)
class Aside:
    """A folder beside the output that a run is about to rename or to remove.

    A name alone proves nothing: it may be the user's. The folder is known by its inode, which renaming keeps.

    Attributes:
        name: What it is called beside the output, from the rename on.
        device: st_dev.
        inode: st_ino.
        boot: During which start of the machine this was written.
        successor: Inode of the folder that takes its place; None for what is only to be removed.
    """

    name: str
    device: int
    inode: int
    boot: str
    successor: int | None = None

    @classmethod
    def of(cls, folder: Path, name: str, successor: Path | None = None) -> Self:
        """Return the entry of a folder that is to be called `name`."""
        status = folder.lstat()
        return cls(
            name, status.st_dev, status.st_ino, boot(), None if successor is None else successor.stat().st_ino
        )

    @classmethod
    def parse(cls, raw: Any) -> Self | None:
        """Return the entry that JSON holds; None where it is none of ours, or would lead elsewhere."""
        try:
            entry = cls(**raw)
        except TypeError:
            return None
        numbers = (entry.device, entry.inode, entry.successor or 0)
        sound = all(isinstance(one, int) for one in numbers) and isinstance(entry.name, str)
        return entry if sound and _NAME.fullmatch(entry.name) else None

    def as_json(self) -> Mapping[str, Any]:
        """Return the entry as JSON values."""
        return asdict(self)

    def is_at(self, folder: Path) -> bool:
        """Tell whether this very folder stands there."""
        try:
            status, parent = folder.lstat(), folder.parent.stat()
        except FileNotFoundError:
            return False
        # The numbers of disks may be dealt anew when the machine starts; a rename never leaves its disk.
        known = {self.device} if self.boot == boot() else {self.device, parent.st_dev}
        return stat.S_ISDIR(status.st_mode) and status.st_ino == self.inode and status.st_dev in known

    def is_succeeded_by(self, final: Path) -> bool:
        """Tell whether the output is the folder that was to take this one's place."""
        return final.exists() and final.stat().st_ino == self.successor
