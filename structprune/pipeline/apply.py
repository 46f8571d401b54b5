"""Carries out an earlier decision on the model it was made on; needs no data."""

from pathlib import Path
from typing import Any

from structprune.checkpoint.delivery import deliver
from structprune.checkpoint.inputs import local_inputs
from structprune.checkpoint.locate import check_name, resolve
from structprune.checkpoint.output import check_output
from structprune.checkpoint.plans import read_plans, save_plans, stages
from structprune.checkpoint.running import check_stored
from structprune.checkpoint.side_files import check_side_files, copied_names
from structprune.checkpoint.source import open_source
from structprune.checkpoint.writing import Writing
from structprune.errors import InputError
from structprune.models.opening import Opening
from structprune.pipeline.decision import shaping_versions, write
from structprune.pipeline.examine import prepare_exam
from structprune.pipeline.finish import finish
from structprune.pipeline.kept import write_recipe
from structprune.pipeline.room import bytes_written
from structprune.progress import Clock, Progress, silent
from structprune.pruners.catalogue import check_lasting, find
from structprune.recipe.draft import ApplyRun
from structprune.recipe.fields import build
from structprune.report.report import RunRecord


def apply(
    model: str | ApplyRun,
    output: str | Path | None = None,
    plan: str | Path | None = None,
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    revision: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Carry the plans of an earlier run out on the model they were decided on; needs no data.

    Args:
        model: "demo", a folder, a hub name; or a whole recipe.
        output: The folder to write.
        plan: A plan's folder, a folder of plans, or a folder that structprune wrote.
        opening: How the model is opened.
        writing: How the output is written.
        revision: Branch, tag or commit of a hub model.
        progress: Told (stage, done, total).

    Raises:
        InputError: The plan is damaged, or was decided on another architecture or other weights.
    """
    if not isinstance(model, ApplyRun):
        asked = {"model": check_name(model), "output": output, "plan": plan, "revision": revision}
        model = build(ApplyRun, asked)
    return _apply(model, opening, writing, progress)


def _apply(run: ApplyRun, opening: Opening, writing: Writing, progress: Progress) -> dict[str, Any]:
    plan = run.plan
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(run.model, revision=run.revision)
        check_side_files(folder, opening)
        check_stored(folder)
        plans = read_plans(plan)
        chosen = [find(one.method).model_validate(one.config) for one in plans]
        for pruner in chosen:
            check_lasting(type(pruner))
        final = check_output(
            [
                *local_inputs("the model", folder),
                *local_inputs("the plan", plan),
                *local_inputs("the recipe", run.file),
            ],
            run.output,
            overwrite=writing.overwrite,
            needed_bytes=bytes_written(folder, chosen, run.output, writing),
        )
        source = open_source(run.model, folder, opening)
        if plans[0].weights != source.scan.weights:
            raise InputError(
                f"{plan}: decided on other weights ({plans[0].weights[:12]}) than {folder} holds "
                f"({source.scan.weights[:12]})",
                hint="give the model that the plan was made from",
            )
    shaped = {
        "plans": [one.id for one in plans],
        "weights": source.scan.weights,
        "versions": shaping_versions(),
        **writing.shaping,
    }
    with deliver(final, shaped, writing, files=copied_names(folder, source.opening.tokenizer)) as work:
        write_recipe(work, run)
        for pruner, one in zip(chosen, plans, strict=True):
            pruner.apply(source.model, one)
        save_plans(plans, work.plans)
        with clock.phase("write"):
            write(source, work, plans, progress)
        record = RunRecord(
            method="+".join(one.method for one in plans),
            recipe=run.text(),
            command=run.command,
            stages=stages(plans),
        )
        exam = prepare_exam(None, source, None)
        return finish(work, source, clock, record, exam=exam, progress=progress)
