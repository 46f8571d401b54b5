"""Carries out an earlier decision on the model it was made on; needs no data."""

from pathlib import Path
from typing import Any

import yaml

from structprune.checkpoint.delivery import deliver
from structprune.checkpoint.inputs import local_inputs
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.output import check_output
from structprune.checkpoint.plans import read_plans, save_plans, stages
from structprune.checkpoint.side_files import check_side_files, copied_names
from structprune.checkpoint.source import open_source
from structprune.checkpoint.writing import Writing
from structprune.errors import InputError
from structprune.models.cost import weight_bytes
from structprune.models.opening import Opening
from structprune.pipeline.decision import shaping_versions, write
from structprune.pipeline.examine import prepare_exam
from structprune.pipeline.finish import finish
from structprune.progress import Clock, Progress, silent
from structprune.pruners.catalogue import find
from structprune.report.report import RunRecord


def apply(
    model: str,
    output: str | Path,
    plan: str | Path,
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    revision: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Carry the plans of an earlier run out on the model they were decided on; needs no data.

    Args:
        model: "demo", a folder, a hub name.
        output: The folder to write.
        plan: A plan's folder, a folder of plans, or a folder that structprune wrote.
        opening: How the model is opened.
        writing: How the output is written.
        revision: Branch, tag or commit of a hub model.
        progress: Told (stage, done, total).

    Raises:
        InputError: The plan is damaged, or was decided on another architecture or other weights.
    """
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(model, revision=revision)
        final = check_output(
            [*local_inputs("the model", folder), *local_inputs("the plan", plan)],
            Path(output),
            overwrite=writing.overwrite,
            needed_bytes=weight_bytes(folder),
        )
        check_side_files(folder, opening)
        plans = read_plans(Path(plan))
        source = open_source(model, folder, opening)
        if plans[0].weights != source.scan.weights:
            raise InputError(
                f"{plan}: decided on other weights ({plans[0].weights[:12]}) than {folder} holds "
                f"({source.scan.weights[:12]})",
                hint="give the model that the plan was made from",
            )
    run = {"plans": [one.id for one in plans], "weights": source.scan.weights, "versions": shaping_versions()}
    with deliver(final, run, writing, files=copied_names(folder, source.opening.tokenizer)) as work:
        for one in plans:
            find(one.method).model_validate(one.config).apply(source.model, one)
        save_plans(plans, work.plans)
        with clock.phase("write"):
            write(source, work, plans, progress)
        record = RunRecord(
            method="+".join(one.method for one in plans),
            recipe=yaml.safe_dump(
                {"model": model, "output": str(output), "plan": str(plan)}, sort_keys=False
            ),
            stages=stages(plans),
        )
        exam = prepare_exam(None, source, None)
        return finish(work, source, clock, record, exam=exam, progress=progress)
