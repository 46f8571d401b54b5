"""A folder without weights of its own, which says in which files of another folder they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from structprune.errors import InputError
from structprune.storage.durable import DurableFile, blame
from structprune.storage.safe_open import hash_file
from structprune.storage.strict_json import read_json

REFERENCE = "structprune/weights.json"
"""Only structprune looks for it; other loaders find no weights, and stop."""
# The largest public index names fewer than a thousand files, of which each takes about 200 bytes here.
_LIMIT = 2**22

_FileName = Annotated[
    str, Field(pattern=r"^[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*\.safetensors$", max_length=255)
]


class ReferredFile(BaseModel):
    """One weight file.

    Attributes:
        bytes: Its size.
        mtime_ns: When it was last written to, as its file system says.
        sha256: Hash of its bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    mtime_ns: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Reference(BaseModel):
    """Where the weights of a folder are.

    Attributes:
        format: Version of this layout.
        folder: The other folder, its whole path.
        files: Name -> what the file was when it was referred to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    folder: str = Field(pattern=r"^/[^\x00]*$")
    files: dict[_FileName, ReferredFile] = Field(min_length=1)

    @property
    def base(self) -> Path:
        """Return the other folder."""
        return Path(self.folder)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weight files together."""
        return sum(file.bytes for file in self.files.values())

    def changed(self, *, whole: bool = False) -> str:
        """Return how the files are no longer what was referred to; "" where they are.

        Size and time of change are looked at first: of a file whose time is another, all bytes are read.

        Args:
            whole: Read all bytes anyway: an edit may leave size and time as they were.

        Raises:
            EnvironmentFailure: A file may not be read, or the disk fails.
        """
        for name, known in self.files.items():
            path = self.base / name
            expected = f"expected {known.bytes} bytes with sha256 {known.sha256[:16]}"
            if not path.is_file():
                return f"{path} is not there, {expected}"
            status = path.stat()
            if status.st_size != known.bytes:
                return f"{path} was changed: it has {status.st_size} bytes, {expected}"
            if (whole or status.st_mtime_ns != known.mtime_ns) and (found := hash_file(path)) != known.sha256:
                return f"{path} was changed: its sha256 is {found[:16]}, {expected}"
        return ""


def write_reference(folder: Path, base: Path, files: Mapping[str, ReferredFile]) -> str:
    """Write where the weights of a folder are; return the sha256 of what was written.

    Args:
        folder: The folder under work.
        base: The folder of the weights.
        files: Its weight files.

    Raises:
        EnvironmentFailure: The disk is full or refuses.
    """
    reference = Reference(folder=str(base.resolve()), files=dict(files))
    path = folder / REFERENCE
    with blame(path):
        path.parent.mkdir(exist_ok=True)
    with DurableFile(path) as file:
        file.write((json.dumps(reference.model_dump(), indent=2) + "\n").encode())
    return file.sha256


def read_reference(folder: Path, root: Path | None = None) -> Reference | None:
    """Return where the weights of a folder are; None where it refers to no other.

    Args:
        folder: Any model folder.
        root: See `safe_open.check_link`.

    Raises:
        InputError: It does, but what it says is damaged.
    """
    path = folder / REFERENCE
    if not path.exists():
        return None
    try:
        return Reference.model_validate(read_json(path, limit_bytes=_LIMIT, root=root))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {place}: {first['msg']}", hint="run the command that wrote the folder again"
        ) from None


def check_reference(folder: Path, reference: Reference) -> None:
    """Check that the weights that a folder refers to are there, and are those that it was made from.

    Raises:
        InputError: They are not.
    """
    if problem := reference.changed():
        raise InputError(
            f"{folder}: holds no weights of its own: {problem}",
            hint="put that file back; or, where the model is elsewhere now, write the folder anew: "
            f"structprune apply MODEL NEW --plan {folder}",
        )
