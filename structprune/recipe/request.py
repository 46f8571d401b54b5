"""What a command line asks for: a recipe's file, `--set` and flags, put together and checked.

Everything that can be refused without torch and transformers is refused here, within a moment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from structprune.errors import UsageError
from structprune.recipe.changes import PRUNE, Reading, merge
from structprune.recipe.draft import ApplyRun, Draft, RecoverRun, Run, Settings
from structprune.recipe.fields import build, quote
from structprune.recipe.places import with_places
from structprune.storage import strict_yaml

S = TypeVar("S", bound="Settings")
R = TypeVar("R", bound="Run")

# By these a recipe is known; first what no other command reads.
_KEYS: dict[type[Run], str] = {ApplyRun: "plan", Draft: "prune", RecoverRun: "recover"}


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
            # An empty stage is told which methods there are.
            empty: dict[str, Any] = {"prune": {}} if issubclass(owner, Draft) else {}
            return build(owner, empty | dict(self.raw))
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
    if model is not None and is_recipe(model):
        config = _only_recipe(model, config)
    elif model is not None:
        changes["model"] = model
    if config is None:
        _check_places(changes)
    raw, text = read_recipe(config) if config else ({}, None)
    if config:
        _check_command(raw, config, Draft)
    merged = merge(raw, PRUNE, sets, changes)
    request = Request(merged, str(config or ""), None if sets or changes else text)
    request.build(Draft)
    return request


def choose_run(
    owner: type[R],
    model: str,
    reading: Reading,
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> R:
    """Return what a command is asked for that writes a model without stages of its own.

    Args:
        owner: Its recipe.
        model: What stands first: a model, or that recipe, which is a file that ends in .yaml.
        reading: Which keys it reads.
        config: A recipe that a flag names; its model, output and stages are passed over.
        sets: As for `request_recipe`; short are the keys of the command's own group.
        flags: As for `request_recipe`.

    Raises:
        UsageError: As for `request_recipe`; or it is the recipe of another command.
    """
    changes = {key: value for key, value in (flags or {}).items() if value is not None}
    if is_recipe(model):
        config = _only_recipe(model, config)
        raw = read_recipe(config)[0]
        _check_command(raw, config, owner)
    else:
        raw = _without_run(read_recipe(config)[0]) if config else {}
        changes["model"] = model
    if "output" not in raw.keys() | changes.keys():
        raise UsageError("OUT is missing", hint="give the folder to write after MODEL, or as -o OUT")
    run = Request(merge(raw, reading, sets, changes), str(config or "")).build(owner)
    run._file = config
    return run


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
    raw = _without_run(read_recipe(config)[0]) if config else {}
    return build(Settings, merge(raw, reading, sets, flags))


def is_recipe(model: str) -> bool:
    """Tell whether what stands first is a recipe's file, by its name."""
    return Path(model).suffix.lower() in (".yaml", ".yml") and not Path(model).is_dir()


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


def _only_recipe(model: str, config: Path | None) -> Path:
    if config is not None:
        raise UsageError(f"two recipes: {model} and {config}", hint="give one of them")
    return Path(model)


def _without_run(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in ("model", "output", "prune", "plan")}


def _check_command(raw: Mapping[str, Any], file: Path, owner: type[Run]) -> None:
    """Refuse the recipe of another command, which is known by its own key."""
    others = [one for one in (ApplyRun, Draft, RecoverRun) if _KEYS[one] in raw]
    if others and not any(issubclass(owner, one) for one in others):
        other = others[0].command
        raise UsageError(
            f"{file}: is a recipe of `structprune {other}`", hint=f"run `structprune {other} {file}`"
        )


def _check_places(changes: Mapping[str, object]) -> None:
    hint = "`structprune prune MODEL OUT --method NAME`, or `structprune prune RECIPE.yaml`"
    for key, word in (("model", "MODEL"), ("output", "OUT")):
        if key not in changes:
            raise UsageError(f"{word} is missing", hint=hint)
