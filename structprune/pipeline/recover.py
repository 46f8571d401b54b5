"""The story of a recovery: open a pruned folder, train, write the merged weights under the same masks."""

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from structprune.calibration.data import positions
from structprune.checkpoint.delivery import deliver, work_folder
from structprune.checkpoint.integrity import intact_manifest
from structprune.checkpoint.locate import check_name, resolve
from structprune.checkpoint.manifest import OURS
from structprune.checkpoint.output import check_output
from structprune.checkpoint.plans import plans_of
from structprune.checkpoint.running import check_stored
from structprune.checkpoint.side_files import check_side_files, copied_names
from structprune.checkpoint.source import Source, open_source
from structprune.checkpoint.writing import Writing
from structprune.errors import QualityError, UsageError
from structprune.machine import versions
from structprune.models.cost import weight_bytes
from structprune.models.identity import skeleton
from structprune.models.opening import Opening
from structprune.models.streamed import StreamedModel, open_skeleton
from structprune.pipeline.decision import shaping_versions
from structprune.pipeline.estimate import estimate_training
from structprune.pipeline.examine import prepare_exam, with_bench
from structprune.pipeline.inputs import inputs_of_recover_run
from structprune.pipeline.kept import kept_report, may_stand, write_recipe
from structprune.pipeline.recovered import Task, publish_adapter, publish_merged
from structprune.progress import Clock, Progress, silent
from structprune.ranks import Ranks, joined_ranks
from structprune.recipe.draft import RecoverRun, Run
from structprune.recipe.fields import build
from structprune.recipe.options import EvaluateOptions, RecoverOptions
from structprune.recovery.masks import masks_of
from structprune.recovery.outcome import Recovery
from structprune.recovery.ranks import spell_out
from structprune.recovery.state import TrainingState
from structprune.recovery.training import check_teacher, train, train_divided
from structprune.recovery.windows import TrainingWindows, draw, windows_wanted
from structprune.report.figures import bytes_text

logger = logging.getLogger(__name__)


def recover(
    model: str | RecoverRun,
    output: str | Path | None = None,
    options: RecoverOptions | None = None,
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    revision: str | None = None,
    evaluate: EvaluateOptions | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a pruned model with LoRA that keeps every removed weight removed, and write the result.

    Started by a launcher such as torchrun, every process trains and the first one writes; the others return
    {}. A run that was interrupted goes on after its last check, and ends with the bytes it would have had.

    Args:
        model: A pruned folder; of a model without plans, what is zero now stays zero. Or a whole recipe.
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
        UsageError: Ranks by importance, and no plan of the model tells it.
        InputError: A model or the data cannot be trusted, or what an interrupted run left is damaged.
    """
    if isinstance(model, RecoverRun):
        return recover_run(model, opening=opening, writing=writing, progress=progress)
    run = build(
        RecoverRun,
        {
            "model": check_name(model),
            "output": output,
            "recover": options or RecoverOptions(),
            "evaluate": evaluate,
            "device": opening.device,
            "tokenizer": opening.tokenizer,
            "revision": revision,
        },
    )
    return recover_run(run, opening=opening, writing=writing, progress=progress)


def recover_run(
    run: RecoverRun, *, saved: Run | None = None, opening: Opening, writing: Writing, progress: Progress
) -> dict[str, Any]:
    """Train as a recipe says; arguments and errors are those of `recover`.

    Args:
        run: The recipe.
        saved: The recipe of the whole run, where this is its last part; kept with the result.
        opening: How the models are opened.
        writing: How the output is written.
        progress: Told (stage, done, total).
    """
    with joined_ranks() as ranks:
        return _recover_on(ranks, run, saved or run, opening=opening, writing=writing, progress=progress)


def _recover_on(
    ranks: Ranks, run: RecoverRun, saved: Run, *, opening: Opening, writing: Writing, progress: Progress
) -> dict[str, Any]:
    options, evaluate = run.recover or RecoverOptions(), run.evaluate
    writing.refuse("refer", because="training changes weights, which are then nowhere else")
    if options.keep_adapter:
        writing.refuse("link", because="an adapter is written without the weights of its model")
    # A model that is divided is whole nowhere, and is read block by block.
    opening = replace(opening, stream=options.shard, dtype="auto", device=run.device, tokenizer=run.tokenizer)
    check_shares(options, ranks)
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(run.model, revision=run.revision)
        needed = weight_bytes(folder)
        inputs = inputs_of_recover_run(run, folder)
        final = check_output(
            inputs, run.output, overwrite=may_stand(run.output, writing), needed_bytes=needed
        )
        check_side_files(folder, opening)
        check_stored(folder)
        source = open_source(run.model, folder, opening)
        plans = [plan.beside_weights() for plan in plans_of(folder)]
        options = spell_out(options, source.model, plans)
        windows = _windows(source, options)
        teacher = _open_other(options.teacher, opening)
        if teacher is not None:  # before it is compared with, as another dense model would be
            check_teacher(skeleton(source.model), skeleton(teacher.model))
        dense = evaluate.compare if evaluate else None
        compared = teacher if dense in (None, options.teacher) else _open_other(dense, opening)
        exam = prepare_exam(evaluate, source, windows.left, compared)
        exam = with_bench(exam, run.bench, compared or source)
    if ranks.alone:
        _warn_of_memory(options, source, teacher)
    task = Task(options, source, plans, windows, teacher, compared, exam, progress, clock)
    shaped = _fingerprint(task, ranks)
    ranks.check_alike("this run", shaped)  # All have looked at the output before the first one locks it.
    if report := kept_report(final, shaped, saved, writing):
        return report
    if not ranks.first:
        ranks.wait()
        with suppress(QualityError):  # which the first process raises too
            _train(task, ranks, work_folder(final, shaped))
        return {}
    check_output(inputs, final, overwrite=writing.overwrite)
    with deliver(final, shaped, writing, files=copied_names(folder, source.opening.tokenizer)) as work:
        write_recipe(work, saved)
        work.scratch += _state(work.folder).paths
        ranks.wait()  # From here on the others may look for what an earlier run left.
        try:
            with clock.phase("train"):
                recovery = _train(task, ranks, work.folder)
        except QualityError:
            work.drop()
            raise
        if options.keep_adapter:
            return publish_adapter(work, task, recovery)
        return publish_merged(work, task, recovery, saved)


def check_recovery(options: RecoverOptions, source: Source) -> None:
    """Refuse what a recovery would refuse of its data and its teacher, before there is anything to recover.

    Raises:
        UsageError: The model is to be divided, and this is one process.
        InputError: The data cannot be read or are too few, or the teacher cannot be opened or knows other
            tokens.
    """
    check_shares(options, Ranks())
    _windows(source, options)
    teacher_outline(options, skeleton(source.model), source.opening)


def teacher_outline(
    options: RecoverOptions, model: PreTrainedModel, opening: Opening
) -> StreamedModel | None:
    """Return the teacher without its weights, if one is to be imitated.

    Raises:
        InputError: It cannot be opened, or knows other tokens than the model.
    """
    if options.teacher is None:
        return None
    folder = resolve(options.teacher)
    intact_manifest(folder, opening)
    teacher = open_skeleton(folder, opening)
    check_teacher(model, skeleton(teacher))
    return teacher


def check_shares(options: RecoverOptions, ranks: Ranks) -> None:
    """Check that the processes of a run can share the model and the sequences of a step.

    Raises:
        UsageError: There is one process to divide a model among, or they do not divide the sequences.
    """
    if options.shard and ranks.alone:
        raise UsageError(
            "recover.shard: the model is divided among processes, and this is the only one",
            hint="start several with torchrun, or leave out --shard",
        )
    if rest := options.batch_size % ranks.count:
        fitting = options.batch_size - rest or ranks.count
        raise UsageError(
            f"recover.batch_size: {options.batch_size} sequences per step for {ranks.count} processes",
            hint=f"a multiple of them, such as --set recover.batch_size={fitting}",
        )


def _open_other(name: str | None, opening: Opening) -> Source | None:
    return open_source(name, resolve(name), opening) if name else None


def _windows(source: Source, options: RecoverOptions) -> TrainingWindows:
    return draw(
        options.text_source,
        source.checked_tokenizer(),
        limit=windows_wanted(options),
        length=options.length,
        max_length=positions(source.model.config),
        seed=options.seed,
    )


def _warn_of_memory(options: RecoverOptions, source: Source, teacher: Source | None) -> None:
    """Say so where training is expected to need more than there is; it may yet do."""
    other = teacher.model if teacher else None
    expected = estimate_training(options, source.model, other, source.opening.device)
    if expected["memory_bytes"] > expected["free_bytes"]:
        logger.warning(
            "training is expected to need %s, and %s are free; recover.gradient_checkpointing, a smaller "
            "batch_size and a smaller length take less",
            bytes_text(expected["memory_bytes"]),
            bytes_text(expected["free_bytes"]),
        )


def _fingerprint(task: Task, ranks: Ranks) -> dict[str, Any]:
    """Return everything that shapes the bytes of the result."""
    return {
        # Whether it runs blocks twice shapes no byte: a training that ran out of memory goes on with it.
        "recover": task.options.model_dump(mode="json", exclude={"gradient_checkpointing"}),
        "weights": task.source.scan.weights,
        "plans": [plan.id for plan in task.plans],
        "teacher": task.teacher.scan.weights if task.teacher else None,
        "data": task.windows.facts,
        "device": task.source.opening.device.partition(":")[0],
        "ranks": ranks.count,
        # Sums are split among threads, so their number shows in the last bits.
        "threads": torch.get_num_threads(),
        "versions": shaping_versions() | {name: versions()[name] for name in ("accelerate", "peft")},
    }


def _state(folder: Path) -> TrainingState:
    return TrainingState(folder / OURS / "training")


def _train(task: Task, ranks: Ranks, folder: Path) -> Recovery:
    if not task.plans and ranks.first:
        logger.warning("%s holds no plans: what is zero now stays zero", task.source.folder)
    if task.options.shard:
        return train_divided(
            _emptied(task.source),
            task.plans,
            task.windows.ids,
            task.options,
            teacher=_emptied(task.teacher) if task.teacher else None,
            ranks=ranks,
            state=_state(folder),
            progress=task.progress,
        )
    return train(
        task.source.resident,
        masks_of(task.source.resident, task.plans),
        task.windows.ids,
        task.options,
        teacher=task.teacher.resident if task.teacher else None,
        ranks=ranks,
        state=_state(folder),
        progress=task.progress,
    )


def _emptied(source: Source) -> StreamedModel:
    """Return a streamed model that training may use up."""
    model = source.reopen_model()
    assert isinstance(model, StreamedModel)
    return model
