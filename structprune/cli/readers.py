"""The commands that write no model: what a model is and how good, what methods there are, the machine."""

from pathlib import Path
from typing import Annotated

import typer

import structprune
from structprune.cli import summary
from structprune.cli.flags import (
    Batch,
    Column,
    Config,
    Device,
    Dtype,
    Job,
    Length,
    MaxRatio,
    Model,
    OpeningFlags,
    Revision,
    Seed,
    Sets,
    Stream,
    Tokenizer,
    command,
)
from structprune.cli.inspection import inspection_lines
from structprune.errors import UsageError
from structprune.machine import launch
from structprune.pruners.catalogue import check_name
from structprune.recipe.changes import BENCH, EVALUATE, SHOW
from structprune.recipe.request import choose_settings


@command
def inspect(model: Model, revision: Revision = None, *, opens: OpeningFlags) -> Job:
    """Say what a model is, and what can be pruned in it."""
    return Job(
        lambda _: structprune.inspect(model, opening=opens.opening(), revision=revision), inspection_lines
    )


@command
def verify(
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder that structprune wrote, or any model.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="MODEL of the command that wrote OUT.",
        ),
    ] = None,
    *,
    opens: OpeningFlags,
) -> Job:
    """Measure a folder from its files, reload it in a fresh process and compare."""
    return Job(
        lambda progress: structprune.verify(output, against, opening=opens.opening(), progress=progress),
        summary.verification_lines,
    )


@command
def evaluate(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text for the perplexity; repeatable (default held-out text of the demo)"),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE.jsonl", help="Questions on images, with answers.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks of lm-eval.")] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="Your own task files.")] = None,
    length: Length = None,
    column: Column = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next (default no overlap)")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Only the first windows of each text (default all)")
    ] = None,
    batch_size: Batch = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first documents of each task, and the first questions.")
    ] = None,
    compare: Annotated[str | None, typer.Option(metavar="DENSE", help="Measured beside it.")] = None,
    max_ppl_ratio: MaxRatio = None,
    device: Device = None,
    dtype: Dtype = None,
    stream: Stream = None,
    config: Config = None,
    sets: Sets = None,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    *,
    opens: OpeningFlags,
) -> Job:
    """Measure perplexity, divergence from a dense model, answers on images, and lm-eval tasks.

    Several processes share the work: torchrun --nproc-per-node N -m structprune evaluate ...
    """
    flags = {
        "evaluate.text": text or None,
        "evaluate.questions": questions,
        "evaluate.tasks": tasks,
        "evaluate.include_path": include_path,
        "evaluate.length": length,
        "evaluate.column": column,
        "evaluate.stride": stride,
        "evaluate.windows": windows,
        "evaluate.batch_size": batch_size,
        "evaluate.limit": limit,
        "evaluate.compare": compare,
        "evaluate.max_ppl_ratio": max_ppl_ratio,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "tokenizer": tokenizer,
    }
    asked = choose_settings(EVALUATE, config=config, sets=sets or (), flags=flags)
    return Job(
        lambda progress: structprune.evaluate(
            model,
            asked.evaluate,
            opening=opens.opening(stream=stream, where=asked, tokenizer=asked.tokenizer),
            revision=asked.revision,
            progress=progress,
        ),
        summary.evaluation_lines,
    )


@command
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A folder, a hub name, or a built-in model.")
    ] = None,
    compare: Annotated[str | None, typer.Option(metavar="DENSE", help="Measured in the same rounds.")] = None,
    length: Annotated[
        int | None, typer.Option("--length", "--seqlen", help="Tokens of each prompt (default 512)")
    ] = None,
    new: Annotated[int | None, typer.Option(help="Tokens generated after it (default 32)")] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", "--batch-size", metavar="N,M", help="Prompts at once (default 1,8)"),
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds (default 5)")] = None,
    rates: Annotated[
        bool, typer.Option("--rates", help="Measure this machine instead, for `prune --dry-run --ranks`.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
    sets: Sets = None,
    revision: Revision = None,
    *,
    opens: OpeningFlags,
) -> Job:
    """Measure tokens per second, time to first token, memory and bytes, beside a dense model."""
    run = {"bench.length": length, "bench.new": new, "bench.batch": batch, "bench.repeats": repeats}
    flags = run | {"device": device, "dtype": dtype, "revision": revision}
    asked = choose_settings(BENCH, config=config, sets=sets or (), flags=flags)
    if rates:
        if compare or any(value is not None for value in run.values()):
            raise UsageError(
                "--rates measures the machine, which has no length, batch or dense model",
                hint="leave --rates out, or what is asked of a model",
            )
        return Job(
            lambda _: structprune.bench_rates(
                model, opening=opens.opening(where=asked), revision=asked.revision
            ),
            summary.rates_lines,
        )
    if launch().count > 1:
        raise UsageError("bench times models in one process", hint="leave the launcher out, or give --rates")
    if model is None:
        raise UsageError("MODEL is missing", hint="give the model to measure, or --rates for this machine")
    return Job(
        lambda progress: structprune.bench(
            model,
            asked.bench,
            compare=compare,
            opening=opens.opening(where=asked),
            revision=asked.revision,
            progress=progress,
        ),
        summary.bench_lines,
    )


@command
def show(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A folder that a token method wrote.")],
    image: Annotated[Path, typer.Option(metavar="FILE", help="A picture, PNG or JPEG.")],
    question: Annotated[str, typer.Option(metavar="TEXT", help="What is asked of it.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.png", help="The PNG to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the PNG that is there.")] = False,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    *,
    opens: OpeningFlags,
) -> Job:
    """Draw which visual tokens of a picture are kept, beside as many at random."""
    asked = choose_settings(SHOW, flags={"seed": seed, "device": device, "dtype": dtype})
    return Job(
        lambda _: structprune.show(
            model,
            image,
            question,
            output,
            opening=opens.opening(stream=False, where=asked),
            overwrite=overwrite,
            seed=asked.seed,
        ),
        summary.show_lines,
    )


@command
def report(
    outputs: Annotated[list[str], typer.Argument(metavar="OUT...", help="Folders that structprune wrote.")],
    page: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.")],
    figures: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.json", help="What `evaluate --json` printed about one of them later; repeatable."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page that is there.")] = False,
) -> Job:
    """Write one page about one or several runs: asked and measured, dense and pruned, side by side."""
    return Job(
        lambda _: structprune.report_runs(outputs, page, figures=figures or (), overwrite=overwrite),
        summary.report_lines,
    )


@command
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method, with its fields.")] = None,
) -> Job:
    """List the methods, or the fields of one."""
    if name is None:
        return Job(lambda _: structprune.methods(), summary.methods_lines, light=True)
    check_name(name)
    return Job(lambda _: structprune.methods(name), summary.method_lines)


@command
def env() -> Job:
    """Print what a bug report needs: the machine and the versions."""
    return Job(lambda _: structprune.environment(), summary.key_lines)
