"""Writes a pruned folder from its source: tensor by tensor, shard by shard, everything else byte for byte."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from structprune.models import edit
from structprune.plan import Plan
from structprune.storage.reader import CheckpointReader
from structprune.storage.side_files import copy_side_files
from structprune.storage.writer import ShardWriter

# Told how far a stage is: (stage, done, total).
Progress = Callable[[str, int, int], None]


def export(
    reader: CheckpointReader,
    folder: Path,
    plans: Sequence[Plan],
    progress: Progress,
    replaced: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write the source's files into `folder` with the plans carried out; one tensor is in memory at a time.

    Args:
        reader: The source, never written to.
        folder: An existing folder that will be published later.
        plans: Carried out in order.
        progress: Told after every tensor.
        replaced: New values of stored tensors (same shape and dtype), before the plans are carried out again.

    Returns:
        The sha256 of each written file, by file name.
    """
    total = len(reader.tensors)
    done = 0
    with ShardWriter(folder, reader.layout, reader.metadata, index_metadata=reader.index_metadata) as writer:
        for name in (name for names in reader.shards.values() for name in names):
            value = replaced[name] if replaced and name in replaced else reader.read(name)
            for plan in plans:
                value = edit.stored(name, value, plan)
            writer.write(name, value)
            done += 1
            progress("write", done, total)
    return writer.hashes | copy_side_files(reader.folder, folder)
