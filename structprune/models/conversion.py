"""The one place that uses transformers' own weight conversion, which is not a public interface.

Every function used is checked to exist, so that a version without it is refused by name.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from structprune.errors import EnvironmentFailure

Shape = tuple[int, ...]
Slot = tuple[str, int]

STAR = "*."  # where a conversion pattern has the number of an expert

INTERNALS: dict[str, tuple[str, ...]] = {
    "transformers.core_model_loading": (
        "WeightConverter",
        "rename_source_key",
        "apply_renamings",
        "dot_natural_key",
        "revert_weight_conversion",
    ),
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
}


@dataclass(frozen=True)
class Part:
    """Tensors that are converted together: usually one on each side.

    Attributes:
        modules: Names in the model's state dict.
        stored: Names in the files.
        slots: Where each stored tensor goes: conversion pattern and position in it; empty for a mere rename.
    """

    modules: tuple[str, ...]
    stored: tuple[str, ...]
    slots: tuple[Slot, ...] = ()


class Conversion:
    """Transformers' own conversion for one model: renames, and tensors joined on loading and split on saving.

    Args:
        skeleton: The model; only its structure and config are used.
        shapes: Shapes of its tensors, by state-dict name.

    Raises:
        EnvironmentFailure: The installed transformers lacks a function that is needed.
    """

    def __init__(self, skeleton: PreTrainedModel, shapes: Mapping[str, Shape]) -> None:
        self._core, self._mapping = (_internals(module) for module in INTERNALS)
        self._skeleton, self._shapes = skeleton, shapes
        _, converters = self._transforms()
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}

    def _transforms(self) -> tuple[list[Any], list[Any]]:
        transforms = self._mapping.get_model_conversion_mapping(self._skeleton)
        converters = [one for one in transforms if isinstance(one, self._core.WeightConverter)]
        return [one for one in transforms if not isinstance(one, self._core.WeightConverter)], converters

    def locate(self, stored: Iterable[str]) -> dict[str, tuple[str, Slot | None]]:
        """Return module name, and slot if converted, of each stored name that has a place in the model."""
        # New transforms each time: some remember the names they have seen.
        renamings, converters = self._transforms()
        prefix = self._skeleton.base_model_prefix
        result: dict[str, tuple[str, Slot | None]] = {}
        for name in sorted(stored, key=self._core.dot_natural_key):
            module, pattern = self._core.rename_source_key(name, renamings, converters, prefix, self._shapes)
            if module not in self._shapes and name in self._shapes:
                module, pattern = name, None
            if module in self._shapes:
                inner = self._core.apply_renamings(name, renamings)
                result[name] = (module, None if pattern is None else (pattern, _position(inner, pattern)))
        return result

    def targets(self, module: str, pattern: str) -> tuple[str, ...]:
        """Return all module names that a conversion writes, given the first."""
        patterns = self._converters[pattern].target_patterns
        return (
            tuple(module.replace(patterns[0], target) for target in patterns)
            if len(patterns) > 1
            else (module,)
        )

    def canonical(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return names and shapes that `save_pretrained` would write for these tensors of the model."""
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        reverted = self._core.revert_weight_conversion(self._skeleton, state)
        return {name: tuple(tensor.shape) for name, tensor in reverted.items()}

    def join(self, part: Part, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Convert file tensors to the model's; each one read is let go of as soon as it is converted."""
        converter = deepcopy(self._converters[part.slots[0][0]])
        kinds = set()
        for name, (pattern, _) in zip(part.stored, part.slots, strict=True):
            tensor = read(name)
            kinds.add(tensor.dtype)
            converter.add_tensor(part.modules[0], name, pattern, _as_bytes(tensor))
            del tensor
        joined = converter.convert(part.modules[0], model=self._skeleton, config=self._skeleton.config)
        return {name: _as_before(value, kinds) for name, value in joined.items()}

    def split(self, pattern: str, tensors: Mapping[str, Tensor]) -> dict[Slot, tuple[str, Tensor]]:
        """Convert the model's tensors to file tensors, by slot, each with its name before any renaming."""
        converter = self._converters[pattern]
        reverse = converter.reverse_transform()
        first = ""
        for name, tensor in tensors.items():
            renamed, source = reverse.rename_source_key(name)
            first = first or renamed
            reverse.add_tensor(first, name, source, _as_bytes(tensor))
        pieces = reverse.convert(first, model=self._skeleton, config=self._skeleton.config)
        kinds = {tensor.dtype for tensor in tensors.values()}
        result: dict[Slot, tuple[str, Tensor]] = {}
        for name, value in pieces.items():
            found = converter.rename_source_key(name)[1]
            result[found, _position(name, found)] = (name, _as_before(value, kinds))
        return result


def _internals(module: str) -> Any:
    """Return a module of transformers, checked to hold what this file uses of it."""
    hint = "structprune was written for transformers 5.24; install that version"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise EnvironmentFailure(
            f"transformers {transformers.__version__} has no {module}", hint=hint
        ) from error
    for name in INTERNALS[module]:
        if not hasattr(found, name):
            raise EnvironmentFailure(
                f"transformers {transformers.__version__} has no {module}.{name}", hint=hint
            )
    return found


def is_numbered(slot: Slot) -> bool:
    """Tell whether a slot's tensor is one of a numbered list, such as an expert's own."""
    return STAR in slot[0]


def _position(name: str, pattern: str) -> int:
    """Return the number at the star of a conversion pattern, such as the expert's; 0 without a star."""
    match = re.search(pattern.replace(STAR, r"(\d+)\."), name) if STAR in pattern else None
    return int(match[1]) if match else 0


def _as_bytes(tensor: Tensor) -> Tensor:
    # Not every conversion is defined for bool; for bytes they all are.
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _as_before(value: Tensor | list[Tensor], kinds: set[torch.dtype]) -> Tensor:
    tensor = value[0] if isinstance(value, list) else value
    return tensor.view(torch.bool) if kinds == {torch.bool} else tensor
