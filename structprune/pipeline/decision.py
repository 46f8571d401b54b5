"""How a run comes to its decisions: the data it looks at, what shapes its bytes, and its plans."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from structprune.calibration import data, images
from structprune.calibration.image_questions import asks_on_images
from structprune.calibration.text_source import DEMO
from structprune.checkpoint.delivery import Delivery
from structprune.checkpoint.export import export
from structprune.checkpoint.plans import folder_of, plans_of, read_plans
from structprune.checkpoint.running import check_stored
from structprune.checkpoint.side_files import check_side_files
from structprune.checkpoint.source import Source, open_source
from structprune.errors import InputError, UsageError
from structprune.machine import versions
from structprune.models.edited_reader import EditedReader, Reader
from structprune.models.identity import architecture_of
from structprune.models.opening import Opening
from structprune.plan.plan import Plan, PlanWriter
from structprune.progress import Progress
from structprune.proof.prior import prior_of, tell_prior
from structprune.pruners.forecast import forecast_all
from structprune.pruners.pruner import Pruner
from structprune.ranks import Ranks
from structprune.recipe.recipe import Recipe
from structprune.storage.safe_open import hash_file

logger = logging.getLogger(__name__)


def open_recipe_model(
    recipe: Recipe,
    folder: Path,
    ways: Sequence[Sequence[Pruner]],
    opening: Opening,
    ranks: Ranks = Ranks(),
) -> Source:
    """Check the files of a recipe's model, open it and ask every stage whether it can prune it.

    Args:
        recipe: Which model, in which dtype and on which device.
        folder: Where it is.
        ways: What will prune it, each time as it is now: stages, one after another.
        opening: How to open it otherwise.
        ranks: Processes that all open it.

    Raises:
        InputError: It is pruned already, and `opening.from_dense` is set.
        UsageError: A stage cannot prune it, or not nearly as much as was asked for.
    """
    check_side_files(folder, recipe.opening(opening))
    check_stored(folder)
    source = open_source(recipe.model, folder, recipe.opening(opening), ranks)
    prior = prior_of(source.model, source.reader, source.scan.zeros, opening)
    tell_prior(prior, folder, opening)
    for stages in ways:
        forecast_all(stages, source.model)
    return replace(source, prior=prior.as_json())


def check_kind(recipe: Recipe) -> None:
    """Check that the data hold what every stage looks for in them.

    Raises:
        UsageError: A stage looks at images, and the data are text.
    """
    found = recipe.calibration.text_source
    for step in recipe.prune:
        if step.looks_at_data and step.reads == "images" and not asks_on_images(found):
            raise UsageError(
                f"calibration.source: {found.source} holds text, and {step.method()} looks at images",
                hint="--calibration FILE.jsonl with rows of image and question",
            )


def calibrate_on(recipe: Recipe, source: Source) -> data.Calibration | None:
    """Return the data that a recipe calibrates on; None where no stage looks at any."""
    if not any(step.looks_at_data for step in recipe.prune):
        return None
    check_kind(recipe)
    options = recipe.calibration
    if asks_on_images(options.text_source):
        return _look_at_images(recipe, source)
    if options.source == DEMO and recipe.model != DEMO:
        logger.warning(
            "calibrating on the built-in demo text; give --calibration text like what the model will read"
        )
    return data.load(
        options.text_source,
        source.checked_tokenizer(),
        samples=options.samples,
        length=options.length,
        seed=recipe.seed,
        batch_size=options.batch_size,
        max_length=data.positions(source.model.config),
    )


def _look_at_images(recipe: Recipe, source: Source) -> data.Calibration:
    options, processor = recipe.calibration, source.processor()
    images.check_no_length(options.length)
    found = images.load_questions(
        options.text_source,
        processor,
        samples=options.samples,
        seed=recipe.seed,
        batch_size=options.batch_size,
        max_length=data.positions(source.model.config),
    )
    images.check_placeholders(source.model, found.batches[0])
    return found


def fingerprint(recipe: Recipe, source: Source, calibration: data.Calibration | None) -> dict[str, Any]:
    """Return everything that shapes the bytes of the result."""
    ranks = Ranks.here()
    return {
        "prune": [{"method": step.method(), **step.model_dump(mode="json")} for step in recipe.prune],
        "weights": source.scan.weights,
        "architecture": architecture_of(source.model),
        "calibration": calibration.facts | {"batch_size": recipe.calibration.batch_size}
        if calibration
        else None,
        "dtype": recipe.dtype,
        # Of several processes each has a card of its own.
        "device": source.opening.device if ranks.alone else source.opening.device.partition(":")[0],
        **({} if ranks.alone else {"ranks": ranks.count}),
        # Sums are split among threads, so their number shows in the last bits.
        "threads": torch.get_num_threads(),
        "versions": shaping_versions(),
        # A method that was mended since decides otherwise.
        **({"methods": outside} if (outside := _own_hashes(recipe.prune)) else {}),
        # Copied beside the weights of a model that has none.
        **({"tokenizer": recipe.tokenizer} if recipe.tokenizer else {}),
    }


def _own_hashes(stages: Sequence[Pruner]) -> dict[str, str]:
    """Return the hash of each method's file that is none of the package's."""
    files = {step.method(): file for step in stages if (file := step.own_file()) is not None}
    return {name: hash_file(file) for name, file in files.items()}


def shaping_versions() -> dict[str, str | None]:
    """Return the versions of the packages that shape the bytes of a result."""
    return {
        name: value for name, value in versions().items() if name in ("structprune", "torch", "transformers")
    }


def decide(
    stages: Sequence[Pruner],
    source: Source,
    calibration: data.Calibration | None,
    place: Path,
    progress: Progress,
    scores: Plan | None = None,
) -> tuple[list[Plan], int]:
    """Calibrate and apply stage after stage; return the plans and how many blocks were already decided.

    Args:
        stages: In order.
        source: What is pruned, in place.
        calibration: What the stages look at.
        place: The folder that the plans go to.
        progress: Told (stage, done, total).
        scores: What the only stage decides from, instead of data.
    """
    plans: list[Plan] = []
    resumed = 0
    for number, pruner in enumerate(stages, start=1):
        weights = source.scan.weights if number == 1 else plans[-1].id
        writer, plan = open_stage_plan(pruner, number, source, weights, place, progress)
        resumed += writer.finished
        if plan is None and scores is not None:
            plan = pruner.reuse(scores, source.model, writer)
        elif plan is None:
            plan = pruner.calibrate(source.model, calibration.batches if calibration else [], writer)
        pruner.apply(source.model, plan)
        plans.append(plan)
    return plans, resumed


def open_stage_plan(
    pruner: Pruner, number: int, source: Source, weights: str, place: Path, progress: Progress
) -> tuple[PlanWriter, Plan | None]:
    """Return the writer of a stage's plan, which goes on where an earlier run stopped, and a finished plan.

    Args:
        pruner: The stage.
        number: Its place, from 1.
        source: What is pruned.
        weights: Hash of the weights that the stage finds.
        place: The folder that it goes to; what the first process has in its own, all get.
        progress: Told (stage, done, total).
    """
    folder = place / folder_of(number, pruner.method())
    if any(block.referred for plan in plans_of(folder) for block in plan.blocks):
        # Stopped between the last two steps: the values are in files that are about to be written anew.
        shutil.rmtree(folder)
    Ranks.here().copy_files(folder)
    writer = pruner.writer(folder, source.model, weights, progress)
    return writer, Plan.load(folder) if (folder / "plan.json").is_file() else None


def write(source: Source, work: Delivery, plans: Sequence[Plan], progress: Progress) -> None:
    """Write the source with the plans carried out: its weights, and the files beside them."""
    reader: Reader = source.reader
    for plan in plans:
        reader = EditedReader(reader, plan)
    unchanged = work.writing.unchanged
    written = export(reader, work.folder, progress, None, source.opening.tokenizer, unchanged)
    work.note(written.hashes, written.digests)
    work.weights |= written.weights


def read_scores(folder: Path, stages: Sequence[Pruner], source: Source) -> Plan:
    """Return the plan of a folder whose scores another goal of the same method can be decided from.

    Raises:
        InputError: It was made on another architecture, or on other weights and the method's scores are
            about those.
        UsageError: It was made in several stages, or several are to be made of it.
    """
    plan, *more = read_plans(folder)
    if len(stages) > 1 or more:
        raise UsageError(f"--scores {folder}: scores alone do not decide here", hint="only for one stage")
    if plan.architecture != architecture_of(source.model):
        raise InputError(
            f"{folder}: its scores are of another architecture than {source.folder} has",
            hint="give a model with the same tensor names and shapes, or leave --scores out",
        )
    if plan.weights != source.scan.weights:
        said = f"{folder}: its scores are of other weights than {source.folder} holds"
        if not stages[0].scores_travel:
            raise InputError(
                said, hint="give the model that the scores were kept from, or leave --scores out"
            )
        logger.warning("%s; what is least important there may not be so here", said)
    try:
        stages[0].check_scores(plan)
    except (InputError, UsageError) as error:
        raise type(error)(f"--scores {folder}: {error.message}", hint=error.hint) from None
    return plan
