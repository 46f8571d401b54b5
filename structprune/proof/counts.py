"""Whether what a stage promised is what was measured: counts of rows, groups, matrices; shapes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from structprune.plan.promise import Removed
from structprune.proof.measure import Measured, Place, Rows
from structprune.proof.stage import Shapes, Stage

# Group sizes looked for in every model, and the most weights in a group that still make a pattern.
COMMON = {4: 2, 8: 4}


def check(
    stage: Stage, rows: Mapping[str, Rows], found: Mapping[str, Measured], lost: int | None
) -> tuple[list[str], str]:
    """Return what is wrong with the counts of a stage, and what to say when nothing is.

    Args:
        stage: The stage.
        rows: What its masks remove, by stored tensor.
        found: What the files hold, by stored tensor that no later stage changed the shape of.
        lost: What `removed` returned of the stage.
    """
    problems = [f"{name}: masked, but not promised" for name in stage.masked if name not in stage.prunable]
    for promise in stage.counted:
        problems += _problems(promise, rows, found)
    promised = stage.plan.promises
    if promised is None:
        return problems, "nothing was promised"
    if lost is not None and lost != promised.removed:
        problems.append(f"{lost} of {promised.of} {promised.unit} removed, expected {promised.removed}")
    said = sorted({_sentence(promise) for promise in stage.counted})
    how = "are not computed while the model runs" if stage.runs else "leave with their tensors"
    shapes = f"{promised.removed} of {promised.of} {promised.unit} {how}"
    return problems, "; ".join(said) or (shapes if promised.removed else "nothing was to leave")


def check_shapes(stage: Stage, shapes: Shapes, later: Sequence[Stage]) -> list[str]:
    """Return what is wrong with the tensors that a stage reshapes, creates or takes away.

    Args:
        stage: The stage.
        shapes: Stored tensor -> its shape in the files.
        later: The stages after it, which may do more to the same tensors.
    """
    touched = {name for one in later for name in (*one.shapes, *one.gone)}
    problems = [
        f"{name}: shape {list(shapes[name]) if name in shapes else 'none'}, {list(shape)} was promised"
        for name, shape in stage.shapes.items()
        if name not in touched | stage.left and shapes.get(name) != tuple(shape)
    ]
    return problems + [f"{name}: is there, though it was to go" for name in stage.gone if name in shapes]


def check_lists(stage: Stage, shapes: Shapes) -> list[str]:
    """Return what is wrong with the numbered lists of which a stage leaves some members.

    Args:
        stage: The stage.
        shapes: Stored tensor -> its shape in the files.
    """
    problems = [f"{name}: is cut, but not promised" for name in stage.members if name not in stage.listed]
    for name, promise in stage.listed.items():
        kept = stage.members.get(name, [])
        if len(kept) != promise.stay:
            problems.append(f"{name}: {len(kept)} members stay, {promise.stay} of {promise.of} were promised")
        if kept != sorted({*kept} & {*range(promise.of)}):
            problems.append(f"{name}: members {kept} stay, not ascending numbers below {promise.of}")
        now = stage.list_now(name)
        if now is None:
            continue
        inside = (key.removeprefix(f"{now}.").split(".")[0] for key in shapes if key.startswith(f"{now}."))
        numbers = {int(number) for number in inside if number.isdigit()}
        if numbers != set(range(promise.stay)):
            problems.append(f"{now}: {len(numbers)} members in the files, {promise.stay} were promised")
    return problems


def removed(
    stages: Sequence[Stage], rows: Sequence[Mapping[str, Rows]], shapes: Sequence[Shapes | None]
) -> list[int | None]:
    """Return how many of its units each stage removed, as measured; None where the source would have to tell.

    Args:
        stages: All of them, in order.
        rows: Of each what its masks remove, by stored tensor.
        shapes: What was before each, and after the last; None where nobody tells.
    """
    found: list[int | None] = []
    for stage, masked, (before, after) in zip(stages, rows, pairwise(shapes), strict=True):
        if stage.runs:  # nothing of it is in the files
            found.append(None)
        elif stage.counted or not stage.restructures:
            found.append(sum(int(one.removed.sum()) for one in masked.values()))
        else:
            found.append(None if before is None or after is None else stage.lost(before, after))
    return found


def pattern(prunable: Iterable[Measured], promised: Iterable[tuple[int, int]]) -> str:
    """Return the "N:M" that every prunable linear holds, promised ones first; "unstructured" or "dense"."""
    measured = list(prunable)
    if not any(one.zeros for one in measured):
        return "dense"
    fullest = {of: max(one.fullest[of] for one in measured) for of in measured[0].fullest}
    for kept, of in sorted(promised):
        if fullest[of] <= kept:
            return f"{kept}:{of}"
    for of, most in COMMON.items():
        if 0 < fullest[of] <= most:
            return f"{fullest[of]}:{of}"
    return "unstructured"


def per_block(found: Mapping[str, Measured], where: Mapping[str, Place]) -> list[dict[str, Any]]:
    """Return parameters, zeros and sparsity of each block's linears, and of each kind of linear in it."""
    blocks: dict[int, dict[str, dict[str, int]]] = defaultdict(dict)
    for name, place in where.items():
        if name in found:
            kind = blocks[place.block].setdefault(place.kind, {"parameters": 0, "zeros": 0})
            kind["parameters"] += found[name].size
            kind["zeros"] += found[name].zeros
    rows = []
    for index, kinds in sorted(blocks.items()):
        size, zeros = (sum(kind[what] for kind in kinds.values()) for what in ("parameters", "zeros"))
        share = zeros / size if size else 0.0
        rows.append(
            {"block": index, "sparsity": share, "parameters": size, "zeros": zeros, "matrices": kinds}
        )
    return rows


def _sentence(promise: Removed) -> str:
    if promise.per == "group":
        return f"{promise.of - promise.removed} of every {promise.of} consecutive inputs are left"
    return f"every {promise.per} lost as many weights as promised"


def _problems(promise: Removed, rows: Mapping[str, Rows], found: Mapping[str, Measured]) -> Iterator[str]:
    if promise.per == "matrix":
        removed = sum(_of_matrix(rows.get(name), promise) for name in promise.tensors)
        if removed != promise.removed:
            matrix = promise.tensors[0] + ("" if promise.expert is None else f"[{promise.expert}]")
            yield f"{matrix}: {removed} weights removed, expected {promise.removed}"
        return
    for name in promise.tensors:
        if name not in rows:
            # No mask is written for a tensor from which nothing leaves.
            if promise.removed:
                yield f"{name}: no weight removed, expected {promise.removed} in every {promise.per}"
        elif promise.per == "row":
            yield from _row_problems(name, rows[name], promise.removed)
        else:
            yield from _group_problems(name, rows[name], found.get(name), promise)


def _of_matrix(rows: Rows | None, promise: Removed) -> int:
    if rows is None:
        return 0
    if promise.expert is None:
        return int(rows.removed.sum())
    return int(rows.removed.view(rows.experts, -1)[promise.expert].sum())


def _row_problems(name: str, rows: Rows, due: int) -> Iterator[str]:
    wrong = (rows.removed != due).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        yield f"{name}: {int(rows.removed[row])} weights removed from row {row}, expected {due}"


def _group_problems(name: str, rows: Rows, one: Measured | None, promise: Removed) -> Iterator[str]:
    of, kept = promise.of, promise.of - promise.removed
    fewest, most = rows.groups.get(of, (-1, -1))
    if (fewest, most) != (promise.removed, promise.removed):
        yield f"{name}: {fewest} to {most} removed from a group of {of} inputs, expected {promise.removed}"
    elif one is not None and one.fullest.get(of, 0) > kept:
        yield f"{name}: a group of {of} inputs holds {one.fullest[of]} weights, expected at most {kept}"
