"""Writes a pruned folder from its source: tensor by tensor, shard by shard, everything else byte for byte."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from structprune.checkpoint.side_files import copy_side_files
from structprune.models import edit, factored
from structprune.plan.plan import Plan
from structprune.progress import Progress
from structprune.storage.reader import CheckpointReader
from structprune.storage.tensor_file import Entry
from structprune.storage.writer import ShardWriter


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
    layout = {file: list(_entries(entries, plans)) for file, entries in reader.layout.items()}
    with ShardWriter(folder, layout, reader.metadata, index_metadata=reader.index_metadata) as writer:
        for name in (name for names in reader.shards.values() for name in names):
            value = replaced[name] if replaced and name in replaced else reader.read(name)
            edited = {name: value}
            for plan in plans:
                edited = {
                    part: new
                    for one, before in edited.items()
                    for part, new in edit.parts(one, before, plan).items()
                }
            for part, new in edited.items():
                writer.write(part, new)
            done += 1
            progress("write", done, total)
    return writer.hashes | copy_side_files(reader.folder, folder)


def _entries(entries: Iterable[Entry], plans: Sequence[Plan]) -> Iterator[Entry]:
    """Yield what a file will hold in the place of the source's tensors."""
    for name, dtype, shape in entries:
        product = next((found for plan in plans if (found := factored.in_plan(name, plan)) is not None), None)
        if product is None:
            yield name, dtype, shape
        else:
            for part, stored in factored.part_names(name).items():
                yield stored, dtype, tuple(product[part].shape)
