"""Writing the weight files of a model as a stream: header first, then one tensor after the other."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from structprune.errors import counted
from structprune.storage.durable import DurableFile, sync_folder
from structprune.storage.tensor_file import Entry, bytes_of, encode_header, nbytes_of
from structprune.storage.unchanged import StoredFile, Way, place_file
from structprune.storage.weight_files import INDEX


class ShardWriter:
    """Write safetensors files of known layout; only the tensor at hand is in memory.

    Each file appears under its name when its last tensor is written and flushed. Several files may be under
    way at once. Leaving the `with` block by an exception removes the unfinished ones.

    Args:
        folder: An existing folder.
        layout: File -> (name, dtype, shape) of its tensors, in the order in which they will come.
        metadata: File -> its notes (safetensors `__metadata__`); "format": "pt" where a file has none.
        index_metadata: `metadata` of the source's index; None where the source has none. An index is written
            when this is given or there are several files.

    Attributes:
        hashes: Finished file -> sha256.
        digests: Written tensor -> sha256 of its bytes.

    Raises:
        EnvironmentFailure: The disk is full or refuses.
    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, Sequence[Entry]],
        metadata: Mapping[str, Mapping[str, str]],
        *,
        index_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.hashes: dict[str, str] = {}
        self.digests: dict[Entry, str] = {}
        self._layout = layout
        self._metadata = metadata
        self._index_metadata = index_metadata
        self._file_of = {entry[0]: file for file, entries in layout.items() for entry in entries}
        self._open: dict[str, tuple[DurableFile, Iterator[Entry]]] = {}
        if len(self._file_of) != sum(len(entries) for entries in layout.values()):
            raise ValueError("a tensor name appears twice in the layout")

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor to its file.

        Args:
            name: A name of the layout; inside one file they come in the order of the layout.
            tensor: Of the dtype and shape that the layout says.

        Raises:
            ValueError: Not the tensor that the layout says.
            StructpruneError: The tensor is on the meta device.
            EnvironmentFailure: The disk is full or refuses.
        """
        file = self._file_of[name]
        if file not in self._open:
            if file in self.hashes:
                raise ValueError(f"{file} is already complete, tensor {name!r} came twice")
            self._start(file)
        output, entries = self._open[file]
        entry = next(entries)
        if entry != (name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{file}: expected {entry}, got {(name, tensor.dtype, tuple(tensor.shape))}")
        raw = bytes_of(tensor, name)
        output.write(raw)
        self.digests[entry] = hashlib.sha256(raw).hexdigest()
        if name == self._layout[file][-1][0]:
            self._finish(file)

    def place(self, file: str, stored: StoredFile, *, link: bool = False) -> Way:
        """Put a file of the source, of which nothing is changed, in the place of one of the layout.

        Args:
            file: A file of the layout, of which no tensor was written.
            stored: What holds its tensors; it is never written to.
            link: See `place_file`, as for all errors.

        Returns:
            How it came there.
        """
        placed = place_file(stored, self.folder / file, link=link)
        if list(placed.digests) != [(name, dtype, tuple(shape)) for name, dtype, shape in self._layout[file]]:
            raise ValueError(f"{stored.path} does not hold the tensors of {file}")
        self.hashes[file] = placed.sha256
        self.digests |= placed.digests
        return placed.way

    def close(self) -> None:
        """Check that everything was written, then write the index and flush the folder.

        Raises:
            ValueError: Tensors are missing.
            EnvironmentFailure: The disk is full or refuses.
        """
        for file in self._layout:
            if not self._layout[file] and file not in self.hashes:
                self._start(file)
                self._finish(file)
        missing = [name for name, file in self._file_of.items() if file not in self.hashes]
        if missing:
            raise ValueError(
                f"{counted(len(missing), 'tensor')} not written, the first is in the file of {missing[0]!r}"
            )
        if len(self._layout) > 1 or self._index_metadata is not None:
            with DurableFile(self.folder / INDEX) as index:
                index.write(self._index())
            self.hashes[INDEX] = index.sha256
        sync_folder(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            for output, _ in self._open.values():
                output.close(keep=False)
            self._open.clear()

    def _start(self, file: str) -> None:
        output = DurableFile(self.folder / file)
        self._open[file] = output, iter(self._layout[file])
        output.write(encode_header(self._layout[file], self._metadata.get(file) or {"format": "pt"}))

    def _finish(self, file: str) -> None:
        output, _ = self._open.pop(file)
        output.close(keep=True)
        self.hashes[file] = output.sha256

    def _index(self) -> bytes:
        """Return the index as transformers writes it; figures that the source's index lacks stay out."""
        entries = [entry for file in self._layout.values() for entry in file]
        metadata = dict(self._index_metadata or {})
        metadata["total_size"] = sum(nbytes_of(dtype, shape) for _, dtype, shape in entries)
        if "total_parameters" in metadata or self._index_metadata is None:
            metadata["total_parameters"] = sum(prod(shape) for _, _, shape in entries)
        content = {"metadata": metadata, "weight_map": self._file_of}
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
