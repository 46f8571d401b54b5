"""What a run would do and need, after every check that needs no computation."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from structprune.calibration.data import positions, window_length
from structprune.calibration.image_questions import asks_on_images, read_questions
from structprune.calibration.texts import check_text
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.modelling import needs_code
from structprune.checkpoint.output import check_output
from structprune.checkpoint.running import check_stored
from structprune.checkpoint.side_files import check_side_files
from structprune.checkpoint.source import open_outline
from structprune.checkpoint.writing import Writing
from structprune.errors import UsageError
from structprune.evaluation.exam import read_exam
from structprune.evaluation.footprint import bytes_needed, check_room
from structprune.evaluation.speed import Workload, workload_of
from structprune.models.cost import file_bytes, parameters_of, weight_bytes
from structprune.models.identity import stored_layout
from structprune.models.opening import Opening
from structprune.models.processor import processor
from structprune.models.streamed import Model, StreamedModel
from structprune.models.tokenizer import check_vocabulary, open_tokenizer
from structprune.pipeline.decision import check_kind
from structprune.pipeline.dry_recover import dry_recover
from structprune.pipeline.estimate import RUNTIME_BYTES, estimate_run, estimate_training, memory_bytes
from structprune.pipeline.inputs import inputs_of_recipe
from structprune.pipeline.kept import may_stand
from structprune.pipeline.recover import check_shares, teacher_outline
from structprune.pipeline.room import bytes_written
from structprune.pipeline.shared import check_division
from structprune.pipeline.sweep import recipes_of
from structprune.proof.prior import prior_of, tell_prior
from structprune.pruners.demand import Sharing
from structprune.pruners.forecast import Forecast, forecast_all
from structprune.ranks import Ranks
from structprune.recipe.draft import RecoverRun
from structprune.recipe.recipe import Recipe
from structprune.storage.reader import CheckpointReader

ZEROS = "zeros make neither the files smaller nor dense kernels faster"
SMALLER = "the files are smaller, and whatever opens them has less to compute"
RUNNING = "the saving of {} exists only while structprune runs the model: other programs compute all there is"


def dry_run(
    recipe: Recipe | RecoverRun,
    goals: Sequence[float | str] = (),
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    ranks: int | None = None,
) -> dict[str, Any]:
    """Say what a run would do and need, after every check that needs no computation; nothing is written.

    Args:
        recipe: The run; of `recover` it says what `dry_recover` does.
        goals: Those of `prune_each`, where there are several; what is complete may stand already.
        opening: As for `prune`.
        writing: As for `prune`.
        ranks: Also say what it takes of each of so many processes that share it, and how long.

    Returns:
        The forecast of the run; "recover" of a recipe that does: what `estimate_training` says, and "pruned",
        the folder beside the output that it starts from; "seconds" of deciding, None where no rates were
        measured; "ranks": how many, "memory_bytes" of each, and what `estimate_run` says; with goals "runs":
        that of each, by what it is written as.
    """
    if isinstance(recipe, RecoverRun):
        return dry_recover(recipe, opening=opening, writing=writing)
    if ranks is not None and ranks < 1:
        raise UsageError(f"--ranks {ranks}: expected at least 1", hint="give how many processes are to share")
    if goals and ranks is not None and ranks > 1:
        raise UsageError("--ranks: several goals are one process's work", hint="leave --ranks out")
    if goals:
        writing = replace(writing, keep=True)
        return {
            "runs": {
                name: dry_run(one, opening=opening, writing=writing, ranks=ranks)
                for name, one in recipes_of(recipe, goals).items()
            }
        }
    folder = resolve(recipe.model, revision=recipe.revision)
    size = weight_bytes(folder)
    inputs = inputs_of_recipe(recipe, folder)
    needed = bytes_written(folder, recipe.prune, recipe.output, writing)
    check_output(inputs, recipe.output, overwrite=may_stand(recipe.output, writing), needed_bytes=needed)
    check_stored(folder)
    opened, scan = open_outline(folder, opening)
    assert isinstance(opened.reader, CheckpointReader)
    prior = prior_of(opened, opened.reader, scan.zeros, opening)
    tell_prior(prior, folder, opening)
    forecasts = forecast_all(recipe.prune, opened)
    resolved = recipe.opening(opening).resolve(folder, opened.reader.nbytes)
    streamed = bool(resolved.stream)
    _check_inputs(recipe, opened, recipe.opening(opening), streamed)
    left = forecasts[-1].left
    load = _workload(recipe, opened, left, resolved.device)
    sharing = _sharing(recipe, opened, ranks or 1, streamed=streamed)
    timing = _timing_memory(opened, left, load, streamed)
    alone = replace(sharing, ranks=1)
    shared = _shared(recipe, opened, forecasts, sharing, resolved.device)
    pruned = file_bytes(stored_layout(left), opened.reader.metadata)
    decided = opened.reader.nbytes // 16  # masks take a bit for each weight
    twice = recipe.recover is not None and not recipe.recover.keep_adapter
    return {
        "output": str(recipe.output),
        "recipe": recipe.text(),
        "stages": [
            {
                "method": pruner.method(),
                "unit": one.unit,
                "asked": one.asked,
                "reachable": one.share,
                **({"forwards": one.trials} if one.trials else {}),
                **({"notes": list(one.notes)} if one.notes else {}),
            }
            for pruner, one in zip(recipe.prune, forecasts, strict=True)
        ],
        "found": prior.as_json(),
        "exact": all(one.exact for one in forecasts),
        "parameters": {"dense": parameters_of(opened.skeleton), "pruned": parameters_of(left)},
        # Zeros stay in the dense files, so that every loader opens them: they take the room they took.
        "bytes": {"dense": size, "pruned": pruned},
        "streamed": streamed,
        "memory_bytes": max(memory_bytes(recipe.prune, opened, alone), timing),
        "disk_bytes": needed + decided + (pruned + decided if twice else 0),
        "loads_in": _loaders(left, writing),
        "bench": asdict(load) if load is not None else None,
        "note": _note(recipe, opened, left),
        **_training(recipe, left, opening, resolved.device),
        "seconds": shared["seconds"],
        **({} if ranks is None else {"ranks": shared}),
    }


def _sharing(recipe: Recipe, opened: StreamedModel, ranks: int, *, streamed: bool) -> Sharing:
    """Return how much data a run looks at, and who shares it; refuses what the run would refuse."""
    data = recipe.calibration
    length = window_length(data.length, positions(opened.config))
    sharing = Sharing(data.samples, length, data.batch_size, ranks, streamed)
    looks = any(pruner.looks_at_data for pruner in recipe.prune)
    if ranks > 1:
        check_division(recipe, sharing.sizes if looks else [], ranks)
    return sharing


def _shared(
    recipe: Recipe, opened: StreamedModel, forecasts: Sequence[Forecast], sharing: Sharing, device: str
) -> dict[str, Any]:
    """Return what a run takes of each of the processes that share it."""
    models: list[Model] = [opened, *(one.left for one in forecasts[:-1])]
    count = {"count": sharing.ranks, "memory_bytes": memory_bytes(recipe.prune, opened, sharing)}
    return count | estimate_run(recipe.prune, models, sharing, device)


def _training(recipe: Recipe, left: PreTrainedModel, opening: Opening, device: str) -> dict[str, Any]:
    """Return what recovering takes, and where what it starts from will lie; refuses what the run would.

    Args:
        recipe: The run.
        left: What is pruned.
        opening: How the teacher is opened.
        device: Where it is trained.
    """
    options = recipe.recover
    if options is None:
        return {}
    check_shares(options, Ranks())
    teacher = teacher_outline(options, left, recipe.opening(opening))
    return {"recover": {"pruned": str(recipe.pruned), **estimate_training(options, left, teacher, device)}}


def _loaders(left: PreTrainedModel, writing: Writing) -> list[str]:
    """Return what will open the result."""
    if writing.unchanged == "refer":
        return ["structprune"]
    plain = "transformers with trust_remote_code" if needs_code(left.config) else "transformers"
    return [plain, "structprune"]


def _note(recipe: Recipe, opened: StreamedModel, left: PreTrainedModel) -> str:
    """Return what the result is good for."""
    smaller = parameters_of(left) < parameters_of(opened.skeleton)
    running = [pruner.method() for pruner in recipe.prune if pruner.at_run_time]
    stored = [] if len(running) == len(recipe.prune) else [SMALLER if smaller else ZEROS]
    return "; ".join([*stored, *([RUNNING.format(" and ".join(running))] if running else [])])


def _check_inputs(recipe: Recipe, opened: StreamedModel, opening: Opening, streamed: bool) -> None:
    """Refuse what the run would refuse of the files that it reads beside the weights."""
    folder, asked = opened.reader.folder, recipe.evaluate
    check_side_files(folder, opening)
    needs_data = any(pruner.looks_at_data for pruner in recipe.prune)
    measures = asked is not None and not asked.skip and asked.asks
    check_kind(recipe)
    if needs_data and asks_on_images(recipe.calibration.text_source):
        read_questions(recipe.calibration.text_source)
        processor(folder, opening)
    elif needs_data:
        check_text(recipe.calibration.text_source)
    if recipe.recover is not None:
        check_text(recipe.recover.text_source)
    if needs_data or measures or recipe.recover is not None:
        tokenizer = open_tokenizer(folder, opening)
        check_vocabulary(tokenizer, opened)
        assert tokenizer is not None
        if asked is not None and measures:
            sees = processor(folder, opening) if asked.questions else None
            read_exam(asked, tokenizer, opened.config, streamed=streamed, processor=sees)


def _workload(recipe: Recipe, opened: StreamedModel, left: PreTrainedModel, device: str) -> Workload | None:
    """Return what the result will be timed on; refuses what does not fit the models or the memory."""
    if recipe.bench is None:
        return None
    load = workload_of(recipe.bench, [opened.config, left.config])
    check_room([opened.skeleton, left], load, device)
    return load


def _timing_memory(
    opened: StreamedModel, left: PreTrainedModel, load: Workload | None, streamed: bool
) -> int:
    """Return the peak that timing the result is expected to need; 0 where it is not timed."""
    if load is None:
        return 0
    held = 0 if streamed else opened.reader.nbytes
    return RUNTIME_BYTES + held + bytes_needed([opened.skeleton, left], load)
