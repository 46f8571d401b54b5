"""A recipe as far as it can be read without its methods: what cannot be stops here, within a moment.

The fields of a method are the attributes of its class, which stands on torch and transformers. All else that
a recipe or a command line says is checked before either is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationInfo, field_validator, model_validator

from structprune.errors import UsageError
from structprune.pruners.catalogue import check_name, names
from structprune.recipe.changes import PRUNE, Reading, merge
from structprune.recipe.fields import build, quote
from structprune.recipe.options import CalibrationOptions, EvaluateOptions, RecoverOptions, Text, Where
from structprune.recipe.places import with_places
from structprune.storage import strict_yaml

S = TypeVar("S", bound="Settings")


class Settings(Where):
    """What a recipe says beside the model and its stages.

    Args:
        revision: Which commit or branch of a hub model.
        tokenizer: A folder with the tokenizer, where the model's own has none or another is meant.
        calibration: What the pruner looks at.
        recover: Train afterwards; not unless given.
        evaluate: What to measure; false for nothing.
    """

    revision: Text | None = None
    tokenizer: Text | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    recover: RecoverOptions | None = None
    evaluate: EvaluateOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_evaluation(cls, data: object) -> object:
        if isinstance(data, Mapping) and data.get("evaluate") is False:
            return {**data, "evaluate": {"skip": True}}
        return data

    @field_validator("recover", mode="before")
    @classmethod
    def _one_seed(cls, value: object, info: ValidationInfo) -> object:
        seed = info.data.get("seed", 0)
        if isinstance(value, RecoverOptions):
            return value if "seed" in value.model_fields_set else value.model_copy(update={"seed": seed})
        return {"seed": seed, **value} if isinstance(value, Mapping) else value


class Draft(Settings):
    """A recipe whose stages are known by the names of their methods alone.

    Args:
        model: A folder, a hub name, or "demo" for the built-in model.
        output: The folder to write.
        prune: One stage or several, each `method:` with that method's fields.
    """

    model: Text
    output: Path
    prune: Any

    @field_validator("prune", mode="before")
    @classmethod
    def _stages(cls, value: object, info: ValidationInfo) -> object:
        for path, part in stage_paths(value):
            method_and_fields(part, path)
        return value


@dataclass(frozen=True)
class Request:
    """A recipe as it was asked for.

    Attributes:
        raw: Its keys with plain values.
        where: The file that it was read from, for errors; empty where there is none.
        verbatim: The text of that file, where nothing was changed.
    """

    raw: Mapping[str, Any]
    where: str = ""
    verbatim: str | None = None

    def build(self, owner: type[S]) -> S:
        """Return it as a draft, or as a whole recipe.

        Raises:
            UsageError: An unknown key, a missing one or an impossible value.
        """
        try:
            return build(owner, {"prune": {}, **self.raw})  # an empty stage is told which methods there are
        except UsageError as error:
            if not self.where:
                raise
            raise UsageError(f"{self.where}: {error.message}", hint=error.hint) from None


def request_recipe(
    model: str | None,
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> Request:
    """Return what a command line asks for, checked but for the fields of its methods.

    Args:
        model: What stands first: a model, or a recipe, which is a file that ends in .yaml; None for nothing.
        config: A recipe that a flag names; its paths are relative to the working directory.
        sets: "key=value" each; the path of a key, or the name of a field of the method or the calibration.
        flags: Path -> value; None changes nothing. These win over `sets`.

    Raises:
        UsageError: The file is missing or can be misread, a key is unknown, a value impossible; or a model
            or an output is missing.
    """
    changes = {key: value for key, value in (flags or {}).items() if value is not None}
    if model is not None and _is_recipe(model):
        if config is not None:
            raise UsageError(f"two recipes: {model} and {config}", hint="give one of them")
        config = Path(model)
    elif model is not None:
        changes["model"] = model
    if config is None:
        _check_places(changes)
    raw, text = read_recipe(config) if config else ({}, None)
    merged = merge(raw, PRUNE, sets, changes)
    request = Request(merged, str(config or ""), None if sets or changes else text)
    request.build(Draft)
    return request


def choose_settings(
    reading: Reading,
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """Return what a command reads that takes no whole recipe, such as `evaluate`.

    Args:
        reading: Which keys those are.
        config: A recipe; its model, output and stages are passed over.
        sets: As for `request_recipe`; short are the keys of the command's own group.
        flags: As for `request_recipe`.

    Raises:
        UsageError: As for `request_recipe`.
    """
    raw = read_recipe(config)[0] if config else {}
    rest = {key: value for key, value in raw.items() if key not in ("model", "output", "prune")}
    return build(Settings, merge(rest, reading, sets, flags))


def read_recipe(path: Path) -> tuple[dict[str, Any], str]:
    """Return the keys of a recipe's file, and its text.

    Raises:
        UsageError: It is missing, can be misread, or holds no keys.
    """
    raw, text = strict_yaml.read(path)
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path}: found {quote(raw)}, expected the keys model, output and prune",
            hint="such as `model: demo`, `output: OUT`, `prune: {method: magnitude, sparsity: 0.5}`",
        )
    return with_places(raw, path), text


def stage_paths(stages: object) -> list[tuple[str, object]]:
    """Return the stages of a recipe, each with its dotted path for errors."""
    if not isinstance(stages, list | tuple):
        return [("prune", stages)]
    return [(f"prune.{index}" if len(stages) > 1 else "prune", one) for index, one in enumerate(stages)]


def method_and_fields(raw: object, path: str = "prune") -> tuple[str, dict[str, Any]]:
    """Return the method's name of a stage as it is written, and its fields.

    Args:
        raw: A method's name, or its fields beside `method:`.
        path: The stage's dotted path, for errors.

    Raises:
        UsageError: It is neither, or there is no such method.
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
    check_name(method)
    return method, {key: value for key, value in fields.items() if key != "method"}


def _is_recipe(model: str) -> bool:
    return Path(model).suffix.lower() in (".yaml", ".yml") and not Path(model).is_dir()


def _check_places(changes: Mapping[str, object]) -> None:
    hint = "`structprune prune MODEL OUT --method NAME`, or `structprune prune RECIPE.yaml`"
    for key, word in (("model", "MODEL"), ("output", "OUT")):
        if key not in changes:
            raise UsageError(f"{word} is missing", hint=hint)
