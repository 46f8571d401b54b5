"""What a process of a group reads and sends while methods decide, counted; and the rates it measures."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.evaluation import machine_rates
from structprune.models.opening import Opening
from structprune.models.streamed import Batch, open_model
from structprune.pruners.catalogue import find
from structprune.pruners.pruner import Pruner
from structprune.ranks import Ranks
from structprune.storage.reader import CheckpointReader

WORKERS, FAMILY, DEPTH = 2, "llama", 2
# Nine samples in five batches, of which the last is smaller.
SAMPLES, LENGTH, BATCH = 9, 24, 2


def counted_methods() -> dict[str, Pruner]:
    """Return what decides: sums of features, of pairs, and gradients; answers with and without values."""
    every = {"wanda": {}, "sparsegpt": {}, "gblm": {}, "wanda_sp": {"repair": "least_squares"}}
    return {name: find(name).model_validate({"sparsity": 0.5, **more}) for name, more in every.items()}


def counted_batches() -> list[Batch]:
    """Draw the batches."""
    ids = torch.randint(3, 300, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one} for one in torch.split(ids, BATCH)]


@contextmanager
def counted_bytes(found: Counter[str]) -> Iterator[None]:
    """Count what this process reads and sends for the length of a `with`, of tensors and no names.

    Of what all do together every process counts its share; a sum is added up in parts, and
    each part sent to whoever gets it.
    """
    read, apart = CheckpointReader.read, Ranks.add_apart
    ordered, tell = Ranks.add_in_order, Ranks.tell

    def counting_read(self: CheckpointReader, name: str) -> Tensor:
        found["read"] += self.tensors[name].nbytes
        return read(self, name)

    def counting_apart(self: Ranks, values: Tensor) -> None:
        found["sent"] += 2 * (self.count - 1) * values.nbytes * self.first
        apart(self, values)

    def counting_ordered(self: Ranks, values: Tensor, owner: int | None = None) -> None:
        others, parts = self.count - 1, 1 if owner is None else 1 / self.count
        found["sent"] += others * (1 + parts) * values.nbytes * self.first
        ordered(self, values, owner)

    def counting_tell(
        self: Ranks, source: int, said: Any = None, tensors: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        told = sum(one.nbytes for one in (tensors or {}).values())
        found["sent"] += (self.count - 1) * told * (source == self.number)
        return tell(self, source, said, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointReader, "read", counting_read)
        patch.setattr(Ranks, "add_apart", counting_apart)
        patch.setattr(Ranks, "add_in_order", counting_ordered)
        patch.setattr(Ranks, "tell", counting_tell)
        yield


def count(folder: Path) -> dict[str, Any]:
    """Return what this process read and sent, method by method, and the rates that all measured together.

    Args:
        folder: The model.
    """
    said: dict[str, Any] = {}
    for name, pruner in counted_methods().items():
        model = open_model(folder, Opening(stream=True))
        writer, found = pruner.writer(None, model, "weights"), Counter[str]()
        with counted_bytes(found):
            pruner.calibrate(model, counted_batches(), writer)
        said[name] = dict(found)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SECONDS": 0.001, "WIDTH": 32, "SENT_BYTES": 1 << 16}.items():
            patch.setattr(machine_rates, name, value)
        patch.setattr(machine_rates, "READ_BYTES", 1 << 20)
        patch.setattr(machine_rates, "MOVED_BYTES", 1 << 20)
        said["rates"] = asdict(machine_rates.measure_rates("cpu", Ranks.here()))
    return said
