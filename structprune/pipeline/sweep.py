"""Several sparsities of one method: where the model looks the same to all of them, it is looked at once."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from structprune.checkpoint.delivery import deliver
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.output import check_output
from structprune.checkpoint.plans import folder_of
from structprune.errors import UsageError
from structprune.models.cost import weight_bytes
from structprune.pipeline.decision import begun, calibrate_on, fingerprint, opened, write
from structprune.pipeline.finish import done_by, finish
from structprune.pipeline.prune import prune
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress, silent
from structprune.pruners.pruner import Pruner
from structprune.recipe.recipe import Recipe


def prune_each(
    recipe: Recipe, sparsities: Sequence[float | str], *, progress: Progress = silent, **options: Any
) -> dict[str, Any]:
    """Prune a checkpoint to several sparsities, each into a folder of its own in the recipe's output.

    Where what calibration sees does not depend on the sparsity, the model is looked at once for all of them.

    Args:
        recipe: Of one stage; its sparsity is ignored.
        sparsities: Fractions or patterns; a folder is called what its sparsity is written as.
        progress: Told (stage, done, total).
        **options: As for `prune`.

    Returns:
        "runs": the report of each sparsity, by what it is written as.
    """
    if shared(recipe):
        return sweep(recipe, sparsities, progress=progress, **options)
    runs = (prune(at(recipe, one), progress=progress, **options) for one in sparsities)
    return {"runs": {str(one): made for one, made in zip(sparsities, runs, strict=True)}}


def at(recipe: Recipe, goal: float | str) -> Recipe:
    """Return a recipe with another sparsity, which writes into a folder of that name in its output."""
    other = stage_of(recipe).with_goal(goal)
    return recipe.model_copy(update={"prune": (other,), "output": recipe.output / str(goal)})


def shared(recipe: Recipe) -> bool:
    """Tell whether one look at the model serves every sparsity.

    Raises:
        UsageError: The recipe has several stages, or one of another family.
    """
    return stage_of(recipe).one_look and recipe.recover is None


def stage_of(recipe: Recipe) -> Pruner:
    """Return the only stage of a recipe.

    Raises:
        UsageError: The recipe has several stages, or one of another family.
    """
    if len(recipe.prune) != 1:
        raise UsageError("several goals need a recipe of one stage", hint="run them one by one")
    return recipe.prune[0]


def sweep(
    recipe: Recipe,
    sparsities: Sequence[float | str],
    *,
    stream: bool | None = None,
    restart: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    reload: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune a checkpoint to several sparsities with one look at it, each into a folder of its own.

    Args:
        recipe: One of which `shared` is true.
        sparsities: Fractions or patterns; a folder is called what its sparsity is written as.
        stream: As for `prune`, and so are all further arguments.
        restart: As for `prune`.
        overwrite: As for `prune`.
        trust_remote_code: As for `prune`.
        reload: As for `prune`.
        progress: As for `prune`.

    Returns:
        "runs": the report of each sparsity, by what it is written as.
    """
    assert shared(recipe)
    first = stage_of(recipe)
    recipes = {str(one): at(recipe, one) for one in sparsities}
    pruners = {name: stage_of(one) for name, one in recipes.items()}
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(recipe.model, revision=recipe.revision)
        needed = weight_bytes(folder)
        finals = {
            name: check_output(folder, one.output, overwrite=overwrite, needed_bytes=needed)
            for name, one in recipes.items()
        }
        source = opened(
            recipe, folder, [*pruners.values()], stream=stream, trust_remote_code=trust_remote_code
        )
        calibration = calibrate_on(recipe, source)
    runs = {}
    with ExitStack() as stack:
        works = {
            name: stack.enter_context(
                deliver(
                    finals[name], fingerprint(one, source, calibration), restart=restart, overwrite=overwrite
                )
            )
            for name, one in recipes.items()
        }
        begin = {
            name: begun(pruners[name], 1, source, source.scan.weights, works[name], progress)
            for name in recipes
        }
        resumed = {name: writer.finished for name, (writer, _) in begin.items()}
        open_ = [(pruners[name], writer) for name, (writer, plan) in begin.items() if plan is None]
        with clock.phase("calibrate"):
            batches = calibration.batches if calibration else []
            if open_:
                first.calibrate_each(source.model, batches, open_)
        for name, one in recipes.items():
            own = replace(source, model=source.again())
            plan = Plan.load(works[name].plans / folder_of(1, first.method()))
            done = done_by(one, [plan], calibration, resumed[name])
            pruners[name].apply(own.model, plan)
            works[name].write_text("structprune/recipe.yaml", one.text())
            write(own, works[name], [plan], progress)
            runs[name] = finish(
                works[name], own, clock, done, options=one.evaluate, reload=reload, progress=progress
            )
    return {"runs": runs}
