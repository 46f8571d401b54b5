"""A recipe as far as it can be read without its methods: what cannot be stops here, within a moment.

The fields of a method are the attributes of its class, which stands on torch and transformers. All else that
a recipe or a command line says is checked before either is imported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import PrivateAttr, ValidationInfo, field_validator, model_validator

from structprune.calibration.text_source import DEMO_VISION
from structprune.errors import UsageError
from structprune.pruners.catalogue import check_name, names
from structprune.recipe.fields import quote
from structprune.recipe.options import (
    BenchOptions,
    CalibrationOptions,
    EvaluateOptions,
    RecoverOptions,
    Text,
    Where,
)


class Settings(Where):
    """What a recipe says beside the model and its stages.

    Args:
        revision: Which commit or branch of a hub model.
        tokenizer: A folder with the tokenizer, where the model's own has none or another is meant.
        calibration: What the pruner looks at.
        recover: Train afterwards; not unless given.
        evaluate: What to measure; false for nothing.
        bench: Time the pruned model beside the dense one, too; not unless given, as keys or true.
    """

    revision: Text | None = None
    tokenizer: Text | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    recover: RecoverOptions | None = None
    evaluate: EvaluateOptions | None = None
    bench: BenchOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _yes_or_no(cls, data: object) -> object:
        if isinstance(data, Mapping) and data.get("evaluate") is False:
            data = {**data, "evaluate": {"skip": True}}
        if isinstance(data, Mapping) and isinstance(data.get("bench"), bool):
            data = {**data, "bench": {} if data["bench"] else None}
        return data

    @field_validator("recover", mode="before")
    @classmethod
    def _one_seed(cls, value: object, info: ValidationInfo) -> object:
        seed = info.data.get("seed", 0)
        if isinstance(value, RecoverOptions):
            return value if "seed" in value.model_fields_set else value.model_copy(update={"seed": seed})
        return {"seed": seed, **value} if isinstance(value, Mapping) else value


class Run(Settings):
    """A recipe of a command that writes a model.

    Args:
        model: A folder, a hub name, or "demo" or "demo-vision" for a built-in model.
        output: The folder to write.
    """

    command: ClassVar[str]

    model: Text
    output: Path

    _file: Path | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _sees_what_it_learned(cls, data: object) -> object:
        """Let the built-in vision-language model look at its own questions unless told another source."""
        if isinstance(data, Mapping) and data.get("model") == DEMO_VISION:
            asked = data.get("calibration", {})
            if isinstance(asked, Mapping):
                data = {**data, "calibration": {"source": DEMO_VISION, **asked}}
        return data

    @model_validator(mode="after")
    def _bench_has_a_model(self) -> Self:
        if self.bench is not None and self.recover is not None and self.recover.keep_adapter:
            raise UsageError(
                "bench: an adapter that is kept apart is no model to be timed",
                hint="leave out recover.keep_adapter, or run `structprune bench` on the adapter afterwards",
            )
        return self

    @property
    def file(self) -> Path | None:
        """Return the file that the recipe was read from, if it was."""
        return self._file

    def text(self) -> str:
        """Return the recipe as YAML that runs again: what it needs, and what was asked for beside."""
        asked = {
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        }
        data = self.model_dump(mode="json", exclude_none=True, include=asked)
        first = {key: data[key] for key in ("model", "output")}
        return yaml.safe_dump(first | data, sort_keys=False, allow_unicode=True)


class RecoverRun(Run):
    """A recipe of `structprune recover`."""

    command = "recover"


class ApplyRun(Run):
    """A recipe of `structprune apply`.

    Args:
        plan: The earlier decision: a plan's folder, a folder of plans, or one that structprune wrote.
    """

    command = "apply"

    plan: Path


class Draft(Run):
    """A recipe of `structprune prune` whose stages are known by the names of their methods alone.

    Args:
        prune: One stage or several, each `method:` with that method's fields.
    """

    command = "prune"

    prune: Any

    @field_validator("prune", mode="before")
    @classmethod
    def _stages(cls, value: object, info: ValidationInfo) -> object:
        for path, part in stage_paths(value):
            method_and_fields(part, path)
        return value


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
