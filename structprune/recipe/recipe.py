"""A recipe: everything a run was asked to do, as a value that a YAML file spells out.

The later wins: defaults, the file, `--set key=value`, the command line's own flags. What cannot be stops
here, before any model is opened, with the key's path, what was found and what is expected.
"""

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, PrivateAttr, SerializeAsAny, ValidationInfo, field_validator

from structprune.errors import UsageError
from structprune.models.opening import Opening
from structprune.pruners.pruner import Pruner, find, names
from structprune.recipe.changes import changes_of
from structprune.recipe.fields import build, keys_of, put, quote
from structprune.recipe.options import CalibrationOptions, EvaluateOptions, RecoverOptions, Text, Where
from structprune.storage import strict_yaml

__all__ = [
    "CalibrationOptions",
    "EvaluateOptions",
    "Recipe",
    "RecoverOptions",
    "assemble",
    "choose_recipe",
    "describe",
    "load",
]


class Recipe(Where):
    """A run of `structprune prune`.

    Args:
        model: A folder, a hub name, or "demo" for the built-in model.
        output: The folder to write.
        prune: One stage or several, each `method:` with that method's fields; always a tuple here.
        revision: Which commit or branch of a hub model.
        calibration: What the pruner looks at.
        recover: Train afterwards; not unless given.
        evaluate: What to measure beyond the default.
    """

    model: Text
    output: Path
    prune: Annotated[tuple[SerializeAsAny[Pruner], ...], Field(min_length=1)]
    revision: Text | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    recover: RecoverOptions | None = None
    evaluate: EvaluateOptions | None = None

    _source: str | None = PrivateAttr(default=None)

    @field_validator("prune", mode="before")
    @classmethod
    def _stages(cls, value: object, info: ValidationInfo) -> object:
        parts = value if isinstance(value, list | tuple) else [value]
        seed = info.data.get("seed", 0)
        return tuple(
            part
            if isinstance(part, Pruner)
            else stage(part, f"prune.{index}" if len(parts) > 1 else "prune", seed)
            for index, part in enumerate(parts)
        )

    @field_validator("recover", mode="before")
    @classmethod
    def _one_seed(cls, value: object, info: ValidationInfo) -> object:
        seed = info.data.get("seed", 0)
        if isinstance(value, RecoverOptions):
            return value if "seed" in value.model_fields_set else value.model_copy(update={"seed": seed})
        return {"seed": seed, **value} if isinstance(value, Mapping) else value

    def opening(self, asked: Opening) -> Opening:
        """Return how the recipe's model is opened: in its own dtype and on its own device.

        Args:
            asked: How the run opens models otherwise.

        Raises:
            UsageError: It asks for another dtype or device than the recipe.
        """
        for name in ("dtype", "device"):
            if getattr(asked, name) not in ("auto", getattr(self, name)):
                raise UsageError(
                    f"{name} {getattr(asked, name)!r} differs from the recipe's {getattr(self, name)!r}",
                    hint=f"set {name} in the recipe, which is saved with the result",
                )
        return replace(asked, dtype=self.dtype, device=self.device)

    def text(self) -> str:
        """Return the recipe as YAML that runs again: the file verbatim, or every key spelled out."""
        if self._source is not None:
            return self._source
        data = self.model_dump(mode="json", exclude_none=True)
        stages = [
            {"method": pruner.method(), **pruner.model_dump(mode="json", exclude_none=True)}
            for pruner in self.prune
        ]
        data["prune"] = stages[0] if len(stages) == 1 else stages
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    def with_stage(self, stage: Pruner, output: Path) -> Self:
        """Return the recipe with another only stage and output; what it was read from is another's text."""
        other = self.model_copy(update={"prune": (stage,), "output": output})
        other._source = None
        return other

    def remember(self, source: str) -> Self:
        """Keep the file that this recipe is an unchanged reading of; returns the recipe."""
        self._source = source
        return self


def stage(raw: object, path: str = "prune", seed: int = 0) -> Pruner:
    """Return the pruner that a stage of a recipe names.

    Args:
        raw: A method's name, or its fields beside `method:`.
        path: The stage's dotted path, for errors.
        seed: The recipe's; a method with a seed of its own takes it over unless told another.

    Raises:
        UsageError: No such method, or fields that it cannot have.
    """
    fields = {"method": raw} if isinstance(raw, str) else raw
    if not isinstance(fields, Mapping):
        raise UsageError(
            f"{path}: found {quote(raw)}, expected a method and its fields",
            hint="such as `method: magnitude` with `sparsity: 0.5`",
        )
    method = fields.get("method")
    if not isinstance(method, str):
        said = "is missing" if method is None else f"is {quote(method)}, expected text"
        raise UsageError(
            f"{path}.method {said}", hint=f"--method or `method:` is one of: {', '.join(names())}"
        )
    pruner = find(method)
    rest = {key: value for key, value in fields.items() if key != "method"}
    if "seed" in pruner.model_fields:
        rest.setdefault("seed", seed)
    return build(pruner, rest, path)


def choose_recipe(
    model: str, *, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None
) -> Recipe:
    """Return the recipe that a command line asks for: a file that ends in .yaml, or a model and flags.

    Args:
        model: What stands first.
        sets: As for `load`.
        flags: As for `load`.

    Raises:
        UsageError: As for `load`; or the output is missing.
    """
    path = Path(model)
    if path.suffix.lower() in (".yaml", ".yml") and not path.is_dir():
        return load(path, sets=sets, flags=flags)
    chosen = {"model": model, **(flags or {})}
    if chosen.get("output") is None:
        raise UsageError(
            "OUT is missing",
            hint="`structprune prune MODEL OUT --method NAME`, or `structprune prune RECIPE.yaml`",
        )
    return assemble({}, sets=sets, flags=chosen)


def load(path: Path, *, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None) -> Recipe:
    """Return the recipe of a YAML file, with what the command line changes.

    Args:
        path: The file; paths inside it are relative to the working directory.
        sets: "key=value" each; a dotted path, or the name of a field of the method.
        flags: Dotted path -> value; None changes nothing. These win over `sets`.

    Raises:
        UsageError: The file is missing or can be misread, or as for `assemble`.
    """
    raw, text = strict_yaml.read(path)
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path}: found {quote(raw)}, expected the keys model, output and prune",
            hint="such as `model: demo`, `output: OUT`, `prune: {method: magnitude, sparsity: 0.5}`",
        )
    chosen = {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        recipe = assemble(raw, sets=sets, flags=chosen)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None
    return recipe if sets or chosen else recipe.remember(text)


def assemble(
    raw: Mapping[str, Any], *, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None
) -> Recipe:
    """Return the recipe that plain values, `--set` and flags add up to; the later wins.

    Raises:
        UsageError: An unknown key, a missing one or an impossible value.
    """
    merged = copy.deepcopy(dict(raw))
    merged.setdefault("prune", {})  # an empty stage is told which methods there are
    for key, value in changes_of(sets, flags):
        _place(merged, key, value)
    return build(Recipe, merged)


def describe(method: str) -> dict[str, Any]:
    """Return what a stage of this method is: "name", "family", "about", "source", "needs_data" and "fields".

    Raises:
        UsageError: No such method.
    """
    pruner = find(method)
    text = inspect.getdoc(sys.modules[pruner.__module__]) or ""
    sources = [
        line.removeprefix("Source:").strip() for line in text.splitlines() if line.startswith("Source:")
    ]
    return {
        "name": method,
        "family": names()[method],
        "about": text.partition("\n")[0],
        "source": sources[0] if sources else "",
        "needs_data": pruner.needs_data,
        "fields": keys_of(pruner),
    }


def _place(raw: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key; one that no recipe has is a field of the only stage."""
    keys = key.split(".")
    if keys[0] not in Recipe.model_fields:
        keys = ["prune", *keys]
    stages = raw.get("prune")
    if keys[0] != "prune" or len(keys) == 1 or stages is None:
        return put(raw, keys, value)
    several = stages if isinstance(stages, list) else [stages]
    number, rest = (int(keys[1]), keys[2:]) if keys[1].isdecimal() else (0, keys[1:])
    if len(several) > 1 and not keys[1].isdecimal():
        raise UsageError(
            f"{'.'.join(keys)}: the recipe has {len(several)} stages",
            hint=f"say which: prune.0.{'.'.join(rest)}",
        )
    if number >= len(several) or not rest:
        raise UsageError(
            f"{key}: the recipe has {len(several)} stages, counted from 0",
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
