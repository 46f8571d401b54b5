"""A packed folder is itself a checkpoint: this reads its tensors dense, one at a time, and writes nothing."""

from pathlib import Path

from torch import Tensor

from structprune.checkpoint.packed import header_of, read_packing
from structprune.errors import InputError
from structprune.storage.header import TensorInfo
from structprune.storage.reader import StoredTensors
from structprune.storage.stored_config import read_config
from structprune.storage.tensor_file import nbytes_of, read_tensor


class PackedReader(StoredTensors):
    """The dense tensors of a packed folder.

    Args:
        folder: The packed folder.
        root: See `safe_open.check_link`.

    Attributes:
        packing: How the tensors are packed.
        tensors: Name -> the packed file, dense dtype and dense shape; the byte ranges are those of no file.
        shards: Packed file -> the names of its tensors, in order.

    Raises:
        InputError: The packing is damaged, or does not fit the packed files.
    """

    def __init__(self, folder: Path, root: Path | None) -> None:
        self.folder = folder
        self.root = root
        self.packing = read_packing(folder, root)
        self.config = read_config(folder / "config.json", root)
        self.patch = {}
        self.index_metadata = None
        self.metadata = {file.packed: file.metadata for file in self.packing.files}
        self.tensors = {}
        self.shards = {}
        self._forms = {form.name: form for form in self.packing.forms}
        self._headers = {file.packed: header_of(folder, file, root) for file in self.packing.files}
        for file in self.packing.files:
            self.shards[file.packed] = tuple(form.name for form in file.tensors)
            for name, dtype, shape in file.entries:
                self.tensors[name] = TensorInfo(name, dtype, shape, file.packed, 0, nbytes_of(dtype, shape))

    def read(self, name: str) -> Tensor:
        """Return one tensor as it was before it was packed.

        Raises:
            InputError: There is no such tensor, or what stands for it is damaged.
        """
        if name not in self.tensors:
            raise InputError(f"{self.folder}: no tensor {name!r}", hint="export it again")
        form, file = self._forms[name], self.tensors[name].file
        path, header = self.folder / file, self._headers[file]
        parts = {
            part: read_tensor(path, header.tensors[part], header, self.root) for part, _, _ in form.entries
        }
        return form.unpack(parts, str(path))
