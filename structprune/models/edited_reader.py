"""A checkpoint with a plan carried out is itself a checkpoint: this reads it without writing anything.

Streaming a pruned model is streaming from here, exporting is writing what stands here, and the next stage
finds its model here; a tensor that is cut, dropped, created or stored in parts is no special case anywhere.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.errors import InputError
from structprune.models.config_patch import merge_patch
from structprune.models.members import new_names, renumber
from structprune.models.tensor_edit import apply_mask, edited_layout, keep_indices, new_value
from structprune.plan.plan import Plan
from structprune.storage.header import TensorInfo
from structprune.storage.reader import StoredTensors
from structprune.storage.tensor_file import nbytes_of
from structprune.storage.unchanged import StoredFile


class EditedReader(StoredTensors):
    """The tensors and the configuration that a plan leaves of a checkpoint.

    Args:
        below: The checkpoint before the stage: files, or another edited reader.
        plan: What is carried out.

    Attributes:
        folder: The folder of the files.
        config: Content of config.json, patched.
        patch: All that plans have patched in config.json until here.
        tensors: Name -> file, dtype and shape; the byte ranges are not those of any file.
        shards: File -> names of its tensors, in order.
        metadata: File -> its own notes.
        index_metadata: The `metadata` of the index; None where there is none.
        root: For `safe_open.check_link`.
    """

    def __init__(self, below: "Reader", plan: Plan) -> None:
        self._below, self._plan = below, plan
        self.folder: Path = below.folder
        self.root: Path | None = below.root
        self.metadata: dict[str, dict[str, str]] = below.metadata
        self.index_metadata: dict[str, Any] | None = below.index_metadata
        self.config: dict[str, Any] = merge_patch(below.config, plan.patch)
        self.patch: dict[str, Any] = merge_patch(below.patch, plan.patch)
        self.tensors = {}
        self.shards = {}
        edited = edited_layout(below.layout, plan)
        called = new_names((name for entries in edited.values() for name, _, _ in entries), plan)
        self._before = {new: old for old, new in called.items()}
        self._edited = {key.name for key in plan if key.edit != "none"}
        left = renumber(edited, plan)
        for file, entries in left.items():
            self.shards[file] = tuple(name for name, _, _ in entries)
            for name, dtype, shape in entries:
                self.tensors[name] = TensorInfo(name, dtype, shape, file, 0, nbytes_of(dtype, shape))

    def read(self, name: str) -> Tensor:
        """Return one tensor as the plan leaves it, in the dtype it is stored in.

        Raises:
            InputError: There is no such tensor, or the plan's decision has another shape than it.
        """
        if name not in self.tensors:
            raise InputError(
                f"{self.folder}: no tensor {name!r} is left by {self._plan.method}",
                hint="ask for one of the names in `tensors`",
            )
        info = self.tensors[name]
        name = self._before[name]
        value = new_value(name, self._plan)
        if value is None:
            value = keep_indices(name, self._below.read(name), self._plan)
        return apply_mask(name, value.to(info.dtype), info.shape, self._plan)

    def stored_file(self, file: str) -> StoredFile | None:
        """Return the weight file that holds a shard as it stands here; None where it is changed."""
        names = self.shards[file]
        same = names == self._below.shards.get(file) and all(self._before[name] == name for name in names)
        return self._below.stored_file(file) if same and self._edited.isdisjoint(names) else None


Reader = StoredTensors
"""What a model is opened from, written from and pruned from."""
