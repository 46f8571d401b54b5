"""The story of a recovery: open a pruned folder, train, write the merged weights under the same masks."""

import logging
from collections.abc import Sequence
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
from structprune.errors import QualityError
from structprune.machine import versions
from structprune.models.cost import weight_bytes
from structprune.models.identity import names_of, skeleton
from structprune.models.streamed import open_model
from structprune.pipeline.finish import Done, finish, measure
from structprune.plan.key import Key
from structprune.plan.plan import Plan
from structprune.progress import Clock, Progress, silent
from structprune.recipe.options import EvaluateOptions, RecoverOptions
from structprune.recovery.masks import nonzero_masks
from structprune.recovery.training import Recovery, check_teacher, main_process, train
from structprune.recovery.windows import Windows, draw
from structprune.report import report

logger = logging.getLogger(__name__)


def recover(
    model: str,
    output: str | Path,
    options: RecoverOptions | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    evaluate: EvaluateOptions | None = None,
    dense: str | None = None,
    reload: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a pruned model with LoRA that keeps every removed weight removed, and write the result.

    Started by `accelerate launch`, every process trains and the first one writes; the others return {}.

    Args:
        model: A pruned folder; of a model without plans, what is zero now stays zero.
        output: The folder to write: a whole model, or an adapter with `options.keep_adapter`.
        options: How to train.
        seed: Of the data's order, the held-out split and the first factors.
        device: "auto" for the accelerator there is.
        overwrite: Replace an existing output once the new one is complete.
        restart: Forget what an interrupted run left.
        trust_remote_code: Let code in the folder run.
        revision: Of a model on the hub.
        evaluate: What to measure; the default of a prune run unless given.
        dense: What to compare with in the report; the teacher unless given.
        reload: Open the result in a fresh process.
        progress: Told (stage, done, total).

    Raises:
        QualityError: Nothing beat the start; nothing is written.
    """
    options = options or RecoverOptions()
    clock = Clock()
    with clock.phase("read"):
        folder = resolve(model, revision=revision)
        final = check_output(folder, Path(output), overwrite=overwrite, needed_bytes=weight_bytes(folder))
        source = open_source(model, folder, device=device, stream=False, trust_remote_code=trust_remote_code)
        plans = [plan.beside_weights() for plan in plans_of(folder)]
        windows = _windows(source, options, seed)
        teacher = _open_other(options.teacher, device)
        compared = teacher if dense in (None, options.teacher) else _open_other(dense, device)
    if not main_process(device):
        _train(source, plans, windows, options, teacher, seed, device, progress)
        return {}
    fingerprint = {
        "recover": options.model_dump(mode="json"),
        "weights": source.scan.weights,
        "data": windows.facts,
        "versions": versions(),
    }
    with deliver(final, fingerprint, overwrite=overwrite, restart=restart) as work:
        try:
            with clock.phase("train"):
                recovery = _train(source, plans, windows, options, teacher, seed, device, progress)
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
            work.hashes |= export(source.reader, work.folder, progress, replaced=changed)
            save_plans(plans, work.plans)
        recipe = {
            "model": model,
            "output": str(output),
            "recover": options.model_dump(mode="json", exclude_none=True),
        }
        done = Done(
            method="+".join([*(plan.method for plan in plans), "recover"]),
            recipe=yaml.safe_dump(recipe, sort_keys=False),
            stages=stages(plans),
            revalued=tuple(changed),
            more={"recovery": facts},
        )
        return finish(
            work, source, clock, done, options=evaluate, dense=compared, reload=reload, progress=progress
        )


def foresee(options: RecoverOptions, source: Source, seed: int) -> None:
    """Refuse what a recovery would refuse of its data and its teacher, before there is anything to recover.

    Raises:
        InputError: The data cannot be read or are too few, or the teacher cannot be opened or knows other
            tokens.
    """
    _windows(source, options, seed)
    if options.teacher is not None:
        teacher = open_model(resolve(options.teacher), stream=True)
        check_teacher(skeleton(source.model), skeleton(teacher))


def _resident(source: Source) -> PreTrainedModel:
    assert isinstance(source.model, PreTrainedModel)
    return source.model


def _open_other(name: str | None, device: str) -> Source | None:
    return open_source(name, resolve(name), device=device, stream=False) if name else None


def _windows(source: Source, options: RecoverOptions, seed: int) -> Windows:
    # No more than training can look at, and the held-out part on top.
    looked_at = options.steps * options.batch_size
    limit = options.samples or int(looked_at / (1 - options.held_out)) + 64
    return draw(
        options.data,
        source.reading(),
        limit=limit,
        length=options.length,
        max_length=positions(source.model.config),
        seed=seed,
        column=options.column,
        split=options.split,
        revision=options.revision,
    )


def _train(
    source: Source,
    plans: Sequence[Plan],
    windows: Windows,
    options: RecoverOptions,
    teacher: Source | None,
    seed: int,
    device: str,
    progress: Progress,
) -> Recovery:
    return train(
        _resident(source),
        masks_of(source, plans),
        windows.ids,
        options,
        teacher=_resident(teacher) if teacher else None,
        seed=seed,
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


def _facts(recovery: Recovery, windows: Windows, plans: Sequence[Plan]) -> dict[str, Any]:
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
