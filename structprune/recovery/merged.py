"""A checkpoint with what a recovery learned merged: read tensor by tensor, never held as a whole."""

from collections.abc import Sequence

from torch import Tensor

from structprune.checkpoint.adapter import merge
from structprune.models.edited_reader import Reader
from structprune.models.streamed import StreamedModel
from structprune.plan.plan import Plan
from structprune.recovery.masks import check_merged, mask_of, remove
from structprune.recovery.outcome import Recovery
from structprune.storage.reader import StoredTensors
from structprune.storage.unchanged import StoredFile


class MergedReader(StoredTensors):
    """The tensors that a recovery leaves of a checkpoint; its attributes are the checkpoint's.

    Args:
        model: What was recovered; its reader is the checkpoint.
        plans: What was decided on it.
        recovery: What training led to.

    Attributes:
        changed: Names in the files of what training changed.
    """

    def __init__(self, model: StreamedModel, plans: Sequence[Plan], recovery: Recovery) -> None:
        self._below: Reader = model.reader
        self._model, self._names, self._plans, self._recovery = model, model.names, plans, recovery
        # Tensors that were merged with one that was asked for, until somebody asks for them.
        self._waiting: dict[str, Tensor] = {}
        self.folder, self.root = self._below.folder, self._below.root
        self.config, self.patch = self._below.config, self._below.patch
        self.tensors, self.shards = self._below.tensors, self._below.shards
        self.metadata, self.index_metadata = self._below.metadata, self._below.index_metadata
        self.changed = tuple(
            part for module in recovery.factors for part in model.names.stored_of.get(module, ())
        )

    def read(self, name: str) -> Tensor:
        """Return one tensor as training leaves it, in the dtype it is stored in.

        Raises:
            InputError: There is no such tensor.
            QualityError: A number is not finite after merging.
            VerificationError: A removed weight came back.
        """
        if name not in self.changed:
            return self._below.read(name)
        if name not in self._waiting:
            self._waiting |= self._merge(self._names.module_of[name])
        return self._waiting.pop(name).to(self.tensors[name].dtype)

    def _merge(self, module: str) -> dict[str, Tensor]:
        """Return what the files hold of a parameter of the model once its change is merged."""
        read = dict(self._names.load([module], self._below.read))
        weights = {}
        for name, stored in read.items():
            weight = stored.to(self._model.dtype_of(name, stored))
            if name in self._recovery.factors:
                remove(name, weight, mask_of(name, weight, self._names, self._plans))
                weight = merge(weight, self._recovery.factors[name])
                check_merged(name, weight, self._recovery.zeros[name])
            weights[name] = weight
        return self._names.to_stored(weights)

    def stored_file(self, file: str) -> StoredFile | None:
        """Return the weight file that holds a shard as it stands here; None where training changed it."""
        same = set(self.changed).isdisjoint(self.shards[file])
        return self._below.stored_file(file) if same else None
