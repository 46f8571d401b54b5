"""A complete result of the very same run: what a command that is given again need not make again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structprune.checkpoint.delivery import Delivery, is_delivered, tidy
from structprune.checkpoint.manifest import MANIFEST, RECIPE_FILE, RUN_PLACES
from structprune.checkpoint.writing import Writing
from structprune.recipe.draft import Run, Settings
from structprune.recipe.fields import build
from structprune.recipe.options import BenchOptions, EvaluateOptions
from structprune.recipe.places import places_text
from structprune.report.report import read_report
from structprune.storage import strict_yaml


def write_recipe(work: Delivery, recipe: Run) -> None:
    """Write a recipe as it was asked for, and beside it where its files are."""
    work.write_text(RECIPE_FILE, recipe.text())
    work.write_text(RUN_PLACES, places_text(recipe.model_dump(mode="json"), recipe.command))


def may_stand(output: Path, writing: Writing) -> bool:
    """Tell whether a folder may stand in the way of a run until its fingerprint is known.

    Anything may that is to be replaced; and a complete result, where those of the same run are kept.
    """
    return writing.overwrite or (writing.keep and (output / MANIFEST).is_file())


def kept_report(
    final: Path, fingerprint: Mapping[str, Any], asked: Settings, writing: Writing
) -> dict[str, Any] | None:
    """Return the report of a result that stays as it is, marked "kept"; None where it is still to be made.

    The fingerprint is of what shapes the weights. A result that was measured otherwise than is asked for now
    is no result of this run: an older one must not pass a quality gate that it was never held to. The run
    that made it may have been killed once it had published: what it left beside the result is settled.
    """
    if not writing.keep or writing.restart or not is_delivered(final, fingerprint):
        return None
    if _measured_in(final) != (asked.evaluate, asked.bench):
        return None
    tidy(final)
    return read_report(final) | {"kept": True}


def _measured_in(folder: Path) -> tuple[EvaluateOptions | None, BenchOptions | None]:
    raw, _ = strict_yaml.read(folder / RECIPE_FILE)
    keys = raw if isinstance(raw, dict) else {}
    said = build(Settings, {key: keys[key] for key in ("evaluate", "bench") if key in keys})
    return said.evaluate, said.bench
