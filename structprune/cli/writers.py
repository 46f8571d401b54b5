"""The commands that write a model: which key of a recipe, or argument of the pipeline, each flag is."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import structprune
from structprune.cli import summary
from structprune.cli.flags import (
    Batch,
    Column,
    Config,
    DetailFlags,
    Device,
    DryRun,
    Dtype,
    Job,
    Length,
    MaxRatio,
    MethodFlags,
    ModelOrRecipe,
    NoEvaluate,
    OpeningFlags,
    Output,
    Revision,
    Samples,
    Seed,
    Sets,
    Stream,
    Tokenizer,
    WritingFlags,
    command,
)
from structprune.cli.forecast import dry_run_lines
from structprune.errors import UsageError
from structprune.recipe.changes import APPLY, RECOVER
from structprune.recipe.draft import ApplyRun, RecoverRun
from structprune.recipe.options import RecoverOptions
from structprune.recipe.request import Request, choose_run, request_recipe

if TYPE_CHECKING:
    from structprune.checkpoint.writing import Writing
    from structprune.models.opening import Opening


@command
def prune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL|RECIPE.yaml", help="A model, or a whole recipe.")
    ] = None,
    output: Output = None,
    *,
    asks: MethodFlags,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A file, a data set's name, demo or demo-vision; quality is measured on "
            "what is left of it, unless evaluate.text is set."
        ),
    ] = None,
    samples: Samples = None,
    length: Length = None,
    column: Column = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    stream: Stream = None,
    config: Config = None,
    sets: Sets = None,
    leaves: DetailFlags,
    scores: Annotated[Path | None, typer.Option(metavar="DIR", help="Decide from kept scores.")] = None,
    dry_run: DryRun = False,
    ranks: Annotated[
        int | None, typer.Option(metavar="N", help="With --dry-run: what N processes take, and how long.")
    ] = None,
    from_dense: Annotated[
        bool, typer.Option("--from-dense", help="Refuse a model that is pruned already.")
    ] = False,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    max_ppl_ratio: MaxRatio = None,
    no_evaluate: NoEvaluate = False,
    writes: WritingFlags,
    opens: OpeningFlags,
) -> Job:
    """Prune a model, prove the result and report on it.

    Several processes share the work: torchrun --nproc-per-node N -m structprune prune ...
    """
    flags = {
        "output": writes.output(output),
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "tokenizer": tokenizer,
        **asks.keys(),
        **leaves.keys(),
        "calibration.source": calibration,
        "calibration.samples": samples,
        "calibration.length": length,
        "calibration.column": column,
        "evaluate.max_ppl_ratio": max_ppl_ratio,
        "evaluate.skip": no_evaluate or None,
    }
    request = request_recipe(model, config=config, sets=sets or (), flags=flags)

    def opening() -> "Opening":
        return opens.opening(stream=stream, writes=True, from_dense=from_dense)

    if dry_run:
        return Job(
            lambda _: structprune.dry_run(
                structprune.Recipe.of(request),
                asks.goals(),
                opening=opening(),
                writing=writes.writing(),
                ranks=ranks,
            ),
            dry_run_lines,
        )
    if ranks is not None:
        raise UsageError(
            f"--ranks {ranks}: only --dry-run reads it",
            hint="add --dry-run; or start the run itself with torchrun",
        )
    return _pruning(request, asks.goals(), opening, writes.writing(), scores)


def _pruning(
    request: Request,
    goals: list[float | str],
    opening: Callable[[], "Opening"],
    writing: "Writing",
    scores: Path | None,
) -> Job:
    """Return what is to be done: prune for each of several goals, or prune once."""
    if goals:
        return Job(
            lambda progress: structprune.prune_each(
                structprune.Recipe.of(request), goals, opening=opening(), writing=writing, progress=progress
            ),
            summary.runs_lines,
        )
    return Job(
        lambda progress: structprune.prune(
            structprune.Recipe.of(request),
            opening=opening(),
            writing=writing,
            scores=scores,
            progress=progress,
        ),
        summary.pruning_lines,
    )


@command
def apply(
    model: ModelOrRecipe,
    plan: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A plan, or a folder structprune wrote.")
    ] = None,
    output: Output = None,
    stream: Stream = None,
    revision: Revision = None,
    *,
    writes: WritingFlags,
    opens: OpeningFlags,
) -> Job:
    """Carry out the plan of an earlier run; needs no data."""
    flags = {"output": writes.output(output), "plan": plan, "revision": revision}
    asked = choose_run(ApplyRun, model, APPLY, flags=flags)
    return Job(
        lambda progress: structprune.apply(
            asked,
            opening=opens.opening(stream=stream, writes=True),
            writing=writes.writing(),
            progress=progress,
        ),
        summary.run_lines,
    )


@command
def recover(
    model: ModelOrRecipe,
    output: Output = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A text file, a data set's name, or demo; quality is measured on what "
            "is left of it, unless evaluate.text is set."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help=f"Optimizer steps (default {RecoverOptions.model_fields['steps'].default})"),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of each matrix's change (default 16)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest (default 1e-4)")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "--nsamples", help="The most sequences read (default all)")
    ] = None,
    length: Length = None,
    column: Column = None,
    batch_size: Batch = None,
    teacher: Annotated[str | None, typer.Option(metavar="DENSE", help="A dense model to imitate.")] = None,
    keep_adapter: Annotated[bool | None, typer.Option("--keep-adapter", help="Do not merge.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing", help="About half of the memory, for up to a third more time."
        ),
    ] = None,
    shard: Annotated[
        bool | None, typer.Option("--shard", help="Divide the model among the processes of a launch.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="What training multiplies in: float32 or bfloat16 (default float32)"),
    ] = None,
    config: Config = None,
    sets: Sets = None,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    dry_run: DryRun = False,
    no_evaluate: NoEvaluate = False,
    *,
    writes: WritingFlags,
    opens: OpeningFlags,
) -> Job:
    """Train a pruned model again without reviving a removed weight.

    Several processes share the work: torchrun --nproc-per-node N -m structprune recover ... With --shard
    each holds a part of the model (FSDP2), otherwise all of it.
    """
    flags = {
        "output": writes.output(output),
        "recover.data": data,
        "recover.steps": steps,
        "recover.rank": rank,
        "recover.learning_rate": learning_rate,
        "recover.samples": samples,
        "recover.length": length,
        "recover.column": column,
        "recover.batch_size": batch_size,
        "recover.teacher": teacher,
        "recover.keep_adapter": keep_adapter,
        "recover.gradient_checkpointing": gradient_checkpointing,
        "recover.shard": shard,
        "recover.seed": seed,
        "recover.dtype": dtype,
        "evaluate.skip": no_evaluate or None,
        "device": device,
        "revision": revision,
        "tokenizer": tokenizer,
    }
    asked = choose_run(RecoverRun, model, RECOVER, config=config, sets=sets or (), flags=flags)
    if asked.recover is None or "data" not in asked.recover.model_fields_set:
        raise UsageError("--data is missing", hint="give the text to train on, or --data demo")

    def opening() -> "Opening":
        return opens.opening(where=asked, tokenizer=asked.tokenizer, writes=True)

    if dry_run:
        return Job(
            lambda _: structprune.dry_run(asked, opening=opening(), writing=writes.writing()), dry_run_lines
        )
    return Job(
        lambda progress: structprune.recover(
            asked, opening=opening(), writing=writes.writing(), progress=progress
        ),
        summary.recovery_lines,
    )


@command
def export(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A pruned model's folder, or a packed one.")],
    to: Annotated[str, typer.Option("--to", metavar="2:4|bitmask|dense", help="How weights are stored.")],
    output: Annotated[Path | None, typer.Argument(metavar="DEST", help="The folder to write.")] = None,
    *,
    writes: WritingFlags,
    opens: OpeningFlags,
) -> Job:
    """Store a pruned model without its zeros, or write such a folder dense again, bit by bit."""
    folder = writes.folder(output)
    return Job(
        lambda progress: structprune.export(
            model, folder, to, opening=opens.opening(writes=True), writing=writes.writing(), progress=progress
        ),
        summary.export_lines,
    )
