"""One plan in a folder, read without the code that carries it out, and told in the names of the files.

A stage speaks of tensors as they were called before it. Where it, or a later one, leaves only some members of
a numbered list, those have other numbers in the files.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from structprune.plan.block import PlanBlock, content_hash
from structprune.plan.key import WRITTEN, Key
from structprune.plan.plan import Plan
from structprune.plan.promise import Gone, Listed, Removed, Reshaped
from structprune.proof.measure import BITS
from structprune.storage.tensor_file import read_tensors

Shapes = Mapping[str, tuple[int, ...]]
Decided = tuple[Key, PlanBlock]
"""A decision by its key, and the block that holds it."""


class Stage:
    """One plan in a folder.

    Every name is the one that the files use. What a list lost, in this stage or later, has no such name: it
    is called after the stage with which it left.

    Args:
        folder: The plan's folder.
        later: The stages after it.
        carried: Plans that the source has been through already.

    Attributes:
        name: The folder's name.
        in_source: Whether the source is what this stage left, or a later one.
        plan: What was decided and promised.
        masked: Stored tensor -> its mask.
        written: Stored tensor -> its new value.
        counted: Promises of removed weights.
        listed: Promises of numbered lists.
        shapes: Stored tensor -> the shape that the stage gives it.
        gone: Stored tensors that the stage takes away.
        left: What this stage names and a list lost.
        prunable: Stored tensors that lose weights.

    Raises:
        InputError: The plan is damaged.
    """

    def __init__(self, folder: Path, later: Sequence["Stage"] = (), carried: Collection[str] = ()) -> None:
        self.name = folder.name
        self.plan = Plan.load(folder)
        self.in_source = self.plan.id in carried
        self._open: tuple[PlanBlock, dict[str, Tensor]] | None = None
        keys = [(key, block) for block in self.plan.blocks for key in block]
        self.members = {
            key.name: self._read(block, key).tolist() for key, block in keys if key.edit == "members"
        }
        self._chain = (self, *later)
        self.left: set[str] = set()
        stored = self.plan.promises.stored if self.plan.promises else ()
        self.counted = [self._told(one) for one in stored if isinstance(one, Removed)]
        self.listed = {one.name: one for one in stored if isinstance(one, Listed)}
        self.shapes = {
            self._now(name): one.shape for one in stored if isinstance(one, Reshaped) for name in one.tensors
        }
        self._takes = {name for one in stored if isinstance(one, Gone) for name in one.tensors}
        self.gone = {self._now(name) for name in self._takes}
        self.masked = {self._now(key.name): (key, block) for key, block in keys if key.edit == "mask"}
        self.written = {self._now(key.name): (key, block) for key, block in keys if key.edit in WRITTEN}
        self.prunable = {name for one in self.counted for name in one.tensors}
        self._kept: dict[str, list[Decided]] = {}
        for key, block in keys:
            if key.edit == "keep":
                self._kept.setdefault(self._now(key.name), []).append((key, block))

    @property
    def reshaped(self) -> set[str]:
        """Return the stored tensors that have another shape after the stage."""
        return {*self.shapes, *self._kept}

    @property
    def redecided(self) -> set[str]:
        """Return the stored tensors of which the stage decides on every weight anew, removed ones too."""
        return self.masked.keys() & self.written.keys()

    @property
    def runs(self) -> bool:
        """Tell whether the stage changes how the model runs, and nothing that is stored."""
        return any(key.kind == "tokens" for key in self.plan)

    @property
    def restructures(self) -> bool:
        """Tell whether the stage changes which tensors there are, or their shapes."""
        return bool(self.reshaped or self.gone or self.members)

    @property
    def patterns(self) -> set[tuple[int, int]]:
        """Return every (kept, of) that is promised of groups of inputs."""
        return {(one.of - one.removed, one.of) for one in self.counted if one.per == "group"}

    @property
    def transposed(self) -> set[str]:
        """Return the stored tensors that are counted along their columns."""
        return {name for one in self.counted if one.transposed for name in one.tensors}

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor of the files is, bit for bit, the new value that the plan decided on."""
        key, block = self.written[name]
        return content_hash(key, tensor, tuple(tensor.shape)) == block.hashes[key]

    def mask_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the plan thinks a masked tensor has."""
        key, block = self.masked[name]
        return block.shapes[key]

    def mask(self, name: str) -> Tensor:
        """Return which elements of a masked tensor stay, as bool in the shape that the stage leaves."""
        key, block = self.masked[name]
        packed, shape = self._read(block, key).numpy(), block.shapes[key]
        bits = np.unpackbits(packed, count=math.prod(shape), bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).view(shape)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Return what the stage keeps of a tensor that lies before it, such as an earlier stage's mask."""
        for key, block in self._kept.get(name, ()):
            kept = self._read(block, key).numpy()
            # NumPy takes bytes of any width; bfloat16 is none of its dtypes.
            raw = tensor.contiguous().view(BITS[tensor.element_size()]).numpy()
            tensor = torch.from_numpy(np.take(raw, kept, axis=key.axis)).view(tensor.dtype)
        return tensor

    def called(self, name: str) -> str | None:
        """Return what a stored tensor is called after this stage; None where a list lost it.

        Args:
            name: As it was called before.
        """
        parts, new = name.split("."), name.split(".")
        for place, part in enumerate(parts):
            kept = self.members.get(".".join(parts[:place]))
            if kept is not None and part.isdigit():
                if int(part) not in kept:
                    return None
                new[place] = str(kept.index(int(part)))
        return ".".join(new)

    def list_now(self, name: str) -> str | None:
        """Return what the files call a numbered list of this stage; None where it left or was cut again."""
        for stage in self._chain:
            if name in stage.members and stage is not self:
                return None
            called = stage.called(name)
            if called is None:
                return None
            name = called
        return name

    def leaves(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return what shapes the stage leaves of all stored tensors, by what they are called afterwards.

        Args:
            shapes: Stored tensor as it is called before the stage -> its shape.
        """
        after = {name: list(shape) for name, shape in shapes.items() if name not in self._takes}
        for block in self.plan.blocks:
            for key in block:
                if key.edit == "keep" and key.name in after:
                    after[key.name][key.axis] = block.shapes[key][0]
                elif key.edit == "drop":
                    after.pop(key.name, None)
                elif key.edit in WRITTEN:  # it may create its tensor, which a later stage may take away
                    after.setdefault(key.name, list(block.shapes[key]))
        stays = {name: called for name in after if (called := self.called(name)) is not None}
        return {called: tuple(after[name]) for name, called in stays.items()}

    def lost(self, before: Shapes, after: Shapes) -> int:
        """Return how many elements of the tensors before the stage are not in those after it."""
        left = (after.get(called, (0,)) for name in before if (called := self.called(name)) is not None)
        return sum(map(math.prod, before.values())) - sum(map(math.prod, left))

    def _now(self, name: str) -> str:
        """Return the name that the files use for what is called `name` before this stage."""
        for stage in self._chain:
            called = stage.called(name)
            if called is None:
                self.left.add(label := f"{name} (left with {stage.name})")
                return label
            name = called
        return name

    def _told(self, promise: Removed) -> Removed:
        return promise.model_copy(update={"tensors": tuple(map(self._now, promise.tensors))})

    def _read(self, block: PlanBlock, key: Key) -> Tensor:
        if self._open is None or self._open[0] is not block:
            assert block.path is not None
            self._open = block, read_tensors(block.path)
        return self._open[1][str(key)]


def read_stages(folders: Iterable[Path], carried: Collection[str] = ()) -> list[Stage]:
    """Return the stages of a folder, in order.

    Args:
        folders: Their plans' folders, in order.
        carried: Plans that the source has been through already, by id.

    Raises:
        InputError: A plan is damaged.
    """
    stages: list[Stage] = []
    for folder in reversed(list(folders)):
        stages.insert(0, Stage(folder, stages, carried))
    return stages


def names_now(names: Iterable[str], stages: Sequence[Stage]) -> dict[str, str]:
    """Return stored tensor of the source -> its name in the files; only those that no list lost."""
    found = {}
    since = [stage for stage in stages if not stage.in_source]
    for name in names:
        called: str | None = name
        for stage in since:
            called = None if called is None else stage.called(called)
        if called is not None:
            found[name] = called
    return found
