"""Writes a model folder: weights tensor by tensor, shard by shard, everything else byte for byte."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from structprune.checkpoint.modelling import write_config
from structprune.checkpoint.side_files import copy_side_files, copy_tokenizer
from structprune.models.edited_reader import Reader
from structprune.models.tokenizer import has_tokenizer
from structprune.progress import Progress
from structprune.storage.tensor_file import Entry
from structprune.storage.writer import ShardWriter


def export(
    reader: Reader,
    folder: Path,
    progress: Progress,
    replaced: Mapping[str, Tensor] | None = None,
    tokenizer: str | None = None,
) -> tuple[dict[str, str], dict[Entry, str]]:
    """Write a checkpoint, and what is carried out on it, into `folder`; one tensor is in memory at a time.

    Args:
        reader: What is written; its files are never written to.
        folder: An existing folder that will be published later.
        progress: Told after every tensor.
        replaced: New values of stored tensors, of the same shape and dtype.
        tokenizer: The folder of a tokenizer, which is copied where the checkpoint has none.

    Returns:
        The sha256 of each written file, by file name, and of the bytes of each written tensor.
    """
    given = replaced or {}
    total, done = len(reader.tensors), 0
    with ShardWriter(folder, reader.layout, reader.metadata, index_metadata=reader.index_metadata) as writer:
        for name in (name for names in reader.shards.values() for name in names):
            writer.write(name, given[name] if name in given else reader.read(name))
            done += 1
            progress("write", done, total)
    links = reader.root is None
    hashes = writer.hashes | copy_side_files(reader.folder, folder, allow_external_symlinks=links)
    if tokenizer is not None and not has_tokenizer(reader.folder):
        hashes |= copy_tokenizer(Path(tokenizer).expanduser(), folder, allow_external_symlinks=links)
    return hashes | write_config(folder, reader.patch), writer.digests
