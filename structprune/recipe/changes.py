"""What a command line changes: `--set key=value` and flags, and the options that they add up to."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from structprune.errors import UsageError
from structprune.recipe.fields import OptionGroup, build, put
from structprune.storage import strict_yaml

P = TypeVar("P", bound=OptionGroup)


def choose_options(
    kind: type[P], *, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None
) -> P:
    """Return the options of a command of its own, `evaluate` or `recover`, from flags and `--set`.

    Raises:
        UsageError: An unknown key or an impossible value.
    """
    raw: dict[str, Any] = {}
    for key, value in changes_of(sets, flags):
        put(raw, key.split("."), value)
    return build(kind, raw)


def changes_of(sets: Sequence[str], flags: Mapping[str, object] | None) -> list[tuple[str, object]]:
    """Return the keys that a command line sets, with their values, the later wins.

    Args:
        sets: "key=value" each.
        flags: Dotted path -> value; None changes nothing.

    Raises:
        UsageError: One of `sets` is no key with a value.
    """
    changes: list[tuple[str, object]] = []
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise UsageError(
                f"--set {text!r:.60}: expected key=value",
                hint="such as --set sparsity=0.5 or --set calibration.samples=64",
            )
        changes.append((key.strip(), strict_yaml.parse(value, f"--set {key.strip()}")))
    return changes + [(key, value) for key, value in (flags or {}).items() if value is not None]
