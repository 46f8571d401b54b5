"""Linears that are stored as products: what the files will hold of them, and what that promises."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from structprune.models.arch import LANGUAGE_MODELS, Linear
from structprune.models.factored import CONFIG_KEY, part_names, part_shapes
from structprune.models.names import Names
from structprune.plan.key import Key
from structprune.plan.promise import Gone, Removed, Reshaped
from structprune.pruners.weight._promises import Promise

Products = Sequence[tuple[Linear, tuple[int, int]]]
"""Linears with the sizes of their left and right wrapper's blocks."""

# ARMOR's.
WRAPPER = 128

STORED = (
    "linears are stored as products of a sparse core and two wrappers; the folder opens with "
    "`structprune.load`, and in plain transformers with `trust_remote_code=True`"
)
FOLDED = "products are folded into dense matrices: nothing in them is zero"


def wrapper_sizes(weight: Tensor, size: int | None) -> tuple[int, int]:
    """Return the sizes of the left and the right wrapper's blocks of a matrix [out, in].

    Args:
        weight: Only its shape matters.
        size: For both sides; None for the largest that divides the paper's and the side.
    """
    out, inputs = weight.shape
    return (size, size) if size else (math.gcd(out, WRAPPER), math.gcd(inputs, WRAPPER))


def unstorable(linear: Linear) -> str:
    """Return why a linear cannot be stored as a product, "" when it can."""
    kinds = {"a fused expert": linear.expert is not None, "a Conv1D": linear.transposed}
    # transformers does not rename the tensors of a class that comes with the folder.
    kinds["a vision-language model's"] = linear.label.startswith(tuple(LANGUAGE_MODELS.values()))
    kind = next((kind for kind, found in kinds.items() if found), "")
    return f"{kind} cannot be stored as a product (--fold writes the product itself)" if kind else ""


def part_outline(names: Names, products: Products) -> Mapping[Key, tuple[int, ...]]:
    """Return the shapes of the parts, by their keys in a plan."""
    shapes: dict[Key, tuple[int, ...]] = {}
    for linear, wrappers in products:
        parts = part_shapes(tuple(linear.weight.shape), wrappers)
        for part, name in part_names(names.stored_of[linear.name][0]).items():
            shapes[Key(name, "factor")] = parts[part]
    return shapes


def products_patch(products: Products) -> dict[str, Any]:
    """Return the keys of config.json that tell a loader which linears are products."""
    listed = {linear.label: list(wrappers) for linear, wrappers in products}
    return {CONFIG_KEY: listed} if listed else {}


def product_promises(names: Names, products: Products, pattern: tuple[int, int]) -> list[Promise]:
    """Return what the files must show: cores with N of every M, wholes that are gone, parts of their shapes.

    Args:
        names: The model's.
        products: The linears that become products.
        pattern: (N, M) of the cores.
    """
    if not products:
        return []
    kept, of = pattern
    wholes = [names.stored_of[linear.name][0] for linear, _ in products]
    cores = tuple(part_names(whole)["core.weight"] for whole in wholes)
    shapes = part_outline(names, products)
    return [
        Removed(tensors=cores, per="group", removed=of - kept, of=of),
        Gone(tensors=tuple(wholes)),
        *(Reshaped(tensors=(key.name,), shape=shape) for key, shape in shapes.items()),
    ]
