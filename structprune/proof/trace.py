"""How stored tensors came to be what the files hold: their shapes before each stage, and after the last.

A plan that leaves other shapes names those that it found, and its architecture is their hash. So what left is
known also where the model before it is out of reach, as it is of one that was trained after it was pruned.
"""

from collections.abc import Iterator, Sequence

from structprune.proof.stage import Shapes, Stage


def trace(
    stages: Sequence[Stage], source: Shapes | None, files: Shapes
) -> tuple[list[Shapes | None], list[str]]:
    """Return the shapes before each stage and after the last, and where two tellings of them differ.

    Args:
        stages: All of them, in order.
        source: Stored tensor -> its shape in what the folder was made from; None where nobody knows.
        files: Stored tensor -> its shape in the files.

    Returns:
        Shapes by the names of their time, None where nobody tells them; and one line per problem.
    """
    found: list[Shapes | None] = []
    problems: list[str] = []
    shapes: Shapes | None = None
    for stage in stages:
        if source is not None and not stage.in_source:
            problems += _differences(shapes or {}, source, f"{stage.name}: before it, ")
            shapes, source = shapes or source, None
        if told := stage.plan.origin.before:
            shapes = shapes or told.shapes
            problems += _differences(told.shapes, shapes, f"{stage.name}: before it, ")
        found.append(shapes)
        shapes = None if shapes is None else stage.leaves(shapes)
    if shapes is not None and any(stage.restructures for stage in stages):
        problems += _differences(shapes, files, "")
    return [*found, shapes], problems


def _differences(due: Shapes, there: Shapes, where: str) -> Iterator[str]:
    """Yield how tensors are other than they are due; what else is there may be, as nothing reads it."""
    for name, shape in due.items():
        if name not in there or tuple(there[name]) != tuple(shape):
            found = list(there[name]) if name in there else "none"
            yield f"{where}{name}: shape {found}, {list(shape)} by the plans"
