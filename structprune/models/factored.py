"""Linears that are stored as a product: where their parts lie in the files, and how they enter a model.

The configuration of a folder with such linears lists them under "factored_linears": module path -> sizes of
the blocks of its left and right wrapper. So plain transformers can build them too, from a file in the folder.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from structprune.errors import InputError
from structprune.models.modules import FactoredLinear
from structprune.models.names import Names

CONFIG_KEY = "factored_linears"
PARTS = ("left", "core.weight", "right")


def part_names(weight: str) -> dict[str, str]:
    """Return the names in the files of the parts of a stored weight, by their names in the module."""
    path = weight.removesuffix(".weight")
    return {part: f"{path}.{part}" for part in PARTS}


def in_plan(weight: str, plan: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the parts that a plan makes of a stored weight; None where it leaves it whole."""
    keys = {part: f"{name}:factor" for part, name in part_names(weight).items()}
    return {part: plan[key] for part, key in keys.items()} if keys["left"] in plan else None


def install(
    prefix: str, block: nn.Module, plan: Mapping[str, Tensor], names: Names
) -> Callable[[], None] | None:
    """Put factored linears in the place of those that a plan makes products of.

    Args:
        prefix: The block's path in the model.
        block: The block, its parameters materialised.
        plan: The plan, or any mapping with its keys.
        names: The model's names, before.

    Returns:
        Puts the linears back; None where the plan makes no product.
    """
    replaced: list[tuple[nn.Module, str, nn.Linear]] = []
    for path, linear in [*block.named_modules()]:
        stored = names.stored_of.get(f"{prefix}.{path}.weight", ())
        parts = in_plan(stored[0], plan) if isinstance(linear, nn.Linear) and len(stored) == 1 else None
        if parts is None:
            continue
        assert isinstance(linear, nn.Linear)
        sizes = parts["right"].shape[1], parts["left"].shape[1]
        factored = FactoredLinear.like(linear, *sizes)
        for part, value in parts.items():
            factored.get_parameter(part).data.copy_(value)
        if linear.bias is not None:
            factored.bias = linear.bias
        parent = block.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], factored.eval())
        replaced.append((parent, path.rpartition(".")[2], linear))

    def undo() -> None:
        for parent, name, linear in replaced:
            setattr(parent, name, linear)

    return undo if replaced else None


def build(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Put empty factored linears into a skeleton, as its configuration lists them.

    Args:
        model: Parameters on the meta device.
        config: Content of config.json.
        where: The file, for errors.

    Raises:
        InputError: What is listed is no linear of the model, or its sizes do not fit.
    """
    listed = config.get(CONFIG_KEY) or {}
    if not isinstance(listed, dict):
        raise InputError(f"{where}: {CONFIG_KEY} must hold an object")
    for path, sizes in listed.items():
        linear = next((module for name, module in model.named_modules() if name == path), None)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{where}: {CONFIG_KEY} names {path!r}, which is no linear of the model")
        try:
            left, right = (int(size) for size in sizes)
            factored = FactoredLinear.like(linear, right, left)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {CONFIG_KEY}.{path} is {str(sizes)[:40]}: {error}") from None
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, factored)


def listed(plans: Iterable[Mapping[str, Tensor]], names: Names) -> dict[str, list[int]]:
    """Return what the configuration lists: module path -> sizes of the blocks of left and right wrapper.

    Args:
        plans: What was carried out.
        names: The model's names, before or after.
    """
    found = {}
    for plan in plans:
        for key in plan:
            path, is_left, _ = key.partition(".left:factor")
            if is_left:
                # The files of a vision-language model may call its parts otherwise than the model does.
                known = f"{path}.left" if f"{path}.left" in names.module_of else f"{path}.weight"
                module = names.module_of[known].rpartition(".")[0]
                found[module] = [plan[key].shape[1], plan[f"{path}.right:factor"].shape[1]]
    return found
