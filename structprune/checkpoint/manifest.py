"""structprune.json: the hash of every file of a folder of ours, written last: the sign of completeness."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from structprune.checkpoint.adapter import CONFIG_FILE as ADAPTER_CONFIG
from structprune.checkpoint.adapter import TENSOR_FILE as ADAPTER_TENSORS
from structprune.errors import InputError
from structprune.plan.block import canonical
from structprune.storage.durable import DurableFile, sync_folder
from structprune.storage.reference import REFERENCE, read_reference
from structprune.storage.safe_open import hash_file
from structprune.storage.scan import combine
from structprune.storage.strict_json import read_json
from structprune.storage.tensor_file import Entry

logger = logging.getLogger(__name__)

MANIFEST = "structprune.json"
OURS = "structprune"
"""Folder beside the weights with recipe, plans and report."""
RECIPE_FILE = f"{OURS}/recipe.yaml"
"""What a run was asked to do, as it was asked."""
RUN_PLACES = f"{OURS}/run.json"
"""Where a run found the files that its recipe names: elsewhere on every machine, so no manifest lists it."""

# A tensor takes about 130 bytes, a file 150: room for a million of them, as many as an index may name.
MAX_MANIFEST_BYTES = 256_000_000


class FileHash(BaseModel):
    """Size and sha256 of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """Content of structprune.json.

    Attributes:
        format: Version of this layout; 1 had neither `weights`, `tensors` nor `seal`.
        version: The structprune that wrote the folder.
        files: Path relative to the folder, with slashes -> size and hash, of every file but the manifest.
        stages: Folders of the plans under `structprune/`, in the order in which they were applied.
        facts: What the writer wants to find again (method, sparsity, hash of the source ...).
        weights: The hash that a scan of the folder's weights gives; None where it holds no model.
        tensors: Stored tensor -> sha256 of its bytes.
        seal: Hash of all this but `files`: those answer for their entries, and a user who changes a file on
            purpose takes its entry out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1, 2] = 2
    version: str
    files: dict[str, FileHash]
    stages: list[str] = []
    facts: dict[str, Any] = {}
    weights: str | None = None
    tensors: dict[str, str] = {}
    seal: str = ""

    def sealed(self) -> "Manifest":
        """Return the same content with its seal."""
        text = canonical(self.model_dump(exclude={"files", "seal"}))
        return self.model_copy(update={"seal": hashlib.sha256(text.encode()).hexdigest()})


def write_manifest(
    folder: Path,
    hashes_known: Mapping[str, str],
    digests: Mapping[Entry, str] = MappingProxyType({}),
    *,
    version: str,
    stages: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Hash and list every file in the folder, then write the manifest: from here on the folder is complete.

    Args:
        folder: The finished folder; nothing is written to it afterwards.
        hashes_known: Relative path -> sha256 of files that were hashed while they were written.
        digests: sha256 of the bytes of every stored tensor, where the folder holds a model.
        version: The running structprune.
        stages: See `Manifest`.
        facts: See `Manifest`; JSON values only.

    Raises:
        EnvironmentFailure: A file cannot be read, or the manifest cannot be written.
        InputError: The folder holds a pipe or another irregular file.
    """
    files: dict[str, FileHash] = {}
    for name in list_files(folder):
        if name == RUN_PLACES:
            continue
        sha256 = hashes_known.get(name) or hash_file(folder / name)
        files[name] = FileHash(bytes=(folder / name).stat().st_size, sha256=sha256)
    manifest = Manifest(
        version=version,
        files=files,
        stages=list(stages),
        facts=dict(facts or {}),
        weights=combine(digests) if digests else None,
        tensors={
            name: digests[name, dtype, shape] for name, dtype, shape in sorted(digests, key=itemgetter(0))
        },
    ).sealed()
    for inner in sorted({(folder / name).parent for name in files}):
        sync_folder(inner)
    with DurableFile(folder / MANIFEST) as file:
        file.write((json.dumps(manifest.model_dump(), indent=2, allow_nan=False) + "\n").encode())
    return manifest


def read_manifest(folder: Path, *, allow_external_symlinks: bool = False) -> Manifest | None:
    """Return the manifest of a folder of ours; None where there is none: not ours, or never completed.

    Args:
        folder: The folder.
        allow_external_symlinks: Accept a link that leads out of it.

    Raises:
        InputError: There is one, but it is damaged or of a later structprune.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    root = None if allow_external_symlinks else folder
    try:
        manifest = Manifest.model_validate(read_json(path, limit_bytes=MAX_MANIFEST_BYTES, root=root))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {place}: {first['msg']}",
            hint="written by another version, or damaged: create it again",
        ) from None
    if manifest.format > 1 and manifest.seal != manifest.sealed().seal:
        raise InputError(
            f"{path}: its content does not match its seal: it was changed or damaged",
            hint="fetch the file again, or run the command that wrote the folder again",
        )
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise InputError(
                f"{path}: files: {name[:80]!r} leads out of the folder", hint="do not trust this model"
            )
    return manifest


def check_manifest(folder: Path, *, allow_external_symlinks: bool = False) -> list[str]:
    """Compare a folder of ours with its manifest; read every byte.

    Files that came later (a user's notes, evaluation results) are no problem and only logged, unless they
    change what is loaded: weights, an index, an adapter.

    Args:
        folder: The folder.
        allow_external_symlinks: Accept links that lead out of it.

    Returns:
        One line per problem; empty when all is as it was written.

    Raises:
        InputError: The manifest itself is damaged.
        EnvironmentFailure: A file cannot be read.
    """
    manifest = read_manifest(folder, allow_external_symlinks=allow_external_symlinks)
    root = None if allow_external_symlinks else folder
    if manifest is None:
        return [f"{folder / MANIFEST} is missing: the folder was never completed, or is not ours"]
    problems = [
        problem for name in manifest.files if (problem := compare(folder, name, manifest.files[name], root))
    ]
    for name in list_files(folder):
        if name in manifest.files or name == RUN_PLACES:
            continue
        if changes_weights(name, manifest):
            problems.append(f"{name} was added: it changes what is loaded")
        elif not name.startswith("."):
            logger.warning("%s: %s was added after the folder was completed", folder, name)
    reference = read_reference(folder, root)
    if reference is not None and (problem := reference.changed(whole=True)):
        problems.append(f"{REFERENCE}: {problem}")
    return problems


def changes_weights(name: str, manifest: Manifest) -> bool:
    """Tell whether a file changes which weights are loaded from a folder that was written without it."""
    if name == ADAPTER_CONFIG:
        # Of an adapter it was written, and a user who moved the base took its entry out.
        return ADAPTER_TENSORS not in manifest.files
    return name not in manifest.files and name.endswith((".safetensors", ".safetensors.index.json"))


def compare(
    folder: Path, name: str, written: FileHash, root: Path | None, *, sizes_only: bool = False
) -> str:
    """Return how a file differs from what was written; "" where it does not.

    Args:
        folder: The folder.
        name: The file, relative to it.
        written: What its manifest says.
        root: See `safe_open.check_link`.
        sizes_only: Do not read the file.
    """
    path = folder / name
    if not path.exists():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != written.bytes:
        return f"{name} has {size} bytes, {written.bytes} were written"
    if sizes_only or (found := hash_file(path, root)) == written.sha256:
        return ""
    return f"{name} was changed: sha256 {found[:16]}, written {written.sha256[:16]}"


def list_files(folder: Path) -> list[str]:
    """Return the paths of all files in and under a folder, relative, sorted, without the manifest."""
    found = [path.relative_to(folder).as_posix() for path in _walk(folder)]
    return sorted(name for name in found if name != MANIFEST)


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        # Links to folders are not followed: they could lead in a circle.
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path
