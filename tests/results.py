"""Results written the way a run writes them, without a model that computes anything."""

from pathlib import Path

from structprune.checkpoint.beside import partial_of
from structprune.checkpoint.lock import Lock
from structprune.checkpoint.manifest import check_manifest, read_manifest, write_manifest
from structprune.checkpoint.partial import FINGERPRINT
from structprune.checkpoint.publishing import discard, publish, settle
from structprune.checkpoint.side_files import copy_side_files
from structprune.storage.reader import CheckpointReader
from structprune.storage.writer import ShardWriter

PRINT = "0123456789abcdef0123"


def begin(final: Path, print_: str = PRINT) -> Path:
    """Make the folder of a run with this fingerprint."""
    fresh = partial_of(final, print_)
    (fresh / FINGERPRINT).parent.mkdir(parents=True)
    (fresh / FINGERPRINT).write_text("{}")
    return fresh


def build(source: Path, final: Path) -> None:
    """Write a whole result the way a run does: lock, partial folder, manifest last, rename."""
    with Lock(final) as lock:
        settle(final, lock)
        discard(partial_of(final, PRINT), lock)
        fresh = begin(final)
        reader = CheckpointReader(source)
        hashes = copy_side_files(source, fresh)
        with ShardWriter(
            fresh, reader.layout, reader.metadata, index_metadata=reader.index_metadata
        ) as writer:
            for name in reader.tensors:
                writer.write(name, reader.read(name))
        write_manifest(
            fresh, hashes | writer.hashes, {}, version="1", stages=["01-wanda"], facts={"of": source.name}
        )
        publish(fresh, final, lock, overwrite=True)


def start(final: Path) -> None:
    """Begin a run, which settles what a killed one left."""
    with Lock(final) as lock:
        settle(final, lock)


def content_of(final: Path) -> str:
    """Which source a complete result came from; empty where there is no result."""
    manifest = read_manifest(final)
    if manifest is None:
        assert not final.exists()
        return ""
    assert check_manifest(final) == []
    return str(manifest.facts["of"])
