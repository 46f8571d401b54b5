"""The story of a recovery: open a pruned folder, train, write the merged weights under the same masks."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import PreTrainedModel

from structprune.calibration.data import positions
from structprune.checkpoint.adapter import Adapter, save_adapter
from structprune.checkpoint.delivery import Delivery, deliver, work_folder
from structprune.checkpoint.export import export
from structprune.checkpoint.inputs import local_inputs
from structprune.checkpoint.integrity import intact_manifest
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.manifest import OURS
from structprune.checkpoint.output import check_output
from structprune.checkpoint.plans import plans_of, save_plans, stages
from structprune.checkpoint.side_files import check_side_files, copied_names
from structprune.checkpoint.source import Source, open_source
from structprune.checkpoint.writing import Writing
from structprune.errors import QualityError
from structprune.evaluation.exam import Exam
from structprune.machine import versions
from structprune.models.cost import weight_bytes
from structprune.models.identity import names_of, skeleton
from structprune.models.opening import Opening
from structprune.models.streamed import open_skeleton
from structprune.pipeline.decision import shaping_versions
from structprune.pipeline.examine import prepare_exam
from structprune.pipeline.finish import finish, measure
from structprune.pipeline.inputs import inputs_of_evaluation, inputs_of_recovery
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress, silent
from structprune.recipe.options import EvaluateOptions, RecoverOptions
from structprune.recovery.masks import masks_of
from structprune.recovery.outcome import Recovery
from structprune.recovery.processes import Processes
from structprune.recovery.state import TrainingState
from structprune.recovery.training import check_teacher, train
from structprune.recovery.windows import TrainingWindows, draw
from structprune.report import report
from structprune.report.report import RunRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """What a recovery starts from, and how it is done.

    Attributes:
        options: How to train.
        source: The pruned model; training changes it.
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


def recover(
    model: str,
    output: str | Path,
    options: RecoverOptions | None = None,
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    revision: str | None = None,
    evaluate: EvaluateOptions | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a pruned model with LoRA that keeps every removed weight removed, and write the result.

    Started by `accelerate launch`, every process trains and the first one writes; the others return {}. A run
    that was interrupted goes on after its last check, and ends with the bytes it would have had.

    Args:
        model: A pruned folder; of a model without plans, what is zero now stays zero.
        output: The folder to write: a whole model, or an adapter with `options.keep_adapter`.
        options: How to train.
        opening: How the models are opened; always in memory, and in the dtype of the files.
        writing: How the output is written.
        revision: Branch, tag or commit of a hub model.
        evaluate: What to measure; what training left of its text unless given. The report compares with its
            `compare`, or with the teacher where it names none.
        progress: Told (stage, done, total).

    Raises:
        QualityError: Nothing beat the start; nothing is written.
        InputError: A model or the data cannot be trusted, or what an interrupted run left is damaged.
    """
    options = options or RecoverOptions()
    opening = replace(opening, stream=False, dtype="auto")
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(model, revision=revision)
        needed = weight_bytes(folder)
        inputs = [
            *local_inputs("the model", folder),
            *local_inputs("the tokenizer", opening.tokenizer),
            *inputs_of_recovery(options),
            *inputs_of_evaluation(evaluate),
        ]
        final = check_output(inputs, Path(output), overwrite=writing.overwrite, needed_bytes=needed)
        check_side_files(folder, opening)
        source = open_source(model, folder, opening)
        plans = [plan.beside_weights() for plan in plans_of(folder)]
        windows = _windows(source, options)
        teacher = _open_other(options.teacher, opening)
        dense = evaluate.compare if evaluate else None
        compared = teacher if dense in (None, options.teacher) else _open_other(dense, opening)
        exam = prepare_exam(evaluate, source, windows.left, compared)
    task = _Task(options, source, plans, windows, teacher, compared, exam, progress, clock)
    processes = Processes(opening.device)
    run = _fingerprint(task, processes)
    if not processes.writes:
        processes.wait()
        with suppress(QualityError):  # which the first process raises too
            _train(task, processes, work_folder(final, run))
        return {}
    with deliver(final, run, writing, files=copied_names(folder, source.opening.tokenizer)) as work:
        work.scratch += _state(work.folder).paths
        processes.wait()  # From here on the others may look for what an earlier run left.
        try:
            with clock.phase("train"):
                recovery = _train(task, processes, work.folder)
        except QualityError:
            work.drop()
            raise
        if options.keep_adapter:
            return _publish_adapter(work, task, recovery)
        recipe = {
            "model": model,
            "output": str(output),
            "recover": options.model_dump(mode="json", exclude_none=True),
        }
        return _publish_merged(work, task, recovery, yaml.safe_dump(recipe, sort_keys=False))


def check_recovery(options: RecoverOptions, source: Source) -> None:
    """Refuse what a recovery would refuse of its data and its teacher, before there is anything to recover.

    Raises:
        InputError: The data cannot be read or are too few, or the teacher cannot be opened or knows other
            tokens.
    """
    _windows(source, options)
    if options.teacher is not None:
        folder = resolve(options.teacher)
        intact_manifest(folder, source.opening)
        teacher = open_skeleton(folder, source.opening)
        check_teacher(skeleton(source.model), skeleton(teacher))


def _resident(source: Source) -> PreTrainedModel:
    assert isinstance(source.model, PreTrainedModel)
    return source.model


def _open_other(name: str | None, opening: Opening) -> Source | None:
    return open_source(name, resolve(name), opening) if name else None


def _windows(source: Source, options: RecoverOptions) -> TrainingWindows:
    # No more than training can look at, and the held-out part on top.
    looked_at = options.steps * options.batch_size
    limit = options.samples or int(looked_at / (1 - options.held_out)) + 64
    return draw(
        options.text_source,
        source.checked_tokenizer(),
        limit=limit,
        length=options.length,
        max_length=positions(source.model.config),
        seed=options.seed,
    )


def _fingerprint(task: _Task, processes: Processes) -> dict[str, Any]:
    """Return everything that shapes the bytes of the result."""
    return {
        "recover": task.options.model_dump(mode="json"),
        "weights": task.source.scan.weights,
        "plans": [plan.id for plan in task.plans],
        "teacher": task.teacher.scan.weights if task.teacher else None,
        "data": task.windows.facts,
        "device": processes.device.type,
        "processes": processes.count,
        # Sums are split among threads, so their number shows in the last bits.
        "threads": torch.get_num_threads(),
        "versions": shaping_versions() | {name: versions()[name] for name in ("accelerate", "peft")},
    }


def _state(folder: Path) -> TrainingState:
    return TrainingState(folder / OURS / "training")


def _train(task: _Task, processes: Processes, folder: Path) -> Recovery:
    if not task.plans:
        logger.warning("%s holds no plans: what is zero now stays zero", task.source.folder)
    return train(
        _resident(task.source),
        masks_of(_resident(task.source), task.plans),
        task.windows.ids,
        task.options,
        teacher=_resident(task.teacher) if task.teacher else None,
        processes=processes,
        state=_state(folder),
        progress=task.progress,
    )


def _facts(recovery: Recovery, task: _Task) -> dict[str, Any]:
    return {
        "start_loss": recovery.start_loss,
        "best_loss": recovery.best_loss,
        "best_step": recovery.best_step,
        "stopped": recovery.stopped,
        "steps_resumed": recovery.steps_resumed,
        "history": [check._asdict() for check in recovery.history],
        "data": task.windows.facts,
        "masks": _origin(task.plans),
    }


def _origin(plans: Sequence[Plan]) -> Literal["plans", "nonzero"]:
    return "plans" if plans else "nonzero"


def _publish_merged(work: Delivery, task: _Task, recovery: Recovery, recipe: str) -> dict[str, Any]:
    """Write the model with the change merged, and the plans beside it; return the report."""
    with task.clock.phase("write"):
        names = names_of(task.source.model)
        parameters = dict(_resident(task.source).named_parameters())
        changed = names.to_stored({name: parameters[name].detach() for name in recovery.factors})
        written = export(
            task.source.reader,
            work.folder,
            task.progress,
            replaced=changed,
            tokenizer=task.source.opening.tokenizer,
        )
        work.note(*written)
        save_plans(task.plans, work.plans)
    record = RunRecord(
        method="+".join([*(plan.method for plan in task.plans), "recover"]),
        recipe=recipe,
        stages=stages(task.plans),
        revalued=tuple(changed),
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


def _publish_adapter(work: Delivery, task: _Task, recovery: Recovery) -> dict[str, Any]:
    """Write the change beside its base instead of merging it; return the report."""
    source = task.source
    adapter = Adapter(
        recovery.factors, str(source.folder.resolve()), source.scan.weights, _origin(task.plans)
    )
    with task.clock.phase("write"):
        save_adapter(work.folder, adapter)
    with task.clock.phase("evaluate"):
        evaluation = measure(source, task.compared, task.exam)
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
        "loads_in": ["structprune"],
    }
    report.write_report(work.folder, made)
    work.publish(stages=[], facts={"adapter_of": source.scan.weights})
    return made
