"""Everything that a command reads from the disk, so that no output is ever written over any of it."""

from pathlib import Path
from typing import Literal

from structprune.checkpoint.inputs import Input, local_inputs
from structprune.recipe.draft import RecoverRun
from structprune.recipe.options import EvaluateOptions, RecoverOptions
from structprune.recipe.recipe import Recipe


def inputs_of_recipe(recipe: Recipe, folder: Path, scores: str | Path | None = None) -> list[Input]:
    """Return what a run of a recipe reads.

    Args:
        recipe: The recipe.
        folder: Where its model is.
        scores: The folder with kept scores.
    """
    return [
        *local_inputs("the model", folder),
        *local_inputs("the tokenizer", recipe.tokenizer),
        *local_inputs("the recipe", recipe.file),
        *local_inputs("the calibration text", recipe.calibration.source),
        *local_inputs("the kept scores", scores),
        *inputs_of_recovery(recipe.recover),
        *inputs_of_evaluation(recipe.evaluate),
    ]


def inputs_of_recover_run(run: RecoverRun, folder: Path) -> list[Input]:
    """Return what a recovery reads.

    Args:
        run: The recovery.
        folder: Where its model is.
    """
    return [
        *local_inputs("the model", folder),
        *local_inputs("the tokenizer", run.tokenizer),
        *local_inputs("the recipe", run.file),
        *inputs_of_recovery(run.recover or RecoverOptions()),
        *inputs_of_evaluation(run.evaluate),
    ]


def inputs_of_recovery(options: RecoverOptions | None) -> list[Input]:
    """Return what training reads beside its model."""
    if options is None:
        return []
    return [*local_inputs("the training text", options.data), *local_inputs("the teacher", options.teacher)]


def inputs_of_evaluation(options: EvaluateOptions | Literal[False] | None) -> list[Input]:
    """Return what measuring reads beside its model."""
    if not options:
        return []
    return [
        *(one for text in options.text for one in local_inputs("the text to measure on", text)),
        *local_inputs("the questions to measure on", options.questions),
        *local_inputs("the folder of task files", options.include_path),
        *local_inputs("the model to compare with", options.compare),
    ]
