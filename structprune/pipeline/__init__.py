"""The story of a run: read, inspect, calibrate, apply, write; `finish` measures, proves and publishes."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from structprune.checkpoint.delivery import Clock, deliver, delivered
from structprune.checkpoint.export import Progress
from structprune.checkpoint.opened import open_source
from structprune.checkpoint.plans import read_plans, save_plans, stages
from structprune.checkpoint.source import resolve
from structprune.checkpoint.verify import silent
from structprune.cost import weight_bytes
from structprune.errors import InputError
from structprune.machine import environment
from structprune.pipeline.checks import evaluate, verify
from structprune.pipeline.decision import (
    calibrate_on,
    code,
    decide,
    fingerprint,
    opened,
    read_scores,
    write,
)
from structprune.pipeline.finish import Done, done_by, finish
from structprune.pipeline.inspection import dry_run, inspect
from structprune.pipeline.retrain import foresee, recover
from structprune.pipeline.sweep import at, shared, sweep
from structprune.pruner import Pruner, achievable, find
from structprune.recipe import Recipe
from structprune.recipe.fields import build
from structprune.storage.output import check_output

logger = logging.getLogger(__name__)

__all__ = [
    "apply",
    "dry_run",
    "environment",
    "evaluate",
    "inspect",
    "prune",
    "prune_each",
    "recover",
    "verify",
]


def prune(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    pruner: Pruner | str | None = None,
    *,
    stream: bool | None = None,
    restart: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    reload: bool = True,
    scores: str | Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Prune a checkpoint, prove the result and return the report.

    Args:
        recipe: A recipe; or a model ("demo", a folder, a hub name), with `output` and `pruner` beside it.
        output: The folder to write.
        pruner: A pruner, or a method's name.
        stream: Hold one block in memory; chosen by the free memory unless given.
        restart: Forget what an interrupted run left.
        overwrite: Replace an existing output once the new one is complete.
        trust_remote_code: Run code that the model folder brings along.
        reload: Open the result in a fresh process; without it the proof is of the files alone.
        scores: A folder that an earlier run wrote with `keep_scores`: decide from them, look at no data.
        progress: Told (stage, done, total).
        **options: Further keys of a recipe (seed, dtype, device, calibration, recover, evaluate), and fields
            of a method given by its name (sparsity, compare, ...).

    Raises:
        StructpruneError: One of `structprune.errors`; nothing is lost, and the input is untouched.
    """
    if not isinstance(recipe, Recipe):
        recipe = _recipe(str(recipe), output, pruner, options)
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(recipe.model, revision=recipe.revision)
        needed = weight_bytes(folder)
        final = check_output(folder, recipe.output, overwrite=overwrite, needed_bytes=needed)
        if recipe.recover is not None:  # which makes the output from a pruned model beside it
            pruned = recipe.output.with_name(f"{recipe.output.name}.pruned")
            final = check_output(folder, pruned, overwrite=True, needed_bytes=needed)
        source = opened(recipe, folder, recipe.prune, stream=stream, trust_remote_code=trust_remote_code)
        if recipe.recover is not None:
            foresee(recipe.recover, source, recipe.seed)
        kept = read_scores(Path(scores), recipe.prune, source) if scores else None
        calibration = None if kept else calibrate_on(recipe, source)
    run = fingerprint(recipe, source, calibration) | ({"scores": kept.id} if kept else {})
    if recipe.recover is None or restart or not delivered(final, run):
        check_output(folder, final, overwrite=overwrite)
        with deliver(final, run, restart=restart, overwrite=overwrite) as work:
            goal = achievable(recipe.prune, source.model)
            with clock.phase("calibrate"):
                plans, resumed = decide(recipe.prune, source, calibration, work, progress, kept)
            done = done_by(recipe, plans, calibration, goal, resumed)
            with clock.phase("write"):
                work.write_text("structprune/recipe.yaml", recipe.text())
                write(source, work, plans, progress)
            result = finish(
                work, source, clock, done, options=recipe.evaluate, reload=reload, progress=progress
            )
        if recipe.recover is None:
            return result
    return recover(
        str(final),
        recipe.output,
        recipe.recover,
        seed=recipe.seed,
        overwrite=overwrite,
        restart=restart,
        device=recipe.device,
        trust_remote_code=trust_remote_code,
        evaluate=recipe.evaluate,
        dense=str(folder),
        reload=reload,
        progress=progress,
    )


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


def apply(
    model: str,
    output: str | Path,
    plan: str | Path,
    *,
    stream: bool | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    reload: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Carry the plans of an earlier run out on the model they were decided on; needs no data.

    Args:
        model: "demo", a folder, a hub name.
        output: The folder to write.
        plan: A plan's folder, a folder of plans, or a folder that structprune wrote.
        stream: Hold one block in memory; chosen by the free memory unless given.
        overwrite: Replace an existing output once the new one is complete.
        trust_remote_code: Run code that the model folder brings along.
        revision: Branch, tag or commit of a hub model.
        reload: Open the result in a fresh process.
        progress: Told (stage, done, total).

    Raises:
        InputError: The plan is damaged, or was decided on another architecture or other weights.
    """
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(model, revision=revision)
        final = check_output(folder, Path(output), overwrite=overwrite, needed_bytes=weight_bytes(folder))
        plans = read_plans(Path(plan))
        source = open_source(model, folder, stream=stream, trust_remote_code=trust_remote_code)
        if plans[0].weights != source.scan.weights:
            raise InputError(
                f"{plan}: decided on other weights ({plans[0].weights[:12]}) than {folder} holds "
                f"({source.scan.weights[:12]})",
                hint="give the model that the plan was made from",
            )
    run = {"plans": [one.id for one in plans], "weights": source.scan.weights, "versions": code()}
    with deliver(final, run, overwrite=overwrite) as work:
        for one in plans:
            find(one.method).model_validate(one.config).apply(source.model, one)
        save_plans(plans, work.plans)
        with clock.phase("write"):
            write(source, work, plans, progress)
        done = Done(
            method="+".join(one.method for one in plans),
            recipe=yaml.safe_dump(
                {"model": model, "output": str(output), "plan": str(plan)}, sort_keys=False
            ),
            asked=plans[-1].config.get("sparsity"),
            achievable=None,
            stages=stages(plans),
        )
        return finish(work, source, clock, done, options=None, reload=reload, progress=progress)


def _recipe(
    model: str, output: str | Path | None, pruner: Pruner | str | None, options: dict[str, Any]
) -> Recipe:
    """Return the recipe that `prune` was called with; what is no key of a recipe belongs to the method."""
    stage: object = pruner
    if isinstance(pruner, str):
        stage = {"method": pruner} | {k: v for k, v in options.items() if k not in Recipe.model_fields}
        options = {k: v for k, v in options.items() if k in Recipe.model_fields}
    return build(Recipe, {"model": model, "output": output, "prune": stage, **options})
