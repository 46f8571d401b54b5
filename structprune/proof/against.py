"""A folder against the one it was made from: what no stage touched must be equal to it, bit for bit."""

import filecmp
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.checkpoint.modelling import patched_files
from structprune.checkpoint.side_files import side_files
from structprune.errors import counted
from structprune.models.config_patch import merge_patch
from structprune.proof.measure import Measured
from structprune.proof.stage import Stage, names_now
from structprune.proof.verification import Verification
from structprune.storage.reader import StoredTensors


class Before:
    """What the source has of the tensors in the files, cut as the stages cut it.

    Args:
        source: What the folder was made from; None where nobody knows.
        stages: Its plans.
    """

    def __init__(self, source: StoredTensors | None, stages: Sequence[Stage]) -> None:
        self._source, self._stages = source, stages
        self._former = (
            {now: name for name, now in names_now(source.tensors, stages).items()} if source else {}
        )

    def read(self, name: str) -> Tensor | None:
        """Return what became of the source's tensor that the files call `name`; None where it has none."""
        if self._source is None or name not in self._former:
            return None
        tensor = self._source.read(self._former[name])
        for stage in self._stages:
            tensor = tensor if stage.in_source else stage.cut(name, tensor)
        return tensor


def check_source(
    result: Verification,
    reader: StoredTensors,
    source: StoredTensors,
    found: Mapping[str, Measured],
    stages: Sequence[Stage],
    trained: Collection[str],
) -> None:
    """Add a row: whether every weight that no stage removed or changed is the source's.

    Args:
        result: Gets the row.
        reader: The folder.
        source: What it was made from.
        found: What was measured of the folder's tensors.
        stages: Its plans.
        trained: Stored tensors whose kept weights were changed on purpose, beside those that the plans name.
    """
    exempt = {*trained}.union(*(stage.written for stage in stages))
    gone = set().union(*(stage.gone for stage in stages))
    reshaped = set().union(*(stage.reshaped for stage in stages))
    called = names_now(source.tensors, stages)
    known = set(called.values())
    new = [name for name in reader.tensors if name not in known]
    problems = [f"{name}: not in the source" for name in new if name not in exempt]
    for before, info in source.tensors.items():
        if before not in called:
            continue
        name = called[before]
        other = reader.tensors.get(name)
        if other is None:
            if name not in gone:
                problems.append(f"{name}: missing, the source has it")
        elif other.dtype != info.dtype or (name not in reshaped and other.shape != info.shape):
            seen, expected = f"{other.dtype} {list(other.shape)}", f"{info.dtype} {list(info.shape)}"
            problems.append(f"{name}: {seen}, the source has {expected}")
        elif found[name].changed and name not in exempt:
            problems.append(f"{name}: {found[name].changed} kept weights differ from the source")
    fine = f"every weight that was not removed is bit-equal to the source in {counted(len(found), 'tensor')}"
    if exempt:
        fine += f", but for {len(exempt)} whose values were changed on purpose"
    result.row("source", problems, fine)


def check_side_files(result: Verification, folder: Path, source: Path, stages: Sequence[Stage]) -> None:
    """Add a row: whether the files beside the weights are the source's, but for plans' patches."""
    patch: dict[str, Any] = {}
    for stage in stages:
        patch = merge_patch(patch, stage.plan.patch)
    patched = patched_files(source / "config.json", patch)
    problems = []
    names = side_files(source)
    for name in names:
        if not (folder / name).is_file():
            problems.append(f"{name}: missing, the source has it")
        elif name in patched and (folder / name).read_bytes() == patched[name]:
            continue
        elif patch and name in patched:
            problems.append(f"{name}: differs from the source's with the plans' changes")
        elif not filecmp.cmp(folder / name, source / name, shallow=False):
            problems.append(f"{name}: differs from the source's")
    but = ", config.json but for ignored keys and what the plans change" if patched else ""
    result.row("side files", problems, f"{counted(len(names), 'file')} byte-equal to the source's{but}")
