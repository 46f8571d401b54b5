"""Whether exactly the asked number of weights left every row, matrix or group, by what was measured."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from structprune.proof.measure import Measured, Place, Stage

# Group sizes looked for in every model, and the most weights in a group that still make a pattern.
COMMON = {4: 2, 8: 4}


def by_matrix(stage: Stage) -> bool:
    """Tell whether a plan counts whole matrices, not each row."""
    whole = stage.plan.config.get("compare") == "matrix" or "budget" in stage.plan.facts
    return stage.pattern is None and whole


def check(
    stage: Stage, number: int, found: Mapping[str, Measured], where: Mapping[str, Place]
) -> tuple[list[str], str]:
    """Return what is wrong with a plan's counts, and what to say when nothing is.

    Args:
        stage: The plan.
        number: Its place among the plans, as in `Measured.rows`.
        found: What was measured, by stored tensor.
        where: Where linears stand.
    """
    asked = stage.plan.config.get("sparsity")
    names = [name for name in found if name in stage.prunable]
    stray = [
        f"{name}: masked, but not among those chosen" for name in stage.masked if name not in stage.prunable
    ]
    if stage.pattern is not None:
        kept, of = stage.pattern
        wrong = (line for name in names for line in _group_problems(name, found[name], number, kept, of))
        fine = f"at most {kept} of every {of} consecutive inputs are left in {len(names)} tensors"
        return stray + list(wrong), fine
    if not isinstance(asked, int | float):
        return stray, "the method asks for no count of weights"
    # The decimal number that the user wrote, not its binary neighbour.
    fraction = Fraction(repr(asked))
    if "budget" in stage.plan.facts:
        return _check_budget(stage, stray, names, found, where, number, fraction)
    if by_matrix(stage):
        fine = f"floor({asked} x weights) removed from every one of {len(names)} tensors"
        return stray + list(
            _matrix_problems(names, found, where, number, lambda _, n: int(n * fraction))
        ), fine
    wrong = (line for name in names for line in _row_problems(name, found[name], where, number, fraction))
    return stray + list(wrong), f"floor({asked} x inputs) removed from every row of {len(names)} tensors"


def pattern(prunable: Iterable[Measured], asked: Iterable[tuple[int, int] | None]) -> str:
    """Return the "N:M" that every prunable linear holds, asked ones first; else "unstructured" or "dense"."""
    measured = list(prunable)
    if not any(one.zeros for one in measured):
        return "dense"
    fullest = {of: max(one.fullest[of] for one in measured) for of in measured[0].fullest}
    for kept, of in filter(None, asked):
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


def _check_budget(
    stage: Stage,
    problems: list[str],
    names: Sequence[str],
    found: Mapping[str, Measured],
    where: Mapping[str, Place],
    number: int,
    fraction: Fraction,
) -> tuple[list[str], str]:
    """Check unequal shares: each matrix against the plan's, and their sum against what was asked."""
    shares: Mapping[str, int] = stage.plan.facts["budget"]
    problems = [
        *problems,
        *_matrix_problems(names, found, where, number, lambda name, _: shares.get(name, 0)),
    ]
    size = sum(found[name].size for name in names)
    total, left = int(size * fraction), stage.plan.config["budget"].get("parameters")
    if left is None and sum(shares.values()) != total:
        problems.append(f"{sum(shares.values())} of {size} weights shared out, expected {total}")
    return problems, f"{sum(shares.values()):,} weights removed, as shared out among {len(shares)} matrices"


def _group_problems(name: str, one: Measured, number: int, kept: int, of: int) -> Iterator[str]:
    rows = one.rows[number]
    if rows is None or (rows.fewest, rows.most) != (of - kept, of - kept):
        removed = "none" if rows is None else f"{rows.fewest} to {rows.most}"
        yield f"{name}: {removed} removed from a group of {of} inputs, expected {of - kept}"
    elif one.fullest[of] > kept:
        yield f"{name}: a group of {of} inputs holds {one.fullest[of]} weights, expected at most {kept}"


def _row_problems(
    name: str, one: Measured, where: Mapping[str, Place], number: int, fraction: Fraction
) -> Iterator[str]:
    rows = one.rows[number]
    expected = int(one.width * fraction)
    if name not in where:
        yield f"{name}: no linear of a decoder block"
    elif rows is None:
        # No mask is written for a tensor from which nothing leaves; then no whole weight may be due.
        if expected:
            yield f"{name}: no weight removed, expected {expected} of {one.width} in every row"
    else:
        wrong = (rows.removed != expected).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            seen = int(rows.removed[row])
            yield f"{name}: {seen} of {one.width} weights removed from row {row}, expected {expected}"


def _matrix_problems(
    names: Iterable[str],
    found: Mapping[str, Measured],
    where: Mapping[str, Place],
    number: int,
    due: Callable[[str, int], int],
) -> Iterator[str]:
    """Yield what is wrong with whole matrices; `due` tells how many leave one, by its name and size."""
    sizes: dict[str, int] = defaultdict(int)
    removed: dict[str, int] = defaultdict(int)
    for name in names:
        one = found[name]
        rows = one.rows[number]
        place = where.get(name)
        if place is None:
            yield f"{name}: no linear of a decoder block"
            continue
        for expert in range(place.experts):
            matrix = f"{place.matrix}[{expert}]" if place.experts > 1 else place.matrix
            sizes[matrix] += one.size // place.experts
            if rows is not None:
                removed[matrix] += int(rows.removed.view(place.experts, -1)[expert].sum())
    for matrix, size in sizes.items():
        if removed[matrix] != due(matrix, size):
            yield f"{matrix}: {removed[matrix]} of {size} weights removed, expected {due(matrix, size)}"
