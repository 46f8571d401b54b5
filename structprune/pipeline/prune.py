"""The story of a run: read, inspect, calibrate, apply, write; `finish` measures, proves and publishes."""

from pathlib import Path
from typing import Any

from structprune.checkpoint.delivery import deliver, delivered
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.output import check_output
from structprune.models.cost import weight_bytes
from structprune.pipeline.decision import calibrate_on, decide, fingerprint, opened, read_scores, write
from structprune.pipeline.finish import done_by, finish
from structprune.pipeline.recover import foresee, recover
from structprune.progress import Clock, Progress, silent
from structprune.pruners.pruner import Pruner
from structprune.recipe.fields import build
from structprune.recipe.recipe import Recipe


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
            with clock.phase("calibrate"):
                plans, resumed = decide(recipe.prune, source, calibration, work, progress, kept)
            done = done_by(recipe, plans, calibration, resumed)
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


def _recipe(
    model: str, output: str | Path | None, pruner: Pruner | str | None, options: dict[str, Any]
) -> Recipe:
    """Return the recipe that `prune` was called with; what is no key of a recipe belongs to the method."""
    stage: object = pruner
    if isinstance(pruner, str):
        stage = {"method": pruner} | {k: v for k, v in options.items() if k not in Recipe.model_fields}
        options = {k: v for k, v in options.items() if k in Recipe.model_fields}
    return build(Recipe, {"model": model, "output": output, "prune": stage, **options})
