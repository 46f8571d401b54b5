"""Numbered lists in the files, blocks and experts, of which only some members stay: those are numbered anew.

A list is known by the name that stands before the number, such as "model.layers". In memory it may be a list
of modules, or a parameter whose first axis holds all experts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from structprune.models.names import Names
from structprune.models.tensor_edit import Decisions, Layout
from structprune.plan.key import Key


def new_names(names: Iterable[str], plan: Decisions) -> dict[str, str]:
    """Return what stored tensors are called once the lists of a plan are numbered anew; those that stay.

    Args:
        names: Stored tensors as they are called before.
        plan: What is carried out.
    """
    lists = [(f"{key.name}.", _numbers(key, plan)) for key in plan if key.edit == "members"]
    # The outer list first: a block's number stands before that of its experts.
    lists.sort(key=lambda one: len(one[0]))
    found = {}
    for name in names:
        called: str | None = name
        for prefix, numbers in lists:
            if name.startswith(prefix) and called is not None:
                called = _renumbered(name, called, prefix, numbers)
        if called is not None:
            found[name] = called
    return found


def renumber(layout: Layout, plan: Decisions) -> Layout:
    """Return file -> (name, dtype, shape) with the lists of a plan numbered anew; no file stays empty."""
    called = new_names((name for entries in layout.values() for name, _, _ in entries), plan)
    left = {
        file: [(called[name], dtype, shape) for name, dtype, shape in entries if name in called]
        for file, entries in layout.items()
    }
    return {file: entries for file, entries in left.items() if entries}


def keep_members(
    module: nn.Module, prefix: str, plan: Decisions, names: Names
) -> Iterator[Callable[[], None]]:
    """Leave of the lists under a path only the members that a plan keeps, list by list.

    Args:
        module: The module at `prefix`.
        prefix: Its path in the model; "" for the model itself.
        plan: What is carried out.
        names: The model's names, as they are before.

    Yields:
        What undoes the edit just made.
    """
    # Inner lists first: their paths hold the numbers that the outer ones have before.
    for key in sorted((key for key in plan if key.edit == "members"), key=lambda key: -len(key.name)):
        kept = sorted(_numbers(key, plan), key=_numbers(key, plan).__getitem__)
        for path in _places(key.name, names):
            if path.startswith(f"{prefix}." if prefix else "") and path != prefix:
                inside = path.removeprefix(f"{prefix}.") if prefix else path
                if isinstance(owner := _find(module, inside), nn.ModuleList):
                    yield _keep_modules(owner, kept)
                else:
                    yield _keep_rows(module.get_parameter(inside), kept)


def _numbers(key: Key, plan: Decisions) -> Mapping[int, int]:
    """Return old number -> new number of the members that stay."""
    kept: Tensor = plan[key]
    # Before any data it is known how many stay, not which.
    numbers = range(len(kept)) if kept.is_meta else kept.tolist()
    return {int(old): new for new, old in enumerate(numbers)}


def _renumbered(name: str, called: str, prefix: str, numbers: Mapping[int, int]) -> str | None:
    number, _, rest = name.removeprefix(prefix).partition(".")
    if not number.isdigit():
        return called
    if int(number) not in numbers:
        return None
    # Numbers of outer lists, which stand before, may have been changed in `called` already.
    return f"{called[: len(called) - len(rest) - len(number) - 1]}{numbers[int(number)]}.{rest}"


def _places(stored: str, names: Names) -> list[str]:
    """Return where a list of the files is in the model: a list of modules, or parameters of all experts."""
    lists, parameters = [], []
    for name, parameter in names.module_of.items():
        match = re.fullmatch(rf"{re.escape(stored)}(\.\d+\..+)", name)
        if match and parameter.endswith(match[1]):
            lists.append(parameter.removesuffix(match[1]))
        elif match:
            parameters.append(parameter)
    # A list of modules may have members inside that are stored in another way.
    return list(dict.fromkeys(lists or parameters))


def _find(module: nn.Module, path: str) -> nn.Module | None:
    return dict(module.named_modules()).get(path)


def _keep_modules(owner: nn.ModuleList, kept: list[int]) -> Callable[[], None]:
    before = dict(owner._modules)
    members = list(owner)
    numbered = [
        (part, new)
        for new, old in enumerate(kept)
        for part in members[old].modules()
        if isinstance(vars(part).get("layer_idx"), int)
    ]
    former = [part.layer_idx for part, _ in numbered]
    for part, new in numbered:
        vars(part)["layer_idx"] = new  # where its keys and values are in the cache
    owner._modules.clear()
    owner._modules.update({str(new): members[old] for new, old in enumerate(kept)})

    def undo() -> None:
        owner._modules.clear()
        owner._modules.update(before)
        for (part, _), old in zip(numbered, former, strict=True):
            vars(part)["layer_idx"] = old

    return undo


def _keep_rows(parameter: nn.Parameter, kept: list[int]) -> Callable[[], None]:
    before = parameter.data
    parameter.data = before.index_select(0, torch.tensor(kept, device=before.device))

    def undo() -> None:
        parameter.data = before

    return undo
