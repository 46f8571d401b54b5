"""A recipe: everything a run was asked to do, as a value that a YAML file spells out.

The later wins: defaults, the file, `--set key=value`, the command line's own flags. What cannot be stops
here, before any model is opened, with the key's path, what was found and what is expected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, PrivateAttr, SerializeAsAny, ValidationInfo, field_validator, model_validator

from structprune.errors import UsageError
from structprune.models.opening import Opening
from structprune.pruners.catalogue import check_lasting, find
from structprune.pruners.pruner import Pruner
from structprune.recipe.changes import PRUNE, merge
from structprune.recipe.draft import Draft, method_and_fields, stage_paths
from structprune.recipe.fields import build
from structprune.recipe.options import (
    BenchOptions,
    CalibrationOptions,
    EvaluateOptions,
    RecoverOptions,
    no_importance,
)
from structprune.recipe.request import Request, request_recipe

__all__ = [
    "BenchOptions",
    "CalibrationOptions",
    "EvaluateOptions",
    "Recipe",
    "RecoverOptions",
    "assemble",
    "choose_recipe",
    "load",
]


class Recipe(Draft):
    """A run of `structprune prune`.

    Args:
        prune: One stage or several, each `method:` with that method's fields; always a tuple here.
    """

    prune: Annotated[tuple[SerializeAsAny[Pruner], ...], Field(min_length=1)]

    _source: str | None = PrivateAttr(default=None)

    @field_validator("prune", mode="before")
    @classmethod
    def _stages(cls, value: object, info: ValidationInfo) -> object:
        seed = info.data.get("seed", 0)
        return tuple(
            part if isinstance(part, Pruner) else stage(part, path, seed) for path, part in stage_paths(value)
        )

    @model_validator(mode="after")
    def _some_stage_weighs_blocks(self) -> Self:
        asked = self.recover is not None and self.recover.ranks == "importance"
        if asked and not any(one.weighs_blocks for one in self.prune):
            raise no_importance([one.method() for one in self.prune])
        return self

    @model_validator(mode="after")
    def _what_runs_comes_last(self) -> Self:
        running = next((one for one in self.prune if one.at_run_time), None)
        if running is None:
            return self
        check_lasting(type(running))
        late = next((one for one in self.prune[self.prune.index(running) :] if not one.at_run_time), None)
        if late is not None:
            raise UsageError(
                f"prune: {late.method()} after {running.method()}, which works while the model runs",
                hint=f"put {running.method()} last: what changes the stored weights comes before",
            )
        if self.recover is not None:
            raise UsageError(
                f"recover: trains stored weights, and {running.method()} works while the model runs",
                hint=f"recover first, then prune the recovered folder with {running.method()}",
            )
        return self

    @classmethod
    def of(cls, request: Request) -> Self:
        """Return the recipe of a request.

        Raises:
            UsageError: A field that a method cannot have, or an impossible value.
        """
        recipe = request.build(cls)
        recipe._file = Path(request.where) if request.where else None
        return recipe if request.verbatim is None else recipe.remember(request.verbatim)

    @property
    def pruned(self) -> Path:
        """Return where the pruned model lies: beside the output of a run that recovers it."""
        return self.output if self.recover is None else self.output.with_name(f"{self.output.name}.pruned")

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
        running = next((one.method() for one in self.prune if one.at_run_time), None)
        if running is not None and asked.stream:
            raise UsageError(
                f"--stream: {running} works while a model runs, and a streamed one is never whole",
                hint="leave --stream out",
            )
        return replace(
            asked,
            dtype=self.dtype,
            device=self.device,
            tokenizer=self.tokenizer or asked.tokenizer,
            stream=False if running else asked.stream,
        )

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
        first = {key: data[key] for key in ("model", "output", "prune")}
        return yaml.safe_dump(first | data, sort_keys=False, allow_unicode=True)

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
    method, fields = method_and_fields(raw, path)
    pruner = find(method)
    if "seed" in pruner.model_fields:
        fields.setdefault("seed", seed)
    return build(pruner, fields, path)


def choose_recipe(
    model: str, *, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None
) -> Recipe:
    """Return a recipe of `prune`, read from its file or made of a model and what is asked of it.

    choose_recipe("recipe.yaml", sets=["sparsity=0.6"])
    choose_recipe("demo", flags={"output": "out", "prune.method": "wanda", "prune.sparsity": 0.5})

    Args:
        model: The path of a recipe, which ends in .yaml or .yml; or a model ("demo", a folder, a hub name).
        sets: What to change, each "key=value" as after `--set`: the dotted path of a key of the recipe
            ("calibration.samples=64"), or a field of its method alone ("sparsity=0.6").
        flags: What to change, as values: the dotted path of a key -> its value; None changes nothing. These
            win over `sets`. A model needs "output" and "prune.method" here.

    Raises:
        UsageError: The file is missing or can be misread, a key is unknown, a value impossible; a field that
            the method cannot have; or the recipe of another command.
    """
    return Recipe.of(request_recipe(model, sets=sets, flags=flags))


def load(path: Path, *, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None) -> Recipe:
    """Return the recipe of a YAML file, with what the command line changes.

    Args:
        path: The file; paths inside it are relative to the working directory.
        sets: As for `request_recipe`.
        flags: As for `request_recipe`.

    Raises:
        UsageError: As for `choose_recipe`.
    """
    return Recipe.of(request_recipe(None, config=path, sets=sets, flags=flags))


def assemble(
    raw: Mapping[str, Any], *, sets: Sequence[str] = (), flags: Mapping[str, object] | None = None
) -> Recipe:
    """Return the recipe that plain values, `--set` and flags add up to; the later wins.

    Raises:
        UsageError: An unknown key, a missing one or an impossible value.
    """
    return Recipe.of(Request(merge(raw, PRUNE, sets, flags)))
