"""What a plan makes of stored tensors: of one, and of the list of all.

Inside a plan the order is: keep, then value, then mask, then members; value and mask are in the layout that
is left, so that a value replaces what a keep would leave, and every key has the name from before.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.models import factored
from structprune.plan.block import PlanBlock
from structprune.plan.key import Key
from structprune.plan.plan import Plan
from structprune.storage.tensor_file import Entry

AXES = (0, 1)
Layout = dict[str, list[Entry]]
"""File -> name, dtype and shape of its tensors, in order."""


class Outline(Mapping[Key, Tensor]):
    """A plan before it is made: which decisions it will hold and in which shapes, on the meta device.

    Args:
        shapes: Shape of every key's tensor.
    """

    def __init__(self, shapes: Mapping[Key, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)

    def __getitem__(self, key: Key) -> Tensor:
        """Return a tensor of the key's shape without content."""
        dtype = torch.bool if key.edit == "mask" else torch.int64 if key.edit in ("keep", "members") else None
        return torch.empty(self.shapes[key], dtype=dtype, device="meta")

    def __iter__(self) -> Iterator[Key]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


Decisions = Plan | PlanBlock | Outline


def new_value(name: str, plan: Decisions) -> Tensor | None:
    """Return the value that a plan gives a stored tensor, whole or as a part; None where it gives none."""
    key = next((key for kind in ("value", "factor") if (key := Key(name, kind)) in plan), None)
    return None if key is None else plan[key]


def keep_indices(name: str, value: Tensor, plan: Decisions) -> Tensor:
    """Return a stored tensor with those indices of its axes only that a plan keeps."""
    for axis in AXES:
        if (key := Key(name, f"keep.{axis}")) in plan:
            value = value.index_select(axis, plan[key].to(value.device, torch.int64))
    return value


def apply_mask(name: str, value: Tensor, shape: tuple[int, ...], plan: Decisions) -> Tensor:
    """Return a stored tensor with the weights at zero that a plan removes, after a check of its shape.

    Args:
        name: The tensor's name in the files.
        value: Its value, in the layout that is left; never changed.
        shape: The shape that it must have.
        plan: What is carried out.

    Raises:
        InputError: A mask or a new value has another shape than the tensor.
    """
    mask = plan[key] if (key := Key(name, "mask")) in plan else None
    for what, part in (("value", value), ("mask", mask)):
        if part is not None and tuple(part.shape) != tuple(shape):
            raise InputError(
                f"{name}: the plan's {what} has shape {list(part.shape)}, the tensor {list(shape)}",
                hint="the plan belongs to another model",
            )
    # masked_fill and not a product: -w * 0 is -0.0, whose sign bit is a difference on disk.
    return value if mask is None else value.masked_fill(~mask.to(value.device), 0)


def edited_layout(layout: Layout, plan: Decisions) -> Layout:
    """Return file -> (name, dtype, shape) as a plan leaves them, in the order in which they are stored.

    Parts stand where their whole stood, in its dtype; a created tensor stands behind the last one of its
    module, in that one's dtype.

    Raises:
        InputError: A part or a created tensor belongs to no module of the files.
    """
    known = {name for entries in layout.values() for name, _, _ in entries}
    parts: dict[str, list[Key]] = {}
    created: dict[str, list[Key]] = {}
    for key in plan:
        if key.edit == "parts":
            parts.setdefault(factored.whole_of(key.name), []).append(key)
        elif key.edit == "value" and key.name not in known:
            created.setdefault(_module_of(key.name), []).append(key)
    left: Layout = {}
    # Backwards, because a created tensor follows the last one of its module; what is collected is turned
    # round at the end, so parts are put in backwards too.
    for file in reversed([*layout]):
        kept: list[Entry] = []
        for name, dtype, shape in reversed(layout[file]):
            kept += [(key.name, dtype, plan.shapes[key]) for key in created.pop(_module_of(name), [])]
            if name in parts:
                ordered = sorted(parts.pop(name), key=lambda key: factored.place_of(key.name), reverse=True)
                kept += [(key.name, dtype, plan.shapes[key]) for key in ordered]
            elif Key(name, "drop") not in plan:
                kept.append((name, dtype, left_shape(name, shape, plan)))
        left[file] = kept[::-1]
    if homeless := [key.name for keys in (*parts.values(), *created.values()) for key in keys]:
        raise InputError(
            f"the plan has a tensor {homeless[0]!r}, whose module the files do not have",
            hint="the plan belongs to another model",
        )
    return {file: left[file] for file in layout}


def left_shape(name: str, shape: tuple[int, ...], plan: Decisions) -> tuple[int, ...]:
    """Return the shape that a plan leaves of a stored tensor."""
    left = list(shape)
    for axis in AXES:
        if (key := Key(name, f"keep.{axis}")) in plan:
            left[axis] = plan.shapes[key][0]
    return tuple(left)


def check_shapes(left: Layout, plan: Decisions) -> None:
    """Check that every mask and new value of a plan has the shape that the plan leaves of its tensor.

    Args:
        left: What `edited_layout` returned.
        plan: What is to be carried out.

    Raises:
        InputError: One has another shape; the tensor is named.
    """
    shapes = {name: shape for entries in left.values() for name, _, shape in entries}
    for key in plan:
        if key.edit in ("mask", "value") and shapes.get(key.name) != tuple(plan.shapes[key]):
            found = list(shapes[key.name]) if key.name in shapes else "none"
            raise InputError(
                f"{key.name}: the plan's {key.kind} has shape {list(plan.shapes[key])}, the tensor {found}",
                hint="the plan belongs to another model",
            )


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
