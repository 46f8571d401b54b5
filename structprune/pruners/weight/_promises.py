"""What zeros promise of the files: how many weights leave every row, group or matrix."""

from collections.abc import Mapping, Sequence

from structprune.models.arch import Linear
from structprune.models.identity import names_of_matrix, stored_names
from structprune.models.names import Names
from structprune.plan.promise import Gone, Removed, Reshaped

Promise = Removed | Reshaped | Gone


def removed_promises(
    names: Names,
    targets: Sequence[Linear],
    leaving: Mapping[str, int],
    pattern: tuple[int, int] | None,
    *,
    by_matrix: bool,
) -> list[Promise]:
    """Return how many weights leave each linear, said as finely as the choice was made.

    Args:
        names: The model's.
        targets: The pruned linears.
        leaving: How many weights leave each, by label.
        pattern: (kept, of) where groups compete; then every group loses the same.
        by_matrix: Whether only a matrix's total is known, because its rows compete or a budget shares out.
    """
    if pattern is None and by_matrix:
        return [
            Removed(
                tensors=names_of_matrix(names, linear),
                per="matrix",
                removed=leaving[linear.label],
                transposed=linear.transposed,
                # Experts that are stored in one tensor are told apart by their index in it.
                expert=linear.expert if len(names.stored_of[linear.name]) == 1 else None,
            )
            for linear in targets
        ]
    # One promise for all that lose the same: a model has hundreds of matrices and few shapes.
    alike: dict[tuple[int, bool], list[Linear]] = {}
    for linear in targets:
        each = pattern[1] - pattern[0] if pattern else leaving[linear.label] // len(linear.weight)
        alike.setdefault((each, linear.transposed), []).append(linear)
    return [
        Removed(
            tensors=tuple(stored_names(names, found)),
            per="group" if pattern else "row",
            removed=each,
            of=pattern[1] if pattern else 0,
            transposed=transposed,
        )
        for (each, transposed), found in alike.items()
    ]
