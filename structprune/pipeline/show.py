"""Shows which visual tokens of a picture a pruned model keeps, beside as many at random."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.calibration.image_questions import ImageQuestion
from structprune.calibration.images import batch_of, check_placeholders
from structprune.checkpoint.inputs import local_inputs
from structprune.checkpoint.load import load
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.output import check_output_file
from structprune.checkpoint.running import drops_tokens
from structprune.errors import InputError, UsageError
from structprune.models.opening import Opening
from structprune.models.processor import processor
from structprune.models.streamed import Batch
from structprune.report.kept_tokens import kept_tokens
from structprune.report.patches import patches_of
from structprune.runtime.attach import engine_of, paused
from structprune.runtime.images import placeholder
from structprune.storage.durable import DurableFile, blame

SUFFIX = ".png"
PLACES = ("before", "within")  # a block; within: between its attention and its feed-forward


def show(
    model: str,
    image: str | Path,
    question: str,
    output: str | Path,
    *,
    opening: Opening = Opening(),
    overwrite: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw which visual tokens the last block computes, beside the picture with as many kept at random.

    Args:
        model: A folder that a token method wrote.
        image: A picture, PNG or JPEG.
        question: What is asked of it; what is kept may depend on it.
        output: The PNG to write.
        opening: How the model is opened; always in memory.
        overwrite: A file that is there is replaced.
        seed: Draws what is kept at random.

    Returns:
        "output"; "tokens" (of the picture), "rows" and "columns" (how they stand on it); "drops" (per place
        where some go: "block", counted from 0, "place" ("before" it or "within" it, ahead of its
        feed-forward) and "kept"); "kept" and "at_random" (numbers of the tokens that are left at the end).

    Raises:
        UsageError: No plan in the folder drops tokens, where they stand on the picture is not known, or the
            output is no PNG.
        InputError: There is no such image, or it cannot be read.
        EnvironmentFailure: The output exists or cannot be written, or pillow is not installed.
    """
    folder, picture, path = resolve(model), Path(image).expanduser(), Path(output).expanduser()
    if path.suffix.lower() != SUFFIX:
        raise UsageError(f"{path}: a picture is written as PNG", hint=f"give a name that ends in {SUFFIX}")
    inputs = [*local_inputs("the model", folder), *local_inputs("the image", picture)]
    final = check_output_file(inputs, path, overwrite=overwrite)
    if not drops_tokens(folder):
        raise UsageError(
            f"{model}: no plan in it drops visual tokens",
            hint="give a folder pruned with a token method; `structprune methods` lists them",
        )
    if not picture.is_file():
        raise InputError(
            f"{picture}: no such image", hint="check the path; relative ones start at the working directory"
        )
    reader = processor(folder, opening)
    batch = batch_of([ImageQuestion(picture, question, where="--image")], reader)
    opened, _ = load(folder, opening)
    assert isinstance(opened, PreTrainedModel)
    there = batch["input_ids"][0] == placeholder(opened.config)
    patches = patches_of(opened.config, batch, reader, int(there.sum()))
    watched = _watched(opened, batch)
    kept = watched[max(watched)][-1][0].cpu()[there]
    random = torch.zeros_like(kept)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
    random[order[: int(kept.sum())]] = True
    said = f"{int(kept.sum())} of {len(kept)}"
    drawn = kept_tokens(patches, {f"kept: {said}": kept, f"at random: {said}": random}, question)
    with blame(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    with DurableFile(final) as file:
        file.write(drawn)
    return {
        "output": str(final),
        "tokens": len(kept),
        "rows": patches.rows,
        "columns": patches.columns,
        "drops": _drops(watched, len(kept)),
        "kept": kept.nonzero()[:, 0].tolist(),
        "at_random": random.nonzero()[:, 0].tolist(),
    }


@torch.no_grad()
def _watched(model: PreTrainedModel, batch: Batch) -> Mapping[int, tuple[Tensor, Tensor]]:
    """Return of every block which tokens of a prompt its attention and its feed-forward compute."""
    placed = {name: value.to(model.device) for name, value in batch.items()}
    with paused(model):  # its blocks are not run, so nothing could choose in them
        check_placeholders(model, placed)
    engine = engine_of(model)
    assert engine is not None, "its plan drops tokens"
    if engine.fewer() is not None:
        raise UsageError(
            "its vision tower computes fewer features: what is left stands for no patches of the picture",
            hint="give a folder of a method that keeps tokens of the whole picture",
        )
    with engine.watching() as watched:
        model(**placed, logits_to_keep=1, use_cache=False)
    return watched


def _drops(watched: Mapping[int, tuple[Tensor, Tensor]], tokens: int) -> list[dict[str, Any]]:
    """Return where tokens go, and how many are left then."""
    found = []
    for index in sorted(watched):
        for place, mask in zip(PLACES, watched[index], strict=True):
            if (left := int(mask.sum())) < tokens:
                found.append({"block": index, "place": place, "kept": left})
                tokens = left
    return found
