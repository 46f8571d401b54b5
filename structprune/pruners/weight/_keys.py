"""Keys of a recipe that moved, or that a method cannot have: each is refused in words of its own."""

from collections.abc import Collection, Mapping
from typing import Any


def check_keys(method: str, fields: Collection[str], data: Mapping[str, Any]) -> None:
    """Check the keys of a method of the weight family.

    Args:
        method: Its name.
        fields: Those it has.
        data: What a recipe says.

    Raises:
        ValueError: One belongs elsewhere.
    """
    repair = data.get("repair")
    by_name = isinstance(repair, str) and repair != "none"
    if "damping" in data and ("damping" not in fields or by_name):
        name = repair if by_name else "obs"
        raise ValueError(
            f"damping: it is a field of the repair; write repair: {{name: {name}, damping: ...}}"
        )
    if data.get("keep_scores") and "keep_scores" not in fields:
        raise ValueError(f"keep_scores: {method} chooses and updates at once and has no scores to keep")
