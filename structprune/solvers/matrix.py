"""One matrix from question to answer: how much leaves it, which weights, and what becomes of the rest."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from structprune.calibration.statistics import Statistics
from structprune.decide.answers import check_mask
from structprune.errors import MethodError, QualityError, UsageError
from structprune.solvers.armor.descent import ArmorFactors


@dataclass(frozen=True)
class MatrixToPrune:
    """A matrix, how much leaves it, and what is known of it.

    Attributes:
        label: The linear's name.
        weight: Shape [out, in], in the model's dtype; never changed.
        removed: How many weights leave.
        pattern: (N, M) where N of every M consecutive inputs stay; then `removed` follows from it.
        seen: What was collected: the sums of its input, and its gradient where somebody asked.
    """

    label: str
    weight: Tensor
    removed: int
    pattern: tuple[int, int] | None = None
    seen: Statistics = field(default_factory=Statistics)

    @property
    def amount(self) -> tuple[int, int] | Fraction:
        """Return how much leaves, as the solvers take it: the pattern, or the exact fraction."""
        return self.pattern or Fraction(self.removed, self.weight.numel())


@dataclass(frozen=True)
class PrunedMatrix:
    """What becomes of a matrix.

    Attributes:
        mask: Which weights stay (of the core, where there are factors), shape [out, in], bool.
        weight: New values of the kept weights, shape [out, in], float32; None where they stay as they are.
        factors: The matrix as a product; then `weight` is None.
        score: What the choice was made by, shape [out, in], float32; None unless it is to be kept.
        facts: What was measured; plain JSON values.
    """

    mask: Tensor
    weight: Tensor | None = None
    factors: ArmorFactors | None = None
    score: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def naming(method: str, matrices: Sequence[MatrixToPrune]) -> Iterator[None]:
    """Let errors name the method and the matrices that it had, unless they already name one of them.

    Args:
        method: Its name.
        matrices: Solved together.
    """
    try:
        yield
    except (QualityError, UsageError) as error:
        if any(matrix.label in error.message for matrix in matrices):
            raise
        hint = error.hint or "the weights or the activations overflowed"
        raise type(error)(f"{_named(method, matrices)}: {error.message}", hint=hint) from None


def _named(method: str, matrices: Sequence[MatrixToPrune]) -> str:
    return f"{method}: {', '.join(matrix.label for matrix in matrices)}"


def check_pruned(method: str, found: object, matrices: Sequence[MatrixToPrune]) -> list[PrunedMatrix]:
    """Return what a method made of matrices: of each its mask, in its place.

    Args:
        method: Its name.
        found: What `solve` returned.
        matrices: What it was given.

    Raises:
        MethodError: It is something else.
    """
    if not isinstance(found, list) or [type(one) for one in found] != [PrunedMatrix] * len(matrices):
        said = f"{len(found)} values" if isinstance(found, list) else type(found).__name__
        raise MethodError(
            f"{_named(method, matrices)}: solve() returned {said}, expected a list of one PrunedMatrix each",
            hint="mend solve() in the method's file",
        )
    for one, matrix in zip(found, matrices, strict=True):
        check_mask(one.mask, matrix.weight.shape, _named(method, [matrix]), "solve")
    return found


def written_pruned(found: Mapping[str, PrunedMatrix]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what becomes of matrices, by label, as JSON values and tensors."""
    said: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for label, one in found.items():
        parts = {"mask": one.mask, "weight": one.weight, "score": one.score}
        said[label] = {"facts": dict(one.facts)}
        if (factors := one.factors) is not None:
            parts |= {"left": factors.left, "core": factors.core, "right": factors.right}
            said[label]["losses"] = [factors.initial, *factors.losses]
        tensors |= {f"{label}:{name}": value for name, value in parts.items() if value is not None}
    return said, tensors


def read_pruned(
    said: Mapping[str, Any], tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device]
) -> dict[str, PrunedMatrix]:
    """Return what `written_pruned` wrote, on the devices of the matrices."""
    found: dict[str, PrunedMatrix] = {}
    for label, one in said.items():
        device = devices[label]
        here = {
            name: tensors[key].to(device)
            for name in ("mask", "weight", "score", "left", "core", "right")
            if (key := f"{label}:{name}") in tensors
        }
        factors, weight, score = None, here.get("weight"), here.get("score")
        if "losses" in one:
            initial, *losses = one["losses"]
            factors = ArmorFactors(here["left"], here["core"], here["right"], here["mask"], initial, losses)
        found[label] = PrunedMatrix(here["mask"], weight, factors, score, one["facts"])
    return found
