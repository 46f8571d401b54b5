"""Folders pruned by hand: masks of every second input, applied without any code that prunes."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from structprune.checkpoint.manifest import write_manifest
from structprune.checkpoint.side_files import copy_side_files
from structprune.plan.key import Key
from structprune.plan.origin import Architecture, Origin
from structprune.plan.plan import PlanWriter
from structprune.plan.promise import Promises, Removed
from structprune.storage.reader import CheckpointReader
from structprune.storage.tensor_file import save_tensors

PLAN = "structprune/plans/01-magnitude"


def every_second(shape: tuple[int, ...], *, transposed: bool = False) -> Tensor:
    """Keep every second input: exactly half of every row, and 2:4."""
    keep = torch.zeros(shape, dtype=torch.bool)
    if transposed:
        keep[::2] = True
    else:
        keep[..., ::2] = True
    return keep


def linear_names(folder: Path) -> dict[str, bool]:
    """Return the stored linears of the blocks, by the test's own rule, and whether they lie [in, out]."""
    names = CheckpointReader(folder).tensors
    wanted = [
        name
        for name, info in names.items()
        if ("layers." in name or ".h." in name)
        and len(info.shape) == 2
        and "vision" not in name
        and "visual" not in name
    ]
    return {
        name: ".h." in name
        for name in wanted
        if not name.endswith((".gate.weight", "shared_expert_gate.weight"))
    }


class Pruned:
    """A folder pruned by hand, without the code under test: masks by plan key, then zeros written."""

    def __init__(self, source: Path, folder: Path, promised: list[Removed], masks: dict[str, Tensor]) -> None:
        self.source, self.folder, self.promised, self.masks = source, folder, promised, masks
        reader = CheckpointReader(source)
        self.shards = {
            file: {name: reader.read(name) for name in names} for file, names in reader.shards.items()
        }
        self.shapes, self.metadata = reader.shapes, reader.metadata
        self.model_type = reader.config["model_type"]
        self.edit(lambda name, value: value.masked_fill(~masks[name], 0) if name in masks else value)

    def edit(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Change every tensor that will be written."""
        for tensors in self.shards.values():
            for name in tensors:
                tensors[name] = change(name, tensors[name].clone())

    def write(
        self, *, masks: dict[str, Tensor] | None = None, architecture: str = "", manifest: bool = True
    ) -> Path:
        """Write the folder; the plan may tell of other masks or another architecture than the real ones."""
        self.folder.mkdir(exist_ok=True)
        copy_side_files(self.source, self.folder)
        for file, tensors in self.shards.items():
            save_tensors(self.folder / file, tensors, self.metadata[file])
        for index in self.source.glob("*.index.json"):
            (self.folder / index.name).write_bytes(index.read_bytes())
        written = masks if masks is not None else self.masks
        same = architecture or Architecture(model_type=self.model_type, shapes=self.shapes).hash
        writer = PlanWriter(self.folder / PLAN, Origin("magnitude", {"sparsity": 0.5}, same, "0" * 64))
        writer.write({Key(name, "mask"): mask for name, mask in written.items()}, {})
        removed = sum(int((~mask).sum()) for mask in self.masks.values())
        of = sum(mask.numel() for mask in self.masks.values())
        stored = tuple(self.promised)
        promises = Promises(unit="weights", asked=0.5, removed=removed, of=of, stored=stored)
        writer.finish({}, promises=promises)
        if manifest:
            write_manifest(self.folder, {}, version="0", stages=["plans/01-magnitude"])
        return self.folder


def half_of(source: Path, folder: Path, sparsity: float | str = 0.5) -> Pruned:
    """Remove every second input of every linear: half of every row, and 2:4."""
    shapes = CheckpointReader(source).shapes
    flipped = linear_names(source)
    masks = {name: every_second(shapes[name], transposed=flip) for name, flip in flipped.items()}
    promised = []
    for name, flip in flipped.items():
        inputs = shapes[name][0] if flip else shapes[name][1]
        per_group = {"per": "group", "removed": 2, "of": 4}
        due = per_group if sparsity == "2:4" else {"per": "row", "removed": inputs // 2}
        promised.append(Removed(tensors=(name,), transposed=flip, **due))
    return Pruned(source, folder, promised, masks)
