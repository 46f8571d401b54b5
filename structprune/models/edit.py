"""Carries a plan out on a live model: on its modules where they are in memory, else on what it reads."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.errors import InputError
from structprune.models import factored
from structprune.models.config_patch import patch_config
from structprune.models.edited_reader import EditedReader
from structprune.models.identity import (
    applied,
    architecture_of,
    names_of,
    remember_stored,
    skeleton,
    stored_layout,
)
from structprune.models.names import Names
from structprune.models.streamed import Model, StreamedModel
from structprune.models.tensor_edit import (
    Decisions,
    Outline,
    apply_mask,
    edited_layout,
    keep_indices,
    left_shape,
    new_value,
)
from structprune.models.twin import twin_of
from structprune.plan.key import Key
from structprune.plan.plan import Plan

Undo = Callable[[], None]


@torch.no_grad()
def carry_out(model: Model, plan: Plan) -> None:
    """Carry a plan out on a model in place; the same plan twice is the plan once.

    Raises:
        InputError: The plan belongs to another architecture; the model is left as it was.
    """
    if plan.id in applied(model):
        return
    if plan.architecture != architecture_of(model):
        raise InputError(
            f"the plan of {plan.method!r} is for another architecture than this {model.config.model_type}",
            hint="a plan fits only models with the same tensor names and shapes",
        )
    if isinstance(model, StreamedModel):
        model.reopen(EditedReader(model.reader, plan))
    else:
        _edit_whole(model, plan, plan.patch)
    applied(model).append(plan.id)


def left_of(model: Model, outline: Outline, patch: Mapping[str, Any]) -> PreTrainedModel:
    """Return a twin of a model on the meta device as a plan would leave it: modules, config, what is stored.

    Args:
        model: Stays as it is.
        outline: Which decisions change what there is.
        patch: Keys of config.json with their new values.
    """
    twin = twin_of(skeleton(model))
    remember_stored(twin, stored_layout(model))
    if outline or patch:
        _edit_whole(twin, outline, patch)
    return twin


def _edit_whole(model: PreTrainedModel, plan: Decisions, patch: Mapping[str, Any]) -> None:
    left = edited_layout(stored_layout(model), plan)
    # One by one, because what an edit replaced is let go of when the next one is asked for.
    for _ in edit_modules(model, "", plan, names_of(model)):
        pass
    patch_config(model.config, patch)
    remember_stored(model, left)


def edit_modules(module: nn.Module, prefix: str, plan: Decisions, names: Names) -> Iterator[Undo]:
    """Carry a plan out on the modules under a path, edit by edit; each one is made when it is asked for.

    Args:
        module: The module at `prefix`, its parameters materialised.
        prefix: Its path in the model, such as "model.layers.0"; "" for the model itself.
        plan: What is carried out.
        names: The model's names, as they are before.

    Yields:
        What undoes the edit just made; to be called in reverse order.
    """
    wholes = {factored.whole_of(key.name) for key in plan if key.edit == "parts"}
    touched = {key.name for key in plan if key.edit in ("mask", "value", "keep", "drop")}
    for path, parameter in [*module.named_parameters()]:
        stored = names.stored_of.get(f"{prefix}.{path}" if prefix else path, ())
        owner, leaf = module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if wholes.intersection(stored):
            yield factored.replace(module, path.rpartition(".")[0], stored[0], plan)
        elif any(Key(name, "drop") in plan for name in stored):
            yield _put(owner, leaf, None)
        elif touched.intersection(stored):
            key = f"{prefix}.{path}" if prefix else path
            found = names.to_stored({key: parameter.data})
            edited = {name: _edited(name, value, plan) for name, value in found.items()}
            yield _set_data(owner, parameter, names.to_module(edited)[key])
    for name in touched - names.module_of.keys():
        home = name.rpartition(".")[0]
        sibling = next((one for one in names.module_of if one.rpartition(".")[0] == home), None)
        place = None if sibling is None else names.module_of[sibling].rpartition(".")[0]
        if place is not None and (not prefix or place == prefix or place.startswith(f"{prefix}.")):
            owner = module.get_submodule(place.removeprefix(prefix).removeprefix("."))
            beside = next(owner.parameters())
            value = apply_mask(name, plan[Key(name, "value")], plan.shapes[Key(name, "value")], plan)
            yield _put(owner, name.rpartition(".")[2], nn.Parameter(value.to(beside), requires_grad=False))


@contextmanager
def temporarily(module: nn.Module, prefix: str, plan: Decisions, names: Names) -> Iterator[None]:
    """Carry a plan out on the modules under a path for the length of a `with`, then restore every bit."""
    undone: list[Undo] = []
    try:
        for undo in edit_modules(module, prefix, plan, names):
            undone.append(undo)
        yield
    finally:
        for undo in reversed(undone):
            undo()


def _edited(name: str, value: Tensor, plan: Decisions) -> Tensor:
    """Return a stored tensor of a live model as a plan leaves it, in the dtype that the model computes in."""
    given = new_value(name, plan)
    kept = keep_indices(name, value, plan) if given is None else given.to(value.device, value.dtype)
    return apply_mask(name, kept, left_shape(name, tuple(value.shape), plan), plan)


def _set_data(owner: nn.Module, parameter: nn.Parameter, value: Tensor) -> Undo:
    """Exchange what a parameter holds; the parameter itself stays, so that what is tied to it follows."""
    before, sizes = parameter.data, _sizes(owner)
    parameter.data = value
    if isinstance(owner, nn.Linear) and parameter is owner.weight:
        owner.out_features, owner.in_features = value.shape

    def undo() -> None:
        parameter.data = before
        vars(owner).update(sizes)

    return undo


def _sizes(owner: nn.Module) -> dict[str, int]:
    return {name: vars(owner)[name] for name in ("in_features", "out_features") if name in vars(owner)}


def _put(owner: nn.Module, leaf: str, value: nn.Parameter | None) -> Undo:
    """Put a parameter in a module, or take it away."""
    before = owner._parameters.get(leaf)
    there = leaf in owner._parameters

    def undo() -> None:
        if there:
            owner.register_parameter(leaf, before)
        else:
            del owner._parameters[leaf]

    owner.register_parameter(leaf, value)
    return undo
