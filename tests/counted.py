"""What a worker of a group does: methods decide, what is read and sent is counted, and rates are measured.

python -m tests.counted RENDEZVOUS RANK FOLDER
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from structprune.evaluation import measuring
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


def count_bytes(found: Counter[str]) -> None:
    """Let everything that is read and sent from now on be counted by this process, of tensors and no names.

    Of what all do together every process counts its share; a sum that all get is gathered and told.
    """
    read, apart, ordered, tell = (
        CheckpointReader.read,
        Ranks.add_apart,
        Ranks.add_in_order,
        Ranks.tell,
    )

    def counting_read(self: CheckpointReader, name: str) -> Tensor:
        found["read"] += self.tensors[name].nbytes
        return read(self, name)

    def counting_apart(self: Ranks, values: Tensor) -> None:
        found["sent"] += 2 * (self.count - 1) * values.nbytes * self.first
        apart(self, values)

    def counting_ordered(self: Ranks, values: Tensor, owner: int | None = None) -> None:
        found["sent"] += (2 if owner is None else 1) * (self.count - 1) * values.nbytes * self.first
        ordered(self, values, owner)

    def counting_tell(
        self: Ranks, source: int, said: Any = None, tensors: Mapping[str, Tensor] | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        told = sum(one.nbytes for one in (tensors or {}).values())
        found["sent"] += (self.count - 1) * told * (source == self.number)
        return tell(self, source, said, tensors)

    CheckpointReader.read = counting_read  # type: ignore[method-assign]
    Ranks.add_apart = counting_apart  # type: ignore[method-assign]
    Ranks.add_in_order = counting_ordered  # type: ignore[method-assign]
    Ranks.tell = counting_tell  # type: ignore[method-assign]


def main(rendezvous: str, rank: int, folder: Path) -> None:
    """Decide beside another process and write what was counted."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORKERS,
        timeout=timedelta(seconds=300),
    )
    found: Counter[str] = Counter()
    count_bytes(found)
    said = {}
    for name, pruner in counted_methods().items():
        model = open_model(folder / "model", Opening(stream=True))
        found.clear()
        pruner.calibrate(model, counted_batches(), pruner.writer(None, model, "weights"))
        said[name] = dict(found)
    measuring.SECONDS, measuring.WIDTH, measuring.SENT_BYTES = 0.001, 32, 1 << 16
    measuring.READ_BYTES = measuring.MOVED_BYTES = 1 << 20
    said["rates"] = asdict(measuring.measure_rates("cpu", Ranks.here()))
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
