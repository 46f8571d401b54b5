"""The end of every run that writes a model: measure, prove, report, and only then publish the folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from structprune.calibration.data import Calibration
from structprune.checkpoint.delivery import Delivery
from structprune.checkpoint.plans import refer_plans, stages
from structprune.checkpoint.source import Source
from structprune.errors import EnvironmentFailure, VerificationError
from structprune.evaluation.evaluation import Evaluation, evaluate, gate, nothing_measured
from structprune.evaluation.exam import Exam
from structprune.evaluation.memory import Memory
from structprune.models.cost import weight_bytes
from structprune.models.skeleton import task_of
from structprune.pipeline.bench import measure_speed, written_contenders
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress, silent
from structprune.proof.verification import Verification
from structprune.proof.verify import verify
from structprune.ranks import Ranks
from structprune.recipe.recipe import Recipe
from structprune.report import card, plots, report
from structprune.report.figures import plain
from structprune.report.report import RunRecord


def record_of(
    recipe: Recipe, plans: Sequence[Plan], calibration: Calibration | None, resumed: int
) -> RunRecord:
    """Return what a run of a recipe did.

    Args:
        recipe: The recipe.
        plans: One per stage.
        calibration: What it looked at.
        resumed: Blocks that an earlier, interrupted run had decided.
    """
    return RunRecord(
        method="+".join(step.method() for step in recipe.prune),
        recipe=recipe.text(),
        stages=stages(plans),
        calibration=calibration.facts if calibration else None,
        blocks_resumed=resumed,
    )


def finish(
    work: Delivery,
    source: Source,
    clock: Clock,
    record: RunRecord,
    *,
    exam: Exam,
    dense: Source | None = None,
    evaluation: Evaluation | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure, prove, report and publish a written folder; return the report.

    Args:
        work: The folder, its weights and side files written.
        source: What it was made from; its model has become what was written.
        clock: The run's.
        record: What the run did.
        exam: What to measure it on.
        dense: What to compare with; the source as it was unless given.
        evaluation: What the exam gave, where it has been held.
        progress: Told (stage, done, total).

    Raises:
        VerificationError: The folder does not hold what was asked for; nothing is published.
        QualityError: The quality gate was missed; nothing is published.
    """
    compared = dense or source
    if evaluation is None:
        with clock.phase("evaluate"):
            evaluation = measure(source, compared, exam, progress=progress)
    with clock.phase("prove"):
        verification = prove(work, source, record, progress)
    if exam.workload is not None:
        with clock.phase("bench"):
            pair = written_contenders(work.folder, work.final, compared)
            speed = measure_speed(pair, exam.workload, progress)
    size = report.Size(compared.parameters, weight_bytes(compared.folder))
    made = report.build(
        verification,
        record,
        output=work.final,
        dense=size,
        seconds=clock.seconds,
        evaluation=evaluation.as_json() | {"generations": evaluation.generations},
    )
    phases = {name: round(seconds, 3) for name, seconds in clock.phases.items()}
    made |= {
        "found": source.prior,
        "phases": phases,
        "weights": work.weights,
        "task": task_of(source.model.config),
        **record.more,
    }
    if exam.workload is not None:
        made["bench"] = plain(speed)
    evaluation.save_harness(work.folder / "structprune" / "evaluation")
    report.write_report(work.folder, made)
    draw(work, made)
    card.write_card(work.folder, made, source=compared.folder, base=compared.name, recipe=record.recipe)
    if exam.options.max_ppl_ratio is not None:
        gate(evaluation, exam.options.max_ppl_ratio)
    refer_plans(work.plans, work.folder)
    facts = {
        "method": record.method,
        "source_weights": source.scan.weights,
        "revalued": sorted(record.revalued),
    }
    work.publish(stages=[str(stage["folder"]) for stage in record.stages], facts=facts)
    return made


def prove(work: Delivery, source: Source, record: RunRecord, progress: Progress) -> Verification:
    """Return what was measured of a written folder, in which every check holds.

    Raises:
        VerificationError: One does not.
    """
    verification = verify(
        work.folder,
        source.folder,
        opening=source.opening,
        written=work.digests,
        reload=work.writing.reload,
        revalued=record.revalued,
        reference=source.model if source.opening.dtype == "auto" else None,
        progress=progress,
    )
    if not verification.ok:
        check = verification.failed[0]
        raise VerificationError(f"{work.folder}: {check.name}: {check.detail}", hint="nothing was published")
    return verification


def draw(work: Delivery, made: Mapping[str, Any]) -> None:
    """Draw the zeros of each block where there are any, and matplotlib is installed."""
    if not made["sparsity"]:
        return
    try:
        plots.sparsity_per_block(work.folder / "structprune" / "plots" / "sparsity.png", made)
    except EnvironmentFailure as missing:
        if not isinstance(missing.__context__, ModuleNotFoundError):
            raise


def measure(
    source: Source,
    dense: Source | None,
    exam: Exam,
    memory: Memory | None = None,
    ranks: Ranks = Ranks(),
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate a run's model, and the dense one in the same run.

    Args:
        source: Its model is measured.
        dense: Opened again from its files and measured too; None for no comparison.
        exam: What to measure it on.
        memory: What the dense model said already.
        ranks: Those who share the work; all of them come here.
        progress: Told (stage, done, total).
    """
    if not exam.asks:
        return nothing_measured(exam)
    return evaluate(
        source.model,
        source.checked_tokenizer(),
        exam,
        dense=dense.reopen_model() if dense else None,
        dense_tokenizer=dense.tokenizer if dense else None,
        memory=memory,
        ranks=ranks,
        progress=progress,
    )
