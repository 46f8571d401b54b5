"""Writes a model folder: weights tensor by tensor, shard by shard, everything else byte for byte.

A weight file of which nothing changes is not written anew: see `Writing.unchanged`.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from structprune.checkpoint.modelling import write_config
from structprune.checkpoint.side_files import copy_side_files, copy_tokenizer
from structprune.checkpoint.writing import Unchanged
from structprune.models.edited_reader import Reader
from structprune.models.tokenizer import has_tokenizer
from structprune.progress import Progress
from structprune.storage.reference import REFERENCE, ReferredFile, write_reference
from structprune.storage.tensor_file import Entry
from structprune.storage.unchanged import StoredFile, read_hashes
from structprune.storage.writer import ShardWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        hashes: sha256 of each file, by file name.
        digests: sha256 of the bytes of each stored tensor.
        weights: Bytes of the weight files by how they came there: "written" anew, "copied", "reflinked",
            "linked" or "referred" to.
    """

    hashes: dict[str, str]
    digests: dict[Entry, str]
    weights: dict[str, int]


def export(
    reader: Reader,
    folder: Path,
    progress: Progress,
    replaced: Mapping[str, Tensor] | None = None,
    tokenizer: str | None = None,
    unchanged: Unchanged = "copy",
) -> Exported:
    """Write a checkpoint, and what is carried out on it, into `folder`; one tensor is in memory at a time.

    Args:
        reader: What is written; its files are never written to.
        folder: An existing folder that will be published later.
        progress: Told after every tensor.
        replaced: New values of stored tensors, of the same shape and dtype.
        tokenizer: The folder of a tokenizer, which is copied where the checkpoint has none.
        unchanged: What becomes of a weight file of which nothing changes: all of them, where it is "refer".

    Raises:
        EnvironmentFailure: The disk is full or refuses; or there can be no link.
        InputError: A file of the source was changed since it was opened.
    """
    given = replaced or {}
    kept = {
        file: stored
        for file, names in reader.shards.items()
        if given.keys().isdisjoint(names) and (stored := reader.stored_file(file)) is not None
    }
    if unchanged == "refer":
        assert kept.keys() == reader.shards.keys(), "whoever refers changes no weight"
        written = _refer(kept, folder, progress)
    else:
        written = _write(reader, folder, progress, given, kept, link=unchanged == "link")
    if written.weights.get("linked"):
        logger.warning(
            "%s: weight files are hard links: an edit of one would change %s too", folder, reader.folder
        )
    links = reader.root is None
    hashes = written.hashes | copy_side_files(reader.folder, folder, allow_external_symlinks=links)
    if tokenizer is not None and not has_tokenizer(reader.folder):
        hashes |= copy_tokenizer(Path(tokenizer).expanduser(), folder, allow_external_symlinks=links)
    return Exported(hashes | write_config(folder, reader.patch), written.digests, written.weights)


def _write(
    reader: Reader,
    folder: Path,
    progress: Progress,
    given: Mapping[str, Tensor],
    kept: Mapping[str, StoredFile],
    *,
    link: bool,
) -> Exported:
    total, done = len(reader.tensors), 0
    weights: Counter[str] = Counter()
    with ShardWriter(folder, reader.layout, reader.metadata, index_metadata=reader.index_metadata) as writer:
        for file, names in reader.shards.items():
            if file in kept:
                way = writer.place(file, kept[file], link=link)
                done += len(names)
                progress(f"{way} weights", done, total)
                weights[way] += kept[file].nbytes
                continue
            for name in names:
                writer.write(name, given[name] if name in given else reader.read(name))
                done += 1
                progress("write", done, total)
            weights["written"] += (folder / file).stat().st_size if names else 0
    return Exported(writer.hashes, writer.digests, dict(weights))


def _refer(kept: Mapping[str, StoredFile], folder: Path, progress: Progress) -> Exported:
    digests: dict[Entry, str] = {}
    files = {}
    for done, (file, stored) in enumerate(kept.items(), start=1):
        sha256, found = read_hashes(stored)
        digests |= found
        size, changed, _ = stored.header.stamp
        files[file] = ReferredFile(bytes=size, mtime_ns=changed, sha256=sha256)
        progress("refer to weights", done, len(kept))
    (base,) = {stored.path.parent for stored in kept.values()}
    written = write_reference(folder, base, files)
    return Exported({REFERENCE: written}, digests, {"referred": sum(file.bytes for file in files.values())})
