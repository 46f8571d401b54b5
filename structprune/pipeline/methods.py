"""What methods there are, and what each is."""

from typing import Any

from structprune.pruners.pruner import names
from structprune.recipe.recipe import describe


def methods(name: str | None = None) -> dict[str, Any]:
    """Return what a method is, as `describe` tells it, or "methods": all of them.

    Args:
        name: One method; all unless given.

    Raises:
        UsageError: No such method.
    """
    return describe(name) if name is not None else {"methods": [describe(known) for known in names()]}
