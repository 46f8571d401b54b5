"""Whether the bytes of a folder are still those that were written: every file, and every stored tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from structprune.checkpoint.integrity import changed_tensors
from structprune.checkpoint.manifest import MANIFEST, Manifest, check_manifest, read_manifest
from structprune.errors import InputError
from structprune.proof.verification import Verification
from structprune.storage.reader import StoredTensors
from structprune.storage.scan import combine
from structprune.storage.tensor_file import Entry


@dataclass(frozen=True)
class WrittenTensors:
    """What is known of the weights from when they were written.

    Args:
        weights: The hash of all of them; None where nothing is known.
        tensors: Name -> sha256 of the bytes.
    """

    weights: str | None
    tensors: Mapping[str, str]

    @classmethod
    def of_run(cls, digests: Mapping[Entry, str]) -> "WrittenTensors":
        """Return what a run that just wrote them knows."""
        known = {name: digest for (name, _, _), digest in digests.items()}
        return cls(combine(digests) if digests else None, known)

    @classmethod
    def of_manifest(cls, manifest: Manifest | None) -> "WrittenTensors":
        """Return what the manifest beside them says."""
        return cls(manifest.weights, manifest.tensors) if manifest else cls(None, {})

    def check(self, result: Verification, reader: StoredTensors, found: Mapping[str, str]) -> None:
        """Add a row, where something is known: whether every tensor has the bytes that were written."""
        if self.weights is None:
            return
        problems = changed_tensors(self.weights, self.tensors, reader, found)
        result.row("written", problems, f"{len(found)} tensors have the sha256 that they were written with")


def check_files(result: Verification, folder: Path, *, ours: bool, links: bool) -> Manifest | None:
    """Add a row on a folder's manifest and its files, and return the manifest where it can be read.

    Args:
        result: Gets the row.
        folder: The folder.
        ours: Whether it ought to have a manifest.
        links: Whether links may lead out of it.
    """
    if not ours:
        result.row("manifest", [], f"not written by structprune (no {MANIFEST}); measured only")
        return None
    try:
        manifest = read_manifest(folder, allow_external_symlinks=links)
    except InputError as error:
        result.row("manifest", [str(error)], "")
        return None
    if manifest is None:
        result.row("manifest", [f"{folder}: no {MANIFEST}; the folder is incomplete"], "")
        return None
    problems = check_manifest(folder, allow_external_symlinks=links)
    result.row("manifest", problems, f"{len(manifest.files)} files have the size and sha256 of {MANIFEST}")
    return manifest
