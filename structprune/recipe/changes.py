"""What a command line changes: `--set key=value` and flags; one path names one key, in every command.

The path of a key is where it stands in a recipe, `evaluate.windows`. A command also knows the keys of the
groups that it reads by their last part alone.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from structprune.errors import UsageError, nearest
from structprune.recipe.fields import put, quote
from structprune.recipe.options import BenchOptions, CalibrationOptions, EvaluateOptions, RecoverOptions
from structprune.storage import strict_yaml

GROUPS: dict[str, type[BaseModel]] = {
    "calibration": CalibrationOptions,
    "recover": RecoverOptions,
    "evaluate": EvaluateOptions,
    "bench": BenchOptions,
}


@dataclass(frozen=True)
class Reading:
    """Which keys of a recipe a command reads.

    Attributes:
        command: Its name.
        keys: The keys at the top of a recipe, groups among them.
        short: The groups whose keys need no path.
        stages: It reads the stages of a recipe; a key that is none of the above is a field of the only one.
    """

    command: str
    keys: tuple[str, ...]
    short: tuple[str, ...]
    stages: bool = False

    def path_of(self, key: str) -> list[str]:
        """Return the path of what a user called a key, outermost first.

        Raises:
            UsageError: This command reads no such key.
        """
        path = key.split(".")
        first = path[0]
        if first in self.keys or (first == "prune" and self.stages):
            return path
        homes = [group for group in self.short if first in GROUPS[group].model_fields]
        if homes:  # a test holds that there is never more than one
            return [homes[0], *path]
        if self.stages and first not in GROUPS:
            return ["prune", *path]
        if first in GROUPS or first in ("prune", "model", "output"):
            raise UsageError(
                f"--set {key}: `structprune {self.command}` does not read it",
                hint=f"it reads {', '.join(self.keys)}",
            )
        known = [*self.keys, *(name for group in self.short for name in GROUPS[group].model_fields)]
        raise UsageError(f"--set {key}: there is no such key", hint=nearest(first, known))


ANYWHERE = ("seed", "device", "dtype")
PRUNE = Reading(
    "prune",
    ("model", "output", "revision", "tokenizer", *ANYWHERE, "calibration", "recover", "evaluate", "bench"),
    ("calibration",),
    stages=True,
)
RECOVER = Reading(
    "recover", ("device", "tokenizer", "revision", "recover", "evaluate", "bench"), ("recover",)
)
APPLY = Reading("apply", ("revision",), ())
EVALUATE = Reading("evaluate", ("device", "dtype", "tokenizer", "revision", "evaluate"), ("evaluate",))
SHOW = Reading("show", ("seed", "device", "dtype"), ())
BENCH = Reading("bench", ("device", "dtype", "revision", "bench"), ("bench",))


def merge(
    raw: Mapping[str, Any],
    reading: Reading,
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Return plain values with what a command line changes; the later wins.

    Args:
        raw: What a file says.
        reading: Which keys there are.
        sets: "key=value" each.
        flags: Dotted path -> value; None changes nothing.

    Raises:
        UsageError: One of `sets` is no key with a value, or there is no such key.
    """
    merged = copy.deepcopy(dict(raw))
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise UsageError(
                f"--set {text!r:.60}: expected key=value",
                hint="such as --set sparsity=0.5 or --set calibration.samples=64",
            )
        _place(merged, reading.path_of(key.strip()), strict_yaml.parse(value, f"--set {key.strip()}"))
    for key, given in (flags or {}).items():
        if given is not None:
            _place(merged, key.split("."), given)
    return merged


def _place(raw: dict[str, Any], path: list[str], value: object) -> None:
    """Set a key; one of a stage in the only stage, unless the path says in which."""
    stages = raw.get("prune")
    if path[0] != "prune" or len(path) == 1:
        return put(raw, path, value)
    several = stages if isinstance(stages, list) else [{} if stages is None else stages]
    number, rest = (int(path[1]), path[2:]) if path[1].isdecimal() else (0, path[1:])
    if len(several) > 1 and not path[1].isdecimal():
        raise UsageError(
            f"{'.'.join(path)}: the recipe has {len(several)} stages",
            hint=f"say which: prune.0.{'.'.join(rest)}",
        )
    if number >= len(several) or not rest:
        raise UsageError(
            f"{'.'.join(path)}: the recipe has {len(several)} stage{'s' * (len(several) != 1)}, "
            "counted from 0",
            hint=f"name one: prune.0 to prune.{len(several) - 1}, then its field",
        )
    if isinstance(several[number], str):
        several[number] = {"method": several[number]}
    if not isinstance(several[number], dict):
        raise UsageError(
            f"prune: found {quote(several[number])}, expected a method and its fields",
            hint="such as `method: magnitude` with `sparsity: 0.5`",
        )
    put(several[number], rest, value)
    raw["prune"] = several
    return None
