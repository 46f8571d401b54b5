"""Where scores enter: what a method returned, held against what was asked of it, alike in every family."""

from collections.abc import Mapping, Sequence

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
    said = type(found).__name__
    if isinstance(found, Tensor):
        said = f"{str(found.dtype).removeprefix('torch.')} of shape {list(found.shape)}"
    raise MethodError(
        f"{whose}: {by}() returned {said}, expected floats of shape {list(shape)}",
        hint=f"mend {by}() in the method's file",
    )


def check_named(found: object, named: Sequence[str], whose: str, by: str) -> Mapping[str, object]:
    """Return what a method gave by name, where it must have given something for each name.

    Args:
        found: What it returned.
        named: The names.
        whose: The method and what it looked at.
        by: Its function that did.

    Raises:
        MethodError: It is no mapping, or lacks a name.
    """
    if isinstance(found, Mapping) and all(name in found for name in named):
        return found
    said = f"{[*found]}" if isinstance(found, Mapping) else type(found).__name__
    raise MethodError(
        f"{whose}: {by}() returned {said}, expected a mapping with {[*named]}",
        hint=f"mend {by}() in the method's file",
    )
