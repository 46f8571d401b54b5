"""The end of every run that writes a model: measure, prove, report, and only then publish the folder."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from structprune.calibration.data import Calibration
from structprune.checkpoint.delivery import Delivery
from structprune.checkpoint.plans import refer_plans, stages
from structprune.checkpoint.source import Source
from structprune.errors import EnvironmentFailure, VerificationError
from structprune.evaluation.evaluation import Evaluation, evaluate, gate
from structprune.models.cost import weight_bytes
from structprune.models.streamed import Model
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress
from structprune.proof.verify import verify
from structprune.recipe.options import EvaluateOptions
from structprune.recipe.recipe import Recipe
from structprune.report import card, plots, report

# Without an `evaluate:` a run still measures what it did, on built-in text: enough for every tokenizer.
DEFAULT = {"text": ("demo",), "windows": 16}
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Done:
    """What a run did, for its report.

    Attributes:
        method: Name of the method, or of several joined with "+".
        recipe: The recipe, as YAML.
        stages: What each stage was and what it was asked for.
        calibration: Where the calibration tokens came from.
        blocks_resumed: Blocks that an earlier, interrupted run had decided.
        revalued: Stored tensors whose kept weights changed on purpose.
        more: What else stands in the report.
    """

    method: str
    recipe: str
    stages: Sequence[Mapping[str, Any]] = ()
    calibration: Mapping[str, Any] | None = None
    blocks_resumed: int = 0
    revalued: Collection[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


def done_by(
    recipe: Recipe,
    plans: Sequence[Plan],
    calibration: Calibration | None,
    resumed: int,
) -> Done:
    """Return what a run of a recipe did.

    Args:
        recipe: The recipe.
        plans: One per stage.
        calibration: What it looked at.
        resumed: Blocks that an earlier, interrupted run had decided.
    """
    return Done(
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
    done: Done,
    *,
    options: EvaluateOptions | None,
    dense: Source | None = None,
    reload: bool = True,
    progress: Progress,
) -> dict[str, Any]:
    """Measure, prove, report and publish a written folder; return the report.

    Args:
        work: The folder, its weights and side files written.
        source: What it was made from; its model has become what was written.
        clock: The run's.
        done: What the run did.
        options: What to measure; a few windows of built-in text unless given.
        dense: What to compare with; the source as it was unless given.
        reload: Open the folder in a fresh process.
        progress: Told (stage, done, total).

    Raises:
        VerificationError: The folder does not hold what was asked for; nothing is published.
        QualityError: The quality gate was missed; nothing is published.
    """
    compared = dense or source
    with clock.phase("evaluate"):
        evaluation = measure(source, compared, options)
    with clock.phase("prove"):
        verification = verify(
            work.folder,
            source.folder,
            stream=source.streamed,
            hashes=False,
            reload=reload,
            revalued=done.revalued,
            reference=source.model if source.dtype == "auto" else None,
            trust_remote_code=source.trusted,
            progress=progress,
        )
    if not verification.ok:
        check = verification.failed[0]
        raise VerificationError(f"{work.folder}: {check.name}: {check.detail}", hint="nothing was published")
    size = report.Size(compared.parameters, weight_bytes(compared.folder))
    made = report.build(
        verification,
        output=work.final,
        method=done.method,
        dense=size,
        seconds=clock.seconds,
        stages=done.stages,
        blocks_resumed=done.blocks_resumed,
        calibration=done.calibration,
        evaluation=evaluation.as_json() | {"generations": evaluation.generations},
    )
    made |= {"phases": {name: round(seconds, 3) for name, seconds in clock.phases.items()}, **done.more}
    evaluation.save_harness(work.folder / "structprune" / "evaluation")
    report.write_report(work.folder, made)
    draw(work, made)
    card.write_card(work.folder, made, source=compared.folder, base=compared.name, recipe=done.recipe)
    if options is not None and options.max_ppl_ratio is not None:
        gate(evaluation, options.max_ppl_ratio)
    refer_plans(work.plans, work.folder)
    facts = {"method": done.method, "source_weights": source.scan.weights, "revalued": sorted(done.revalued)}
    work.publish(stages=[str(stage["folder"]) for stage in done.stages], facts=facts)
    return made


def draw(work: Delivery, made: Mapping[str, Any]) -> None:
    """Draw the report's plot where matplotlib is installed; a report without pictures is still whole."""
    try:
        plots.sparsity_per_block(work.folder / "structprune" / "plots" / "sparsity.png", made)
    except EnvironmentFailure as missing:
        if not isinstance(missing.__context__, ModuleNotFoundError):
            raise


def measure(source: Source, dense: Source | None, options: EvaluateOptions | None) -> Evaluation:
    """Evaluate a run's model, and the dense one in the same run.

    Args:
        source: Its model is measured.
        dense: Opened again from its files and measured too; None for no comparison.
        options: What to measure.
    """
    if options is None:
        if source.tokenizer is None:
            return Evaluation()
        longest = getattr(source.model.config.get_text_config(), "max_position_embeddings", None)
        length = min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
        options = EvaluateOptions.model_validate(
            DEFAULT | {"length": length, "generations": not source.streamed}
        )
    other: Model | None = dense.again() if dense else None
    return evaluate(
        source.model,
        source.reading(),
        text=options.text,
        tasks=options.tasks,
        include_path=options.include_path,
        dense=other,
        dense_tokenizer=dense.tokenizer if dense else None,
        length=options.length,
        stride=options.stride,
        windows=options.windows,
        batch_size=options.batch_size,
        limit=options.limit,
        column=options.column,
        split=options.split,
        revision=options.revision,
        prompts=3 if options.generations else 0,
    )
