"""What a method returned, held against what was asked of it where it enters, alike in every family."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from structprune.errors import MethodError, QualityError


def check_scores(found: object, shape: Sequence[int], whose: str, by: str = "score") -> Tensor:
    """Return what a method gave as scores: each is a number, or infinite.

    Args:
        found: What it returned.
        shape: What is expected.
        whose: The method and what it scored: "wanda: model.layers.0.mlp.up_proj".
        by: Its function that did.

    Raises:
        MethodError: It is no tensor of floats of that shape.
        QualityError: A score is NaN: it has no rank.
    """
    scores = check_shape(found, shape, whose, by)
    # NaN if there is one, at a fraction of the cost of isnan.
    if scores.numel() and bool(scores.max().isnan()):
        raise QualityError(
            f"{whose}: {int(scores.isnan().sum()):,} of {scores.numel():,} scores are NaN",
            hint=f"look for NaN in what {by}() computes, in the weights and in the calibration statistics",
        )
    return scores


@contextmanager
def unchanged(weight: Tensor, whose: str, by: str = "score") -> Iterator[None]:
    """Hold a method to look at a weight and leave it as it is, for the length of a `with`.

    Args:
        weight: What it is given.
        whose: As for `check_scores`.
        by: As for `check_scores`.

    Raises:
        MethodError: It wrote into it.
    """
    before = weight._version
    yield
    if weight._version != before:
        raise MethodError(
            f"{whose}: {by}() changed the weight that it was given",
            hint="compute on a copy: weight.abs(), not weight.abs_()",
        )


def check_shape(found: object, shape: Sequence[int], whose: str, by: str = "score") -> Tensor:
    """Return what a method gave as scores, as far as one can tell before looking at them.

    Args:
        found: As for `check_scores`.
        shape: As for `check_scores`.
        whose: As for `check_scores`.
        by: As for `check_scores`.

    Raises:
        MethodError: It is no tensor of floats of that shape.
    """
    if isinstance(found, Tensor) and found.is_floating_point() and tuple(found.shape) == tuple(shape):
        return found
    raise _refusal(found, f"floats of shape {list(shape)}", whose, by)


def check_mask(found: object, shape: Sequence[int], whose: str, by: str) -> Tensor:
    """Return what a method gave as a mask.

    Args:
        found: As for `check_scores`.
        shape: As for `check_scores`.
        whose: As for `check_scores`.
        by: As for `check_scores`.

    Raises:
        MethodError: It is no tensor of bools of that shape.
    """
    if isinstance(found, Tensor) and found.dtype == torch.bool and tuple(found.shape) == tuple(shape):
        return found
    raise _refusal(found, f"bool of shape {list(shape)}", whose, by)


def check_each(found: object, kind: type, named: Sequence[str], whose: str, by: str) -> Mapping[Any, Any]:
    """Return what a method gave of several things, one value each.

    Args:
        found: What it returned.
        kind: Of every value.
        named: Of what there must be one.
        whose: As for `check_scores`.
        by: As for `check_scores`.

    Raises:
        MethodError: It is no mapping to such values, or lacks one.
    """
    fits = isinstance(found, Mapping) and all(isinstance(one, kind) for one in found.values())
    if isinstance(found, Mapping) and fits and all(name in found for name in named):
        return found
    expected = f"a mapping to {kind.__name__}" + (f" with {[*named]}" if named else "")
    raise _refusal(found, expected, whose, by)


def _refusal(found: object, expected: str, whose: str, by: str) -> MethodError:
    said = type(found).__name__
    if isinstance(found, Tensor):
        said = f"{str(found.dtype).removeprefix('torch.')} of shape {list(found.shape)}"
    elif isinstance(found, Mapping):
        said = f"a mapping with {[*found]}"
    return MethodError(
        f"{whose}: {by}() returned {said}, expected {expected}", hint=f"mend {by}() in the method's file"
    )
