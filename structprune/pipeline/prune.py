"""The story of a run: read, inspect, calibrate, apply, write; `finish` measures, proves and publishes."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from structprune.checkpoint.delivery import deliver, is_delivered, tidy
from structprune.checkpoint.locate import check_name, resolve
from structprune.checkpoint.output import check_output
from structprune.checkpoint.side_files import copied_names
from structprune.checkpoint.writing import Writing
from structprune.errors import UsageError
from structprune.evaluation.memory import Memory
from structprune.models.opening import Opening
from structprune.pipeline.decision import (
    calibrate_on,
    decide,
    fingerprint,
    open_recipe_model,
    read_scores,
    write,
)
from structprune.pipeline.examine import prepare_exam, with_bench
from structprune.pipeline.finish import finish, measure, record_of
from structprune.pipeline.inputs import inputs_of_recipe
from structprune.pipeline.kept import kept_report, may_stand, write_recipe
from structprune.pipeline.recover import check_recovery, recover_run
from structprune.pipeline.room import bytes_written
from structprune.pipeline.shared import assist, check_command, check_shared
from structprune.progress import Clock, Progress, silent
from structprune.pruners.pruner import Pruner
from structprune.ranks import joined_ranks
from structprune.recipe.draft import RecoverRun
from structprune.recipe.fields import build
from structprune.recipe.options import EvaluateOptions
from structprune.recipe.recipe import Recipe
from structprune.recipe.request import is_recipe


def prune(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    pruner: Pruner | str | None = None,
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    scores: str | Path | None = None,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Prune a checkpoint, prove the result and return the report.

    Args:
        recipe: A recipe, as `choose_recipe` reads it from a file; or a model ("demo", a folder, a hub name),
            with `output` and `pruner` beside it.
        output: The folder to write.
        pruner: A pruner, or a method's name.
        opening: How the model is opened; a recipe's own dtype and device are those of the run.
        writing: How the output is written.
        scores: A folder that an earlier run wrote with `keep_scores`: decide from them, look at no data.
        progress: Told (stage, done, total).
        **options: Further keys of a recipe (seed, dtype, device, calibration, recover, evaluate), and fields
            of a method given by its name (sparsity, compare, ...).

    Raises:
        StructpruneError: One of `structprune.errors`; nothing is lost, and the input is untouched.

    Returns:
        The report, with "pruned_folder" where it was recovered afterwards; of several processes that a
        launcher started the first one's, and empty for the others.
    """
    if isinstance(recipe, Recipe):
        _refuse_beside({"output": output, "pruner": pruner} | options)
    else:
        place = {"dtype": opening.dtype, "device": opening.device}
        recipe = _recipe(check_name(recipe), output, pruner, place | options)
    return prune_recipe(recipe, opening=opening, writing=writing, scores=scores, progress=progress)


def prune_recipe(
    recipe: Recipe,
    *,
    opening: Opening,
    writing: Writing,
    scores: str | Path | None = None,
    progress: Progress,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Prune as a recipe says; arguments and errors are those of `prune`.

    Args:
        recipe: The run.
        opening: How the model is opened.
        writing: How the output is written.
        scores: What to decide from instead of data.
        progress: Told (stage, done, total).
        memory: What the dense model said in an earlier run of the same sweep.
    """
    with ExitStack() as together:
        ranks = together.enter_context(joined_ranks())
        clock = Clock()
        with clock.phase("read"):
            folder = resolve(recipe.model, revision=recipe.revision)
            needed = bytes_written(folder, recipe.prune, recipe.output, writing)
            inputs = inputs_of_recipe(recipe, folder, scores)
            standing = may_stand(recipe.output, writing)
            final = check_output(inputs, recipe.output, overwrite=standing, needed_bytes=needed)
            if recipe.recover is not None:  # which makes the output from a pruned model beside it
                final = check_output(inputs, recipe.pruned, overwrite=True, needed_bytes=needed)
            check_command(recipe, ranks)
            source = open_recipe_model(recipe, folder, [recipe.prune], opening, ranks)
            if recipe.recover is not None:
                check_recovery(recipe.recover, source)
            kept = read_scores(Path(scores), recipe.prune, source) if scores else None
            calibration = None if kept else calibrate_on(recipe, source)
            exam = prepare_exam(recipe.evaluate, source, calibration.left if calibration else None)
            exam = with_bench(exam, recipe.bench, source)
        run = fingerprint(recipe, source, calibration) | ({"scores": kept.id} if kept else {})
        run |= writing.shaping
        check_shared(recipe, calibration, run | {"evaluate": exam.facts}, ranks)
        if not ranks.first:
            assist(recipe.prune, source, calibration, exam, ranks)
            return {}
        report = kept_report(final, run, recipe, writing) if recipe.recover is None else None
        ranks.tell(0, {"decides": report is None})
        if report is not None:
            return report
        if recipe.recover is None or writing.restart or not is_delivered(final, run):
            check_output(inputs, final, overwrite=writing.overwrite)
            with deliver(final, run, writing, files=copied_names(folder, source.opening.tokenizer)) as work:
                write_recipe(work, recipe)
                with clock.phase("calibrate"):
                    plans, resumed = decide(recipe.prune, source, calibration, work.plans, progress, kept)
                record = record_of(recipe, plans, calibration, resumed)
                with clock.phase("write"):
                    write(source, work, plans, progress)
                with clock.phase("evaluate"):
                    evaluation = measure(source, source, exam, memory, ranks, progress)
                together.close()  # The others have done their part.
                if recipe.recover is not None:  # the speed is that of what comes of it
                    exam = replace(exam, workload=None)
                result = finish(
                    work, source, clock, record, exam=exam, evaluation=evaluation, progress=progress
                )
            if recipe.recover is None:
                return result
        else:
            tidy(final)
    made = _recover(recipe, folder, final, opening=opening, writing=writing, progress=progress)
    return made | {"pruned_folder": str(recipe.pruned)}


def _recover(
    recipe: Recipe, folder: Path, pruned: Path, *, opening: Opening, writing: Writing, progress: Progress
) -> dict[str, Any]:
    """Recover what a recipe pruned, and return the report."""
    assert recipe.recover is not None
    chosen = recipe.evaluate or EvaluateOptions()
    last = RecoverRun(
        model=str(pruned),
        output=recipe.output,
        recover=recipe.recover,
        evaluate=chosen.model_copy(update={"compare": str(folder)}),
        bench=recipe.bench,
        device=recipe.device,
        tokenizer=recipe.opening(opening).tokenizer,
    )
    return recover_run(last, saved=recipe, opening=opening, writing=writing, progress=progress)


def _refuse_beside(given: Mapping[str, object]) -> None:
    """Refuse what stands beside a recipe, which says all of it itself."""
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise UsageError(
            f"{', '.join(named)}: given beside a recipe, which says it itself",
            hint="change the recipe: choose_recipe(FILE, flags={'output': ..., 'prune.sparsity': ...})",
        )


def _recipe(
    model: str, output: str | Path | None, pruner: Pruner | str | None, options: dict[str, Any]
) -> Recipe:
    """Return the recipe that `prune` was called with; what is no key of a recipe belongs to the method."""
    if pruner is None and is_recipe(model) and Path(model).is_file():
        place = f", flags={{'output': {str(output)!r}}}" if output is not None else ""
        raise UsageError(
            f"{model}: a recipe's file, expected a model or a recipe that was read",
            hint=f"read it first: structprune.prune(structprune.choose_recipe({model!r}{place}))",
        )
    stage: object = pruner
    if isinstance(pruner, str):
        stage = {"method": pruner} | {k: v for k, v in options.items() if k not in Recipe.model_fields}
        options = {k: v for k, v in options.items() if k in Recipe.model_fields}
    return build(Recipe, {"model": model, "output": output, "prune": stage, **options})
