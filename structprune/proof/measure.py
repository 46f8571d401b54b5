"""What the weight files of a folder hold, tensor by tensor: the second code path beside the one that pruned.

Nothing here selects or edits. Masks are unpacked with NumPy; every count comes from the bytes in the files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from structprune.models.arch import arch_of, blocks, linears
from structprune.models.streamed import StreamedModel
from structprune.plan.block import IN_THE_WEIGHTS, PlanBlock, content_hash
from structprune.plan.plan import Plan
from structprune.storage.tensor_file import read_tensors

# So many weights are looked at together: their temporaries stay small beside the largest tensor.
CHUNK = 2**22
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Place:
    """Where a stored tensor stands in the model, when it is a linear of a block.

    Args:
        block: Index of the block.
        kind: What it is in every block, such as "self_attn.q_proj".
        matrix: Name of the matrix that competes as a whole; several stored tensors may make one.
        transposed: Stored as [in, out].
        experts: How many such matrices the tensor holds, one expert after another.
    """

    block: int
    kind: str
    matrix: str
    transposed: bool
    experts: int = 1


@dataclass
class Rows:
    """What one plan removes from one tensor.

    Args:
        removed: Per row, shape [rows]; rows are outputs.
        fewest: The fewest removed in a group of M consecutive inputs; only where an N:M was asked for.
        most: The most removed in such a group.
    """

    removed: Tensor
    fewest: int = 0
    most: int = 0


@dataclass
class Measured:
    """What one tensor of the files holds.

    Args:
        size: Elements.
        width: Elements of a row; of a linear, its inputs.
        zeros: Elements equal to zero.
        not_finite: NaN and infinite elements.
        revived: Elements that a plan removed and that are not zero.
        changed: Elements that no plan removed and whose bits are not the source's.
        fullest: M -> the most elements that are not zero in a group of M consecutive inputs; M where groups
            do not divide the inputs, or for what is no linear.
        foreign: The last plan that gives the tensor new values gave it others.
        rows: Per plan what it removes; None where it does not name the tensor.
    """

    size: int
    width: int
    zeros: int = 0
    not_finite: int = 0
    revived: int = 0
    changed: int = 0
    foreign: bool = False
    fullest: dict[int, int] = field(default_factory=dict)
    rows: list[Rows | None] = field(default_factory=list)


class Stage:
    """The masks of one plan in a folder, read without the code that applies them.

    Args:
        folder: The plan's folder.

    Raises:
        InputError: The plan is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.plan = Plan.load(folder)
        keys = [(key.rpartition(":"), block) for block in self.plan.blocks for key in block]
        self.masked: dict[str, PlanBlock] = {name: block for (name, _, kind), block in keys if kind == "mask"}
        self.valued = {name: (block, kind) for (name, _, kind), block in keys if kind in IN_THE_WEIGHTS}
        self.parts = {name for (name, _, kind), _ in keys if kind == "factor"}
        self.revalued = set(self.valued)
        self.prunable = set(self.plan.facts.get("prunable", self.masked))
        self._open: tuple[PlanBlock, dict[str, Tensor]] | None = None

    @property
    def pattern(self) -> tuple[int, int] | None:
        """Return (kept, of) where an "N:M" was asked for."""
        asked = self.plan.config.get("sparsity")
        if not isinstance(asked, str) or ":" not in asked:
            return None
        kept, of = asked.split(":")
        return int(kept), int(of)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor of the files is, bit for bit, the new value that the plan decided on."""
        block, kind = self.valued[name]
        key = f"{name}:{kind}"
        return content_hash(key, tensor, tuple(tensor.shape)) == block.hashes[key]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the plan thinks a masked tensor has."""
        return self.masked[name].shapes[f"{name}:mask"]

    def mask(self, name: str) -> Tensor:
        """Return which elements of a masked tensor stay, as bool in its stored shape."""
        block = self.masked[name]
        if self._open is None or self._open[0] is not block:
            assert block.path is not None
            self._open = block, read_tensors(block.path)
        packed, shape = self._open[1][f"{name}:mask"].numpy(), self.shape(name)
        bits = np.unpackbits(packed, count=math.prod(shape), bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).view(shape)


def places(model: StreamedModel, *, by_matrix: bool) -> dict[str, Place]:
    """Return where every stored tensor of a linear stands, by its name in the files.

    Args:
        model: The folder's model; no weight of it is needed.
        by_matrix: Tell apart the matrices of an expert parameter, which costs memory of its size.
    """
    found: dict[str, Place] = {}
    arch = arch_of(model)
    for index, (prefix, block) in enumerate(blocks(model, arch)):
        for linear in linears(prefix, block, arch):
            parts = model.names.stored_of[linear.name]
            if parts[0] in found:
                continue
            kind = linear.name.removeprefix(f"{prefix}.").removesuffix(".weight")
            experts = _experts(model, linear.name) if by_matrix and linear.expert is not None else {}
            for part in parts:
                shape = model.reader.tensors[part].shape
                stacked = shape[0] if len(shape) == 3 else 1
                found[part] = Place(
                    index, kind, linear.name + experts.get(part, ""), linear.transposed, stacked
                )
    return found


def measure(
    tensor: Tensor,
    place: Place | None,
    masks: Sequence[Tensor | None],
    source: Tensor | None,
    groups: Mapping[int, bool],
) -> Measured:
    """Count everything there is to know about one tensor, a few rows at a time.

    Args:
        tensor: As stored.
        place: Where it stands; None when it is no linear.
        masks: Per plan what stays, in the tensor's shape; None where a plan does not name it.
        source: The tensor before pruning, in the same shape and dtype; None without one.
        groups: M -> whether the masks, too, are to be counted in groups of M consecutive inputs.
    """
    transposed = place is not None and place.transposed
    whole = _rows(tensor, transposed)
    width = whole.shape[1]
    empty = [None if mask is None else Rows(torch.empty(0, dtype=torch.int64)) for mask in masks]
    found = Measured(tensor.numel(), width, rows=empty)
    whole_masks = [None if mask is None else _rows(mask, transposed) for mask in masks]
    before = None if source is None else _rows(source, transposed)
    divided = [of for of in groups if place is not None and width and width % of == 0]
    found.fullest = {of: 0 if of in divided else of for of in groups}
    counts: list[list[Tensor]] = [[] for _ in masks]
    step = max(1, CHUNK // max(width, 1))
    for low in range(0, whole.shape[0], step):
        part = slice(low, low + step)
        kept = [None if mask is None else mask[part].contiguous() for mask in whole_masks]
        weights = whole[part].contiguous()
        alive = weights != 0
        _count(found, weights, alive, kept, None if before is None else before[part].contiguous())
        for of in divided:
            _count_groups(found, alive, kept if groups[of] else [], of, first=low == 0)
        for number, mask in enumerate(kept):
            if mask is not None:
                counts[number].append(width - mask.view(torch.uint8).sum(dim=1, dtype=torch.int32))
    for rows, removed in zip(found.rows, counts, strict=True):
        if rows is not None and removed:
            rows.removed = torch.cat(removed)
    return found


def _count(
    found: Measured, weights: Tensor, alive: Tensor, masks: Sequence[Tensor | None], source: Tensor | None
) -> None:
    found.zeros += alive.numel() - _count_true(alive)
    # Both ends are NaN where one element is; only then is the slow look at every element needed.
    ends = torch.aminmax(weights) if weights.is_floating_point() else ()
    if not all(math.isfinite(float(end)) for end in ends):
        found.not_finite += _count_true(~weights.isfinite())
    stays = torch.ones_like(alive)
    for mask in masks:
        if mask is not None:
            stays &= mask
    found.revived += _count_true(alive & ~stays)
    if source is not None:
        bits = BITS[weights.dtype.itemsize]
        found.changed += _count_true((weights.view(bits) != source.view(bits)) & stays)


def _count_groups(
    found: Measured, alive: Tensor, masks: Sequence[Tensor | None], of: int, *, first: bool
) -> None:
    # Once a group of a dense matrix was seen to be full there is nothing more to find.
    if found.fullest[of] < of:
        found.fullest[of] = max(found.fullest[of], int(_per_group(alive, of).max()))
    for rows, mask in zip(found.rows, masks, strict=False):
        if rows is not None and mask is not None:
            kept = _per_group(mask, of)
            fewest, most = of - int(kept.max()), of - int(kept.min())
            rows.fewest = fewest if first else min(rows.fewest, fewest)
            rows.most = most if first else max(rows.most, most)


def _count_true(values: Tensor) -> int:
    # NumPy counts booleans a hundred times faster than PyTorch sums them.
    return int(np.count_nonzero(values.numpy()))


def _per_group(values: Tensor, of: int) -> Tensor:
    """Return how many of every `of` consecutive booleans are true, shape [groups]."""
    flat = values.reshape(-1).view(torch.uint8)
    total = flat[::of].to(torch.int16)
    for place in range(1, of):
        total += flat[place::of]
    return total


def _rows(tensor: Tensor, transposed: bool) -> Tensor:
    """Return a view [rows, inputs] of a stored tensor; experts' rows stand one expert after another."""
    if transposed:
        return tensor.T
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim and tensor.numel() else tensor.reshape(-1, 1)


def _experts(model: StreamedModel, name: str) -> dict[str, str]:
    """Return which expert each stored part of a fused parameter holds, as "[3]"; {} where stored fused."""
    if len(model.names.stored_of[name]) == 1:
        return {}
    shape = model.skeleton.get_parameter(name).shape
    # The one place that knows the conversion converts numbers that say where they came from.
    marks = torch.arange(shape[0], dtype=torch.int16).view(-1, 1, 1).expand(shape)
    return {
        part: f"[{int(values.flatten()[0])}]" for part, values in model.names.to_stored({name: marks}).items()
    }
