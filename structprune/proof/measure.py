"""What the weight files of a folder hold, tensor by tensor: the second code path beside the one that pruned.

Nothing here selects or edits. Masks are unpacked with NumPy; every count comes from the bytes in the files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from structprune.models.arch import arch_of, blocks, linears
from structprune.models.identity import names_of
from structprune.models.streamed import Model

# So many weights are looked at together: their temporaries stay small beside the largest tensor.
CHUNK = 2**22
Inputs = Literal["last", "first"]
"""Which axis of a stored weight its inputs are on."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Place:
    """Where a stored tensor stands in the model, when it is a linear of a block.

    Args:
        block: Index of the block.
        kind: What it is in every block, such as "self_attn.q_proj".
        transposed: Stored as [in, out].
    """

    block: int
    kind: str
    transposed: bool


@dataclass
class Rows:
    """What one plan removes from one tensor.

    Args:
        removed: Per row, shape [rows]; rows are outputs.
        experts: Matrices in the tensor, one after another.
        groups: M -> the fewest and the most removed in a group of M consecutive inputs, where promised.
    """

    removed: Tensor
    experts: int = 1
    groups: dict[int, tuple[int, int]] = field(default_factory=dict)


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
        foreign: Whether the last plan that touched the tensor gave it other values; None where that plan gave
            it none, so that there is nothing to compare with.
        rows: Per plan what it removes; None where it does not name the tensor.
    """

    size: int
    width: int
    zeros: int = 0
    not_finite: int = 0
    revived: int = 0
    changed: int = 0
    foreign: bool | None = None
    fullest: dict[int, int] = field(default_factory=dict)
    rows: list[Rows | None] = field(default_factory=list)


def places(model: Model) -> dict[str, Place]:
    """Return where every stored tensor of a linear stands, by its name in the files.

    Args:
        model: The folder's model; no weight of it is needed.
    """
    found: dict[str, Place] = {}
    arch, names = arch_of(model), names_of(model)
    for index, (prefix, block) in enumerate(blocks(model, arch)):
        for linear in linears(prefix, block, arch):
            kind = linear.name.removeprefix(f"{prefix}.").removesuffix(".weight")
            for part in names.stored_of[linear.name]:
                found[part] = Place(index, kind, linear.transposed)
    return found


def measure(
    tensor: Tensor,
    inputs: Inputs | None,
    masks: Sequence[Tensor | None],
    source: Tensor | None,
    groups: Mapping[int, bool],
) -> Measured:
    """Count everything there is to know about one tensor, a few rows at a time.

    Args:
        tensor: As stored.
        inputs: Which axis of a linear's weight its inputs are on; None for what is no linear.
        masks: Per plan what stays, in the tensor's shape; None where a plan does not name it.
        source: The tensor before pruning, in the same shape and dtype; None without one.
        groups: M -> whether the masks, too, are to be counted in groups of M consecutive inputs.
    """
    transposed = inputs == "first"
    whole = _rows(tensor, transposed)
    width = whole.shape[1]
    stacked = tensor.shape[0] if tensor.ndim == 3 else 1
    nothing = torch.empty(0, dtype=torch.int64)
    empty = [None if mask is None else Rows(nothing, stacked) for mask in masks]
    found = Measured(tensor.numel(), width, rows=empty)
    whole_masks = [None if mask is None else _rows(mask, transposed) for mask in masks]
    before = None if source is None else _rows(source, transposed)
    divided = [of for of in groups if inputs is not None and width and width % of == 0]
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
            _count_groups(found, alive, kept if groups[of] else [], of)
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


def _count_groups(found: Measured, alive: Tensor, masks: Sequence[Tensor | None], of: int) -> None:
    # Once a group of a dense matrix was seen to be full there is nothing more to find.
    if found.fullest[of] < of:
        found.fullest[of] = max(found.fullest[of], int(_per_group(alive, of).max()))
    for rows, mask in zip(found.rows, masks, strict=False):
        if rows is not None and mask is not None:
            kept = _per_group(mask, of)
            fewest, most = of - int(kept.max()), of - int(kept.min())
            low, high = rows.groups.get(of, (fewest, most))
            rows.groups[of] = min(low, fewest), max(high, most)


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


def rows_of(mask: Tensor, inputs: Inputs, groups: Mapping[int, bool]) -> Rows:
    """Count what one mask removes, of a tensor that the files do not hold any more.

    Args:
        mask: What stays, in the stored shape.
        inputs: Which axis the inputs are on.
        groups: As for `measure`.
    """
    (found,) = measure(mask.to(torch.uint8), inputs, [mask], None, groups).rows
    assert found is not None
    return found


def _rows(tensor: Tensor, transposed: bool) -> Tensor:
    """Return a view [rows, inputs] of a stored tensor; experts' rows stand one expert after another."""
    if transposed:
        return tensor.T
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim and tensor.numel() else tensor.reshape(-1, 1)
