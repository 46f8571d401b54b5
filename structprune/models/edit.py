"""Carries a plan's decisions out: on one stored tensor, or on a block of a live model.

Both ways go through `stored`, so that a streamed export, a resident model and a reload do the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from structprune.errors import InputError
from structprune.models import factored
from structprune.models.names import Names


def stored(name: str, value: Tensor, plan: Mapping[str, Tensor]) -> Tensor:
    """Return a stored tensor as the plan wants it; the tensor itself where the plan does not name it.

    Args:
        name: The tensor's name in the checkpoint files.
        value: The tensor, in its stored layout; never changed.
        plan: The plan, or any mapping with its keys.

    Raises:
        InputError: A mask or a new value has another shape than the tensor.
    """
    new, mask = plan.get(f"{name}:value"), plan.get(f"{name}:mask")
    for kind, part in (("value", new), ("mask", mask)):
        if part is not None and part.shape != value.shape:
            raise InputError(
                f"{name}: the plan's {kind} has shape {list(part.shape)}, the tensor {list(value.shape)}",
                hint="the plan belongs to another model",
            )
    if new is not None:
        value = new.to(value.device, value.dtype)
    if mask is None:
        return value
    # masked_fill and not a product: -w * 0 is -0.0, whose sign bit is a difference on disk.
    return value.masked_fill(~mask.to(value.device), 0)


def parts(name: str, value: Tensor, plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what becomes of a stored tensor, by name in the files: one tensor, or the parts of a product.

    Args:
        name: The tensor's name in the checkpoint files.
        value: The tensor, in its stored layout; never changed.
        plan: The plan, or any mapping with its keys.
    """
    product = factored.in_plan(name, plan)
    if product is None:
        return {name: stored(name, value, plan)}
    return {
        stored_name: product[part].to(value.dtype) for part, stored_name in factored.part_names(name).items()
    }


def touched(
    prefix: str, module: nn.Module, plan: Mapping[str, Tensor], names: Names
) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that the plan changes, by state_dict key."""
    return {
        key: parameter
        for key, parameter in ((f"{prefix}.{name}", value) for name, value in module.named_parameters())
        if any(
            f"{part}:{kind}" in plan for part in names.stored_of.get(key, ()) for kind in ("mask", "value")
        )
    }


@torch.no_grad()
def apply(
    prefix: str, module: nn.Module, plan: Mapping[str, Tensor], names: Names
) -> Callable[[], None] | None:
    """Carry a plan out on one block in place.

    Args:
        prefix: The block's path in the model, such as "model.layers.0".
        module: The block, its parameters materialised.
        plan: The plan, or any mapping with its keys.
        names: The model's names.

    Returns:
        Puts replaced modules back; None where none was replaced.
    """
    for key, parameter in touched(prefix, module, plan, names).items():
        parts = names.to_stored({key: parameter.data})
        edited = {name: stored(name, value, plan) for name, value in parts.items()}
        parameter.data.copy_(names.to_module(edited)[key])
    return factored.install(prefix, module, plan, names)


@contextmanager
def temporarily(prefix: str, module: nn.Module, plan: Mapping[str, Tensor], names: Names) -> Iterator[None]:
    """Carry a plan out on one block for the length of a `with`, then restore every bit."""
    before = {key: value.data.clone() for key, value in touched(prefix, module, plan, names).items()}
    undo = None
    try:
        undo = apply(prefix, module, plan, names)
        yield
    finally:
        if undo is not None:
            undo()
        for key, parameter in touched(prefix, module, plan, names).items():
            parameter.data.copy_(before[key])
