"""The story of a run: read, inspect, calibrate, apply, write; `finish` measures, proves and publishes."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from structprune.calibration import data
from structprune.checkpoint.delivery import Clock, Delivery, deliver
from structprune.checkpoint.export import Progress, export
from structprune.checkpoint.opened import Source, open_source
from structprune.checkpoint.plans import folder_of, plans_of, read_plans, save_plans, stages
from structprune.checkpoint.source import resolve
from structprune.checkpoint.verify import silent
from structprune.cost import weight_bytes
from structprune.errors import InputError
from structprune.machine import environment, versions
from structprune.models.identity import architecture_of
from structprune.pipeline.checks import evaluate, verify
from structprune.pipeline.finish import Done, finish
from structprune.pipeline.inspection import dry_run, inspect
from structprune.pipeline.retrain import recover
from structprune.plan import Plan
from structprune.pruner import Pruner, achievable, find
from structprune.recipe import Recipe
from structprune.recipe.fields import build
from structprune.storage.output import check_output

logger = logging.getLogger(__name__)

__all__ = ["apply", "dry_run", "environment", "evaluate", "inspect", "prune", "recover", "verify"]


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
        final = check_output(
            folder, _pruned_folder(recipe), overwrite=overwrite, needed_bytes=weight_bytes(folder)
        )
        source = open_source(
            recipe.model,
            folder,
            dtype=recipe.dtype,
            device=recipe.device,
            stream=stream,
            trust_remote_code=trust_remote_code,
        )
        for step in recipe.prune:
            step.check(source.model)
        calibration = _calibrate_on(recipe, source)
    with deliver(
        final, _fingerprint(recipe, source, calibration), restart=restart, overwrite=overwrite
    ) as work:
        with clock.phase("calibrate"):
            plans, resumed = _decide(recipe.prune, source, calibration, work, progress)
        work.write_text("structprune/recipe.yaml", recipe.text())
        with clock.phase("write"):
            work.hashes |= export(source.reader, work.folder, plans, progress)
        asked = [step.asked for step in recipe.prune]
        done = Done(
            method="+".join(step.method() for step in recipe.prune),
            recipe=recipe.text(),
            asked=asked[0] if len(asked) == 1 else " + ".join(map(str, asked)),
            achievable=achievable(recipe.prune, source.model),
            stages=stages(plans),
            calibration=calibration.facts if calibration else None,
            blocks_resumed=resumed,
        )
        result = finish(work, source, clock, done, options=recipe.evaluate, reload=reload, progress=progress)
    if recipe.recover is not None:
        return recover(
            str(work.final),
            recipe.output,
            recipe.recover,
            seed=recipe.seed,
            overwrite=overwrite,
            device=recipe.device,
            evaluate=recipe.evaluate,
            dense=str(folder),
            reload=reload,
            progress=progress,
        )
    return result


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
    fingerprint = {"plans": [one.id for one in plans], "weights": source.scan.weights, "versions": _code()}
    with deliver(final, fingerprint, overwrite=overwrite) as work:
        for one in plans:
            find(one.method).model_validate(one.config).apply(source.model, one)
        save_plans(plans, work.plans)
        with clock.phase("write"):
            work.hashes |= export(source.reader, work.folder, plans, progress)
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


def _pruned_folder(recipe: Recipe) -> Path:
    """Return where the pruned model goes: beside the output when a recovery makes the output from it."""
    if recipe.recover is None:
        return recipe.output
    return recipe.output.with_name(f"{recipe.output.name}.pruned")


def _calibrate_on(recipe: Recipe, source: Source) -> data.Calibration | None:
    if not any(step.looks_at_data for step in recipe.prune):
        return None
    options = recipe.calibration
    if options.source == "demo" and recipe.model != "demo":
        logger.warning(
            "calibrating on the built-in demo text; give --calibration text like what the model will read"
        )
    return data.load(
        options.source,
        source.reading(),
        samples=options.samples,
        length=options.length,
        seed=recipe.seed,
        batch_size=options.batch_size,
        column=options.column,
        split=options.split,
        revision=options.revision,
        max_length=data.positions(source.model.config),
    )


def _fingerprint(recipe: Recipe, source: Source, calibration: data.Calibration | None) -> dict[str, Any]:
    """Return everything that shapes the bytes of the result."""
    return {
        "prune": [{"method": step.method(), **step.model_dump(mode="json")} for step in recipe.prune],
        "weights": source.scan.weights,
        "architecture": architecture_of(source.model),
        "calibration": calibration.facts | {"batch_size": recipe.calibration.batch_size}
        if calibration
        else None,
        "dtype": recipe.dtype,
        "device": source.device,
        # Sums are split among threads, so their number shows in the last bits.
        "threads": torch.get_num_threads(),
        "versions": _code(),
    }


def _code() -> dict[str, str | None]:
    return {
        name: value for name, value in versions().items() if name in ("structprune", "torch", "transformers")
    }


def _decide(
    stages: Sequence[Pruner],
    source: Source,
    calibration: data.Calibration | None,
    work: Delivery,
    progress: Progress,
) -> tuple[list[Plan], int]:
    """Calibrate and apply stage after stage; return the plans and how many blocks were already decided."""
    plans: list[Plan] = []
    resumed = 0
    for number, pruner in enumerate(stages, start=1):
        folder = work.plans / folder_of(number, pruner.method())
        weights = source.scan.weights if number == 1 else plans[-1].id
        if any(block.referred for plan in plans_of(folder) for block in plan.blocks):
            # Stopped between the last two steps: the values are in files that are about to be written anew.
            shutil.rmtree(folder)
        writer = pruner.writer(folder, source.model, weights, progress)
        resumed += writer.finished
        if (folder / "plan.json").is_file():
            plan = Plan.load(folder)
        else:
            plan = pruner.calibrate(source.model, calibration.batches if calibration else [], writer)
        pruner.apply(source.model, plan)
        plans.append(plan)
    return plans, resumed
