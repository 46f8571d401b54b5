"""Linears that are stored as a product: where their parts lie in the files, and how they enter a model.

The configuration of a folder with such linears lists them under "factored_linears": module path -> sizes of
the blocks of its left and right wrapper. So plain transformers can build them too, from a file in the folder.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from structprune.errors import InputError
from structprune.models.modules import FactoredLinear
from structprune.plan.key import Key

LISTED = "config.json and weights belong together: put back the config.json that was written with them"

CONFIG_KEY = "factored_linears"
PARTS = ("left", "core.weight", "right")


def part_names(weight: str) -> dict[str, str]:
    """Return the names in the files of the parts of a stored weight, by their names in the module."""
    path = weight.removesuffix(".weight")
    return {part: f"{path}.{part}" for part in PARTS}


def part_shapes(shape: tuple[int, ...], wrappers: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parts of a matrix [out, in], by their names in the module.

    Args:
        shape: [out, in].
        wrappers: Sizes of the blocks of the left and of the right wrapper.
    """
    (out, inputs), (left, right) = shape, wrappers
    return {
        "left": (out // left, left, left),
        "core.weight": (out, inputs),
        "right": (inputs // right, right, right),
    }


def whole_of(part: str) -> str:
    """Return the stored weight that a part belongs to."""
    ending = next(ending for ending in PARTS if part.endswith(f".{ending}"))
    return f"{part.removesuffix(ending)}weight"


def place_of(part: str) -> int:
    """Return where a part stands among those of its weight in the files."""
    return next(place for place, ending in enumerate(PARTS) if part.endswith(f".{ending}"))


def replace(block: nn.Module, path: str, weight: str, plan: Mapping[Key, Tensor]) -> Callable[[], None]:
    """Put a factored linear in the place of a linear; return what puts the linear back.

    Args:
        block: Holds the linear.
        path: The linear's path in it.
        weight: Name of its weight in the files.
        plan: Holds the parts.
    """
    linear = block.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    parts = {part: plan[Key(name, "factor")] for part, name in part_names(weight).items()}
    factored = FactoredLinear.like(linear, parts["right"].shape[1], parts["left"].shape[1])
    for part, value in parts.items():
        factored.get_parameter(part).data.copy_(value)
    if linear.bias is not None:
        factored.bias = linear.bias
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, factored.eval())
    return lambda: setattr(block.get_submodule(parent), name, linear)


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
        raise InputError(f"{where}: {CONFIG_KEY} must hold an object", hint=LISTED)
    for path, sizes in listed.items():
        linear = next((module for name, module in model.named_modules() if name == path), None)
        if not isinstance(linear, nn.Linear):
            raise InputError(
                f"{where}: {CONFIG_KEY} names {path!r}, which is no linear of the model", hint=LISTED
            )
        try:
            left, right = (int(size) for size in sizes)
            factored = FactoredLinear.like(linear, right, left)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{where}: {CONFIG_KEY}.{path} is {str(sizes)[:40]}: {error}", hint=LISTED
            ) from None
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, factored)
