"""What methods there are, and what each is."""

from typing import Any

from structprune.errors import MethodError, UsageError
from structprune.pruners.catalogue import docstring, find, names
from structprune.recipe.fields import keys_of


def methods(name: str | None = None) -> dict[str, Any]:
    """Return what a method is, as `describe` tells it, or "methods": all of them, without their fields.

    Args:
        name: One method; all unless given.

    Raises:
        UsageError: No such method.
    """
    return describe(name) if name is not None else {"methods": [_introduce_any(known) for known in names()]}


def introduce(method: str) -> dict[str, Any]:
    """Return what the file of a method says of itself: "name", "family", "about" and "source".

    Raises:
        UsageError: No such method.
    """
    text = docstring(method)
    sources = [
        line.removeprefix("Source:").strip() for line in text.splitlines() if line.startswith("Source:")
    ]
    return {
        "name": method,
        "family": names()[method],
        "about": text.partition("\n")[0],
        "source": sources[0] if sources else "",
    }


def _introduce_any(method: str) -> dict[str, Any]:
    """Return what `introduce` does, or what is wrong with the method: one file hides no other method."""
    try:
        return introduce(method)
    except (MethodError, UsageError) as error:
        return {"name": method, "family": names()[method], "about": error.message, "source": ""}


def describe(method: str) -> dict[str, Any]:
    """Return what a method is: as `introduce` does, and "needs_data" and "fields".

    Raises:
        UsageError: No such method.
    """
    pruner = find(method)
    return introduce(method) | {
        "needs_data": pruner.model_validate({}).looks_at_data,
        "fields": keys_of(pruner),
    }
