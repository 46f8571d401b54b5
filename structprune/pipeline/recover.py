"""The story of a recovery: open a pruned folder, train, write the merged weights under the same masks."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from structprune.calibration.data import positions
from structprune.checkpoint.adapter import Adapter, save_adapter
from structprune.checkpoint.delivery import Delivery, deliver
from structprune.checkpoint.export import export
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.output import check_output, discard
from structprune.checkpoint.plans import plans_of, save_plans, stages
from structprune.checkpoint.source import Source, open_source
from structprune.checkpoint.writing import Writing
from structprune.errors import QualityError
from structprune.machine import versions
from structprune.models.cost import weight_bytes
from structprune.models.identity import names_of, skeleton
from structprune.models.opening import Opening
from structprune.models.streamed import open_skeleton
from structprune.pipeline.finish import finish, measure
from structprune.plan.key import Key
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress, silent
from structprune.recipe.options import EvaluateOptions, RecoverOptions
from structprune.recovery.masks import nonzero_masks
from structprune.recovery.training import Recovery, check_teacher, main_process, train
from structprune.recovery.windows import TrainingWindows, draw
from structprune.report import report
from structprune.report.report import RunRecord

logger = logging.getLogger(__name__)


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

    Started by `accelerate launch`, every process trains and the first one writes; the others return {}.

    Args:
        model: A pruned folder; of a model without plans, what is zero now stays zero.
        output: The folder to write: a whole model, or an adapter with `options.keep_adapter`.
        options: How to train.
        opening: How the models are opened; always in memory, and in the dtype of the files.
        writing: How the output is written.
        revision: Branch, tag or commit of a hub model.
        evaluate: What to measure, the default of a prune run unless given; the report compares with its
            `compare`, or with the teacher where it names none.
        progress: Told (stage, done, total).

    Raises:
        QualityError: Nothing beat the start; nothing is written.
    """
    options = options or RecoverOptions()
    opening = replace(opening, stream=False, dtype="auto")
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(model, revision=revision)
        final = check_output(
            folder, Path(output), overwrite=writing.overwrite, needed_bytes=weight_bytes(folder)
        )
        source = open_source(model, folder, opening)
        plans = [plan.beside_weights() for plan in plans_of(folder)]
        windows = _windows(source, options)
        teacher = _open_other(options.teacher, opening)
        dense = evaluate.compare if evaluate else None
        compared = teacher if dense in (None, options.teacher) else _open_other(dense, opening)
    if not main_process(opening.device):
        _train(source, plans, windows, options, teacher, opening.device, progress)
        return {}
    fingerprint = {
        "recover": options.model_dump(mode="json"),
        "weights": source.scan.weights,
        "data": windows.facts,
        "versions": versions(),
    }
    with deliver(final, fingerprint, writing) as work:
        try:
            with clock.phase("train"):
                recovery = _train(source, plans, windows, options, teacher, opening.device, progress)
        except QualityError:
            discard(work.folder)
            raise
        facts = _facts(recovery, windows, plans)
        if options.keep_adapter:
            return _publish_adapter(work, source, recovery, facts, compared, evaluate, clock)
        with clock.phase("write"):
            names = names_of(source.model)
            parameters = dict(_resident(source).named_parameters())
            changed = names.to_stored({name: parameters[name].detach() for name in recovery.factors})
            work.hashes |= export(
                source.reader, work.folder, progress, replaced=changed, tokenizer=source.opening.tokenizer
            )
            save_plans(plans, work.plans)
        recipe = {
            "model": model,
            "output": str(output),
            "recover": options.model_dump(mode="json", exclude_none=True),
        }
        record = RunRecord(
            method="+".join([*(plan.method for plan in plans), "recover"]),
            recipe=yaml.safe_dump(recipe, sort_keys=False),
            stages=stages(plans),
            revalued=tuple(changed),
            more={"recovery": facts},
        )
        return finish(work, source, clock, record, options=evaluate, dense=compared, progress=progress)


def check_recovery(options: RecoverOptions, source: Source) -> None:
    """Refuse what a recovery would refuse of its data and its teacher, before there is anything to recover.

    Raises:
        InputError: The data cannot be read or are too few, or the teacher cannot be opened or knows other
            tokens.
    """
    _windows(source, options)
    if options.teacher is not None:
        teacher = open_skeleton(resolve(options.teacher), source.opening)
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


def _train(
    source: Source,
    plans: Sequence[Plan],
    windows: TrainingWindows,
    options: RecoverOptions,
    teacher: Source | None,
    device: str,
    progress: Progress,
) -> Recovery:
    return train(
        _resident(source),
        masks_of(source, plans),
        windows.ids,
        options,
        teacher=_resident(teacher) if teacher else None,
        seed=options.seed,
        device=device,
        progress=progress,
    )


def masks_of(source: Source, plans: Sequence[Plan]) -> dict[str, Tensor]:
    """Return what is kept of every linear of the blocks, by parameter name, in the parameter's layout.

    What the plans removed is removed; beyond them, and on a folder without plans, what is zero stays zero.
    """
    masks = nonzero_masks(_resident(source))
    if not plans:
        logger.warning("%s holds no plans: what is zero now stays zero", source.folder)
    names = names_of(source.model)
    for name, mask in masks.items():
        parts = names.to_stored({name: torch.ones_like(mask)})
        for plan in plans:
            parts = {part: kept & plan.get(Key(part, "mask"), kept) for part, kept in parts.items()}
        mask &= names.to_module(parts)[name]
    return masks


def _facts(recovery: Recovery, windows: TrainingWindows, plans: Sequence[Plan]) -> dict[str, Any]:
    return {
        "start_loss": recovery.start_loss,
        "best_loss": recovery.best_loss,
        "best_step": recovery.best_step,
        "stopped": recovery.stopped,
        "history": [check._asdict() for check in recovery.history],
        "data": windows.facts,
        "masks": _origin(plans),
    }


def _origin(plans: Sequence[Plan]) -> Literal["plans", "nonzero"]:
    return "plans" if plans else "nonzero"


def _publish_adapter(
    work: Delivery,
    source: Source,
    recovery: Recovery,
    facts: dict[str, Any],
    compared: Source | None,
    options: EvaluateOptions | None,
    clock: Clock,
) -> dict[str, Any]:
    """Write the change beside its base instead of merging it; return the report."""
    adapter = Adapter(recovery.factors, str(source.folder.resolve()), source.scan.weights, facts["masks"])
    with clock.phase("write"):
        save_adapter(work.folder, adapter)
    with clock.phase("evaluate"):
        evaluation = measure(source, compared, options)
    made = {
        "output": str(work.final),
        "adapter": {
            "base": adapter.base,
            "base_weights": adapter.base_weights,
            "tensors": len(adapter.factors),
        },
        "recovery": facts,
        "evaluation": evaluation.as_json(),
        "seconds": round(clock.seconds, 3),
        "loads_in": ["structprune"],
    }
    report.write_report(work.folder, made)
    work.publish(stages=[], facts={"adapter_of": source.scan.weights})
    return made
