"""Several goals of one method: where the model looks the same to all of them, it is looked at once.

The same command given again makes what is missing: results that are complete are kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from structprune.calibration.data import Calibration
from structprune.checkpoint.delivery import Delivery, deliver
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.output import check_output
from structprune.checkpoint.plans import folder_of
from structprune.checkpoint.side_files import copied_names
from structprune.checkpoint.source import Source
from structprune.checkpoint.writing import Writing
from structprune.errors import UsageError
from structprune.evaluation.memory import Memory
from structprune.machine import launch
from structprune.models.opening import Opening
from structprune.models.streamed import open_skeleton
from structprune.pipeline.decision import (
    calibrate_on,
    fingerprint,
    open_recipe_model,
    open_stage_plan,
    write,
)
from structprune.pipeline.examine import prepare_exam, with_bench
from structprune.pipeline.finish import finish, measure, record_of
from structprune.pipeline.inputs import inputs_of_recipe
from structprune.pipeline.kept import kept_report, may_stand, write_recipe
from structprune.pipeline.prune import prune_recipe
from structprune.pipeline.room import bytes_written
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress, silent
from structprune.pruners.forecast import forecast_all
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

    Where what calibration sees does not depend on the goal, the model is looked at once for all of them. A
    goal that an earlier command with this recipe has reached is kept: what was interrupted is finished by the
    same command.

    Args:
        recipe: Of one stage; its own goal is ignored.
        goals: Such as fractions or patterns; a folder is called what its goal is written as.
        opening: As for `prune`.
        writing: As for `prune`; results of other runs are replaced with `overwrite`, also those of this one
            made anew with `restart`.
        progress: Told (stage, done, total).

    Returns:
        "runs": the report of each goal, by what it is written as; "kept" stands in those that were there.
    """
    if launch().count > 1:
        raise UsageError(
            "several goals are one process's work", hint="leave the launcher out, or run them one by one"
        )
    writing = replace(writing, keep=True)
    recipes = recipes_of(recipe, goals)
    if one_look_serves_all(recipe):
        return sweep(recipe, recipes, opening=opening, writing=writing, progress=progress)
    # All of them before the first one runs for hours.
    opened = open_skeleton(resolve(recipe.model, revision=recipe.revision), opening)
    for one in recipes.values():
        forecast_all(one.prune, opened)
    with Memory() as memory:
        return {
            "runs": {
                name: prune_recipe(one, opening=opening, writing=writing, progress=progress, memory=memory)
                for name, one in recipes.items()
            }
        }


def recipes_of(recipe: Recipe, goals: Sequence[float | str]) -> dict[str, Recipe]:
    """Return a recipe of each goal, by what the goal is written as: it writes into a folder of that name.

    Goals that are the same written in two ways (0 and 0.0, 0.5 and "50%") are one.

    Raises:
        UsageError: The recipe has several stages, or a stage that cannot have such a goal.
    """
    recipes: dict[str, Recipe] = {}
    for goal in goals:
        other = only_stage(recipe).with_goal(goal)
        if all(other != only_stage(known) for known in recipes.values()):
            name = str(goal).removesuffix(".0")
            recipes[name] = recipe.with_stage(other, recipe.output / name)
    return recipes


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
    recipes: Mapping[str, Recipe],
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a checkpoint to several goals with one look at it, each into a folder of its own.

    Args:
        recipe: One of which `one_look_serves_all` is true.
        recipes: What `recipes_of` returned.
        opening: As for `prune_each`, and so are all further arguments.
        writing: As for `prune_each`.
        progress: As for `prune_each`.

    Returns:
        As `prune_each`.
    """
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(recipe.model, revision=recipe.revision)
        needed = bytes_written(folder, recipe.prune, recipe.output, writing)
        inputs = inputs_of_recipe(recipe, folder)
        finals = {
            name: check_output(
                inputs, one.output, overwrite=may_stand(one.output, writing), needed_bytes=needed
            )
            for name, one in recipes.items()
        }
        source = open_recipe_model(recipe, folder, [one.prune for one in recipes.values()], opening)
        calibration = calibrate_on(recipe, source)
        exam = prepare_exam(recipe.evaluate, source, calibration.left if calibration else None)
        exam = with_bench(exam, recipe.bench, source)
    prints = {name: fingerprint(one, source, calibration) | writing.shaping for name, one in recipes.items()}
    runs = {name: kept_report(finals[name], prints[name], recipe, writing) for name in recipes}
    missing = {name: one for name, one in recipes.items() if runs[name] is None}
    for name in missing:
        check_output(inputs, finals[name], overwrite=writing.overwrite)
    with ExitStack() as stack:
        memory = stack.enter_context(Memory())
        files = copied_names(folder, source.opening.tokenizer)
        works = {
            name: stack.enter_context(deliver(finals[name], prints[name], writing, files=files))
            for name in missing
        }
        for name, one in missing.items():
            write_recipe(works[name], one)
        resumed = _decide_each(missing, source, calibration, works, clock, progress)
        for name, one in missing.items():
            own, pruner = replace(source, model=source.reopen_model()), only_stage(one)
            plan = Plan.load(works[name].plans / folder_of(1, pruner.method()))
            record = record_of(one, [plan], calibration, resumed[name])
            pruner.apply(own.model, plan)
            write(own, works[name], [plan], progress)
            with clock.phase("evaluate"):
                evaluation = measure(own, own, exam, memory, progress=progress)
            runs[name] = finish(
                works[name], own, clock, record, exam=exam, evaluation=evaluation, progress=progress
            )
    return {"runs": runs}


def _decide_each(
    recipes: Mapping[str, Recipe],
    source: Source,
    calibration: Calibration | None,
    works: Mapping[str, Delivery],
    clock: Clock,
    progress: Progress,
) -> dict[str, int]:
    """Write the plan of each goal, with one look for all; return how many blocks were already decided."""
    resumed, open_ = {}, []
    for name, one in recipes.items():
        pruner = only_stage(one)
        writer, plan = open_stage_plan(pruner, 1, source, source.scan.weights, works[name].plans, progress)
        resumed[name] = writer.finished
        if plan is None:
            open_.append((pruner, writer))
    with clock.phase("calibrate"):
        if open_:
            open_[0][0].calibrate_each(source.model, calibration.batches if calibration else [], open_)
    return resumed
