"""Several goals of one method: where the model looks the same to all of them, it is looked at once."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from structprune.checkpoint.delivery import deliver
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.output import check_output
from structprune.checkpoint.plans import folder_of
from structprune.checkpoint.writing import Writing
from structprune.errors import UsageError
from structprune.models.cost import weight_bytes
from structprune.models.opening import Opening
from structprune.pipeline.decision import (
    calibrate_on,
    fingerprint,
    open_recipe_model,
    open_stage_plan,
    write,
)
from structprune.pipeline.finish import finish, record_of
from structprune.pipeline.prune import prune
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress, silent
from structprune.pruners.pruner import Pruner
from structprune.recipe.recipe import Recipe


def prune_each(
    recipe: Recipe,
    goals: Sequence[float | str],
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a checkpoint to several goals, each into a folder of its own in the recipe's output.

    Where what calibration sees does not depend on the goal, the model is looked at once for all of them.

    Args:
        recipe: Of one stage; its own goal is ignored.
        goals: Such as fractions or patterns; a folder is called what its goal is written as.
        opening: As for `prune`.
        writing: As for `prune`.
        progress: Told (stage, done, total).

    Returns:
        "runs": the report of each goal, by what it is written as.
    """
    if one_look_serves_all(recipe):
        return sweep(recipe, goals, opening=opening, writing=writing, progress=progress)
    runs = {}
    for goal in goals:
        other = recipe_with_goal(recipe, goal)
        runs[str(goal)] = prune(other, opening=opening, writing=writing, progress=progress)
    return {"runs": runs}


def recipe_with_goal(recipe: Recipe, goal: float | str) -> Recipe:
    """Return a recipe with another goal, which writes into a folder of that name in its output."""
    other = only_stage(recipe).with_goal(goal)
    return recipe.model_copy(update={"prune": (other,), "output": recipe.output / str(goal)})


def one_look_serves_all(recipe: Recipe) -> bool:
    """Tell whether one look at the model serves every goal.

    Raises:
        UsageError: The recipe has several stages, or one of another family.
    """
    return only_stage(recipe).one_look and recipe.recover is None


def only_stage(recipe: Recipe) -> Pruner:
    """Return the only stage of a recipe.

    Raises:
        UsageError: The recipe has several stages, or one of another family.
    """
    if len(recipe.prune) != 1:
        raise UsageError("several goals need a recipe of one stage", hint="run them one by one")
    return recipe.prune[0]


def sweep(
    recipe: Recipe,
    goals: Sequence[float | str],
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a checkpoint to several goals with one look at it, each into a folder of its own.

    Args:
        recipe: One of which `one_look_serves_all` is true.
        goals: As for `prune_each`, and so are all further arguments.
        opening: As for `prune`.
        writing: As for `prune`.
        progress: As for `prune`.

    Returns:
        "runs": the report of each goal, by what it is written as.
    """
    assert one_look_serves_all(recipe)
    first = only_stage(recipe)
    recipes = {str(one): recipe_with_goal(recipe, one) for one in goals}
    pruners = {name: only_stage(one) for name, one in recipes.items()}
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(recipe.model, revision=recipe.revision)
        needed = weight_bytes(folder)
        finals = {
            name: check_output(folder, one.output, overwrite=writing.overwrite, needed_bytes=needed)
            for name, one in recipes.items()
        }
        source = open_recipe_model(recipe, folder, [*pruners.values()], opening)
        calibration = calibrate_on(recipe, source)
    runs = {}
    with ExitStack() as stack:
        works = {
            name: stack.enter_context(deliver(finals[name], fingerprint(one, source, calibration), writing))
            for name, one in recipes.items()
        }
        begin = {
            name: open_stage_plan(pruners[name], 1, source, source.scan.weights, works[name], progress)
            for name in recipes
        }
        resumed = {name: writer.finished for name, (writer, _) in begin.items()}
        open_ = [(pruners[name], writer) for name, (writer, plan) in begin.items() if plan is None]
        with clock.phase("calibrate"):
            batches = calibration.batches if calibration else []
            if open_:
                first.calibrate_each(source.model, batches, open_)
        for name, one in recipes.items():
            own = replace(source, model=source.reopen_model())
            plan = Plan.load(works[name].plans / folder_of(1, first.method()))
            record = record_of(one, [plan], calibration, resumed[name])
            pruners[name].apply(own.model, plan)
            works[name].write_text("structprune/recipe.yaml", one.text())
            write(own, works[name], [plan], progress)
            runs[name] = finish(works[name], own, clock, record, options=one.evaluate, progress=progress)
    return {"runs": runs}
