"""What a recovery started from and ended with, written: a whole model, or an adapter beside its base."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from structprune.checkpoint.adapter import Adapter, can_be_plain, save_adapter
from structprune.checkpoint.delivery import Delivery
from structprune.checkpoint.export import export
from structprune.checkpoint.plans import save_plans, stages
from structprune.checkpoint.source import Source
from structprune.errors import InputError
from structprune.evaluation.exam import Exam
from structprune.models.edited_reader import Reader
from structprune.models.identity import names_of, skeleton
from structprune.models.streamed import StreamedModel
from structprune.pipeline.finish import finish, measure
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress
from structprune.recipe.draft import Run
from structprune.recipe.options import RecoverOptions
from structprune.recovery.merged import MergedReader
from structprune.recovery.outcome import Recovery
from structprune.recovery.windows import TrainingWindows
from structprune.report import report
from structprune.report.report import RunRecord, read_report


@dataclass(frozen=True)
class Task:
    """What a recovery starts from, and how it is done.

    Attributes:
        options: How to train.
        source: The pruned model; training changes it where it is in memory.
        plans: What was decided on it.
        windows: The text.
        teacher: The dense model that is imitated, if any.
        compared: The dense model that the report compares with, if any.
        exam: What to measure the result on.
        progress: Told (stage, done, total).
        clock: The run's.
    """

    options: RecoverOptions
    source: Source
    plans: Sequence[Plan]
    windows: TrainingWindows
    teacher: Source | None
    compared: Source | None
    exam: Exam
    progress: Progress
    clock: Clock


def publish_merged(work: Delivery, task: Task, recovery: Recovery, recipe: Run) -> dict[str, Any]:
    """Write the model with the change merged, and the plans beside it; return the report."""
    with task.clock.phase("write"):
        reader, values, changed = _result(task, recovery)
        written = export(
            reader,
            work.folder,
            task.progress,
            replaced=values,
            tokenizer=task.source.opening.tokenizer,
            unchanged=work.writing.unchanged,
        )
        work.note(written.hashes, written.digests)
        work.weights |= written.weights
        save_plans(task.plans, work.plans)
    record = RunRecord(
        method="+".join([*(plan.method for plan in task.plans), "recover"]),
        recipe=recipe.text(),
        command=recipe.command,
        calibration=_calibration(task.source.folder),
        stages=stages(task.plans),
        revalued=changed,
        more={"recovery": _facts(recovery, task)},
    )
    return finish(
        work,
        task.source,
        task.clock,
        record,
        exam=task.exam,
        dense=task.compared,
        progress=task.progress,
    )


def publish_adapter(work: Delivery, task: Task, recovery: Recovery) -> dict[str, Any]:
    """Write the change beside its base instead of merging it; return the report."""
    source = task.source
    adapter = Adapter(
        recovery.factors,
        str(source.folder.resolve()),
        source.scan.weights,
        _origin(task.plans),
        plain=can_be_plain(skeleton(source.model), recovery.zeros),
    )
    _result(task, recovery)
    with task.clock.phase("write"):
        save_adapter(work.folder, adapter)
    with task.clock.phase("evaluate"):
        evaluation = measure(source, task.compared, task.exam, progress=task.progress)
    made = {
        "output": str(work.final),
        "adapter": {
            "base": adapter.base,
            "base_weights": adapter.base_weights,
            "tensors": len(adapter.factors),
        },
        "recovery": _facts(recovery, task),
        "evaluation": evaluation.as_json(),
        "seconds": round(task.clock.seconds, 3),
        "loads_in": ["structprune", *(["peft"] if adapter.plain else [])],
    }
    report.write_report(work.folder, made)
    work.publish(stages=[], facts={"adapter_of": source.scan.weights})
    return made


def _result(task: Task, recovery: Recovery) -> tuple[Reader, dict[str, Tensor], tuple[str, ...]]:
    """Return the checkpoint to write, new values of its tensors, and the names of those that changed.

    A model that was trained in parts is whole nowhere: from here on it is streamed with the change merged.
    """
    source = task.source
    if isinstance(source.model, StreamedModel):
        reader = MergedReader(source.model, task.plans, recovery)
        source.model.reopen(reader)
        return reader, {}, reader.changed
    parameters = dict(source.model.named_parameters())
    values = {name: parameters[name].detach() for name in recovery.factors}
    stored = names_of(source.model).to_stored(values)
    return source.reader, stored, tuple(stored)


def _facts(recovery: Recovery, task: Task) -> dict[str, Any]:
    return {
        "start_loss": recovery.start_loss,
        "best_loss": recovery.best_loss,
        "best_step": recovery.best_step,
        "stopped": recovery.stopped,
        "steps_resumed": recovery.steps_resumed,
        "history": [check._asdict() for check in recovery.history],
        "data": task.windows.facts,
        "masks": _origin(task.plans),
        "ranks": task.options.ranks,
    }


def _calibration(folder: Path) -> dict[str, Any] | None:
    """Return what the run that wrote a folder had looked at; None where its report does not say."""
    with suppress(InputError):
        found = read_report(folder).get("calibration")
        return found if isinstance(found, dict) else None
    return None


def _origin(plans: Sequence[Plan]) -> Literal["plans", "nonzero"]:
    return "plans" if plans else "nonzero"
