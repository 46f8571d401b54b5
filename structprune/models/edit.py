"""Carries a plan out on a live model: on its modules where they are in memory, else on what it reads."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.errors import InputError
from structprune.models import factored
from structprune.models.arch import arch_of, block_prefixes
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
from structprune.models.members import keep_members, renumber
from structprune.models.names import Names
from structprune.models.remembered import remembered
from structprune.models.shapes import fit_sizes
from structprune.models.streamed import Model, StreamedModel
from structprune.models.tensor_edit import (
    Decisions,
    Outline,
    apply_mask,
    check_shapes,
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
        InputError: The plan belongs to another architecture, or a decision has another shape than what it is
            about; the model is left as it was.
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
    remembered(model).zeros = {}


def left_of(model: Model, outline: Outline, patch: Mapping[str, Any]) -> PreTrainedModel:
    """Return a twin of a model on the meta device as a plan would leave it: modules, config, what is stored.

    Args:
        model: Stays as it is.
        outline: Which decisions change tensors or shapes; masks do not, and need not be in it.
        patch: Keys of config.json with their new values.
    """
    twin = twin_of(skeleton(model))
    remember_stored(twin, stored_layout(model))
    if outline or patch:
        _edit_whole(twin, outline, patch)
    return twin


def _edit_whole(model: PreTrainedModel, plan: Decisions, patch: Mapping[str, Any]) -> None:
    left = edited_layout(stored_layout(model), plan)
    check_shapes(left, plan)  # all of them before the first edit, so that none is left half done
    # One by one, because what an edit replaced is let go of when the next one is asked for.
    for _ in edit_modules(model, "", plan, names_of(model)):
        pass
    patch_config(model.config, patch)
    remember_stored(model, renumber(left, plan))


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
    # Stored weights that become products, and those that stay tensors of their own but change.
    wholes = {factored.whole_of(key.name) for key in plan if key.edit == "parts"}
    touched = {key.name for key in plan if key.edit in ("mask", "value", "keep", "drop")}
    # A list of paths, for the tree changes on the way; not of parameters, which are to be freed.
    for path in [path for path, _ in module.named_parameters()]:
        parameter = module.get_parameter(path)
        stored = names.stored_of.get(f"{prefix}.{path}" if prefix else path, ())
        owner, leaf = module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if wholes.intersection(stored):
            yield factored.replace(module, path.rpartition(".")[0], stored[0], plan)
        elif stored and all(Key(name, "drop") in plan for name in stored):
            yield _put(owner, leaf, None)
        elif touched.intersection(stored):
            key = f"{prefix}.{path}" if prefix else path
            found = names.to_stored({key: parameter.data})
            edited = {name: _edited(name, value, plan) for name, value in found.items()}
            yield _set_data(parameter, names.to_module(edited)[key])
    # What the model lacks so far, a value creates: a bias beside its weight. It is found by a stored sibling,
    # because files and modules may call the way to it differently (GPT-2 files lack "transformer.").
    for name in sorted(key.name for key in plan if key.edit == "value" and key.name not in names.module_of):
        home = name.rpartition(".")[0]
        alike = (names.module_of[one] for one in names.module_of if one.rpartition(".")[0] == home)
        beside = next(alike, "")
        if beside and beside.startswith(f"{prefix}." if prefix else ""):
            path = beside.removeprefix(f"{prefix}.")
            owner, like = module.get_submodule(path.rpartition(".")[0]), module.get_parameter(path)
            value = apply_mask(name, plan[Key(name, "value")], plan.shapes[Key(name, "value")], plan)
            created = nn.Parameter(value.to(like.device, like.dtype), requires_grad=False)
            yield _put(owner, name.rpartition(".")[2], created)
    yield from keep_members(module, prefix, plan, names)
    if any(key.edit in ("keep", "drop", "members") for key in plan):
        yield from _fit_blocks(module, prefix, names)


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


def _fit_blocks(module: nn.Module, prefix: str, names: Names) -> Iterator[Undo]:
    """Let the blocks under a path follow the shapes that their parameters have now."""
    arch = arch_of(names.skeleton)
    if arch.fallback:
        return
    for path in block_prefixes(names.skeleton, arch):
        if not prefix or prefix == path:
            here = module if prefix else module.get_submodule(path)
            before = [(part, dict(vars(part)), dict(part._modules)) for part in here.modules()]
            fit_sizes(here, arch.paths())

            def undo(before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = before) -> None:
                for part, found, children in before:
                    vars(part).update(found)
                    part._modules.clear()
                    part._modules.update(children)

            yield undo


def _set_data(parameter: nn.Parameter, value: Tensor) -> Undo:
    """Exchange what a parameter holds; the parameter itself stays, so that what is tied to it follows."""
    before = parameter.data
    parameter.data = value

    def undo() -> None:
        parameter.data = before

    return undo


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
