"""Whether a folder does what its plans say while a model runs: tokens are counted, logits compared."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import Model
from structprune.plan.promise import Computed
from structprune.proof import fresh_process
from structprune.proof.image_probe import image_probe
from structprune.proof.stage import Stage
from structprune.proof.verification import Verification


def check_running(
    result: Verification,
    folder: Path,
    config: PreTrainedConfig,
    stages: Sequence[Stage],
    opening: Opening,
    reference: Model | None,
) -> None:
    """Open a folder in a fresh process of ours, and add a row on what it computes of an image.

    Args:
        result: Where rows go.
        folder: The folder.
        config: Its model's.
        stages: Those of its plans that work while the model runs, in order.
        opening: How the folder is opened; its dtype is that of the files.
        reference: A model whose logits the folder must give; only on the CPU.
    """
    ids = fresh_process.probe(config)
    image = image_probe(config, ids[0])
    job = fresh_process.ReloadJob(folder, ids, replace(opening, trust_remote_code=False), image)
    (child,) = fresh_process.reload([job], how="running")
    if child.logits is None:
        result.row("running", [f"a fresh process could not run the folder: {child.error}"], "")
        return
    if image is None or child.image_logits is None:
        result.row("running", [], f"no image could be made for a {config.model_type}: not counted")
        return
    problems, said = [], []
    if reference is not None and reference.device.type == "cpu":
        same, text = fresh_process.difference(child.image_logits, logits(reference, image).cpu())
        problems += [] if same else [f"this run's model on an image: {text}"]
        said.append(f"this run's logits on an image: {text}")
    promised = _promised(stages)
    if promised and not _kept(child.computed, promised, at_most=_is_at_most(stages)):
        problems.append(f"visual tokens in the blocks: {child.computed}, promised {promised}")
    said.append(f"visual tokens in the blocks: {_short(child.computed)}")
    result.row("running", problems, "; ".join(said))
    for stage in stages:
        if stage.plan.promises is not None and child.computed:
            of, left = stage.plan.promises.of, sum(leaving for _, leaving in child.computed)
            result.stages[stage.name] = (of - left) / of if of else 0.0


def _promised(stages: Sequence[Stage]) -> list[tuple[int, int]]:
    """Return what every block computes of an image, as the plans say; nothing where one does not say it."""
    rows = []
    for stage in stages:
        stored = stage.plan.promises.stored if stage.plan.promises else ()
        rows.append([(one.attention, one.feed_forward) for one in stored if isinstance(one, Computed)])
    if not all(rows):
        return []
    return [(min(one[0] for one in block), min(one[1] for one in block)) for block in zip(*rows, strict=True)]


def _is_at_most(stages: Sequence[Stage]) -> bool:
    """Tell whether what plans say is the most that a block computes."""
    every = (one for stage in stages if stage.plan.promises for one in stage.plan.promises.stored)
    return any(isinstance(one, Computed) and one.at_most for one in every)


def _kept(computed: Sequence[tuple[int, int]], promised: Sequence[tuple[int, int]], *, at_most: bool) -> bool:
    """Tell whether every block computes as many tokens as promised, or no more."""
    if not at_most:
        return computed == promised
    pairs = zip(computed, promised, strict=True)
    return len(computed) == len(promised) and all(
        one <= most for mine, said in pairs for one, most in zip(mine, said, strict=True)
    )


def _short(computed: Sequence[tuple[int, int]]) -> str:
    """Return runs of equal counts once, such as "144 x 2, 16 x 3"; what feed-forwards compute."""
    runs: list[list[int]] = []
    for _, count in computed:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ", ".join(f"{count} x {blocks}" for count, blocks in runs)
