"""The commands: what each flag is called, and which key of a recipe or call of the pipeline it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import structprune
from structprune.cli import summary
from structprune.cli.terminal import Report
from structprune.recipe.changes import choose_options
from structprune.recipe.options import EvaluateOptions, RecoverOptions, Where, sparsity_of

app = typer.Typer(
    help="Prune a language model checkpoint, prove what was done, evaluate it and recover it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True)
class Job:
    """What a command line asks for; it runs once all of the line has been understood.

    Attributes:
        run: Does it, telling its progress, and returns the JSON object.
        show: Returns that object as text for people.
    """

    run: Callable[[Report], Mapping[str, Any]]
    show: Callable[[Mapping[str, Any]], str]


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a hub name, or 'demo' for the built-in model.")
]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Stream = Annotated[bool | None, typer.Option("--stream/--resident", help="One block in memory, or all.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new result is complete.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Links = Annotated[
    bool, typer.Option("--allow-external-symlinks", help="Accept files that are links out of the folder.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Seed = Annotated[int | None, typer.Option(help="Decides what is drawn (default 0)")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps (default auto)")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16 (default auto)")]
Length = Annotated[int | None, typer.Option("--length", "--seqlen", help="Tokens per sequence.")]
Samples = Annotated[int | None, typer.Option("--samples", "--nsamples", help="Sequences (default 128)")]
Batch = Annotated[int | None, typer.Option(help="Sequences per forward (default 8)")]
MaxRatio = Annotated[float | None, typer.Option(help="Exit 5 above this multiple of dense perplexity.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of a recipe.")]


@app.command()
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL|RECIPE.yaml", help="A model, or a whole recipe.")],
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write.")] = None,
    method: Annotated[str | None, typer.Option(help="A method; `structprune methods` lists them.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Removed: 0.5 or 50%; or N of M kept: 2:4; several: 0.3,0.5.")
    ] = None,
    sparsity_ratio: Annotated[float | None, typer.Option(help="The fraction, in Wanda's words.")] = None,
    sparsity_type: Annotated[str | None, typer.Option(help="unstructured or N:M, in Wanda's words.")] = None,
    calibration: Annotated[str | None, typer.Option(help="A text file, a data set's name, or demo.")] = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    stream: Stream = None,
    sets: Sets = None,
    include: Annotated[list[str] | None, typer.Option(help="Prune only linears whose name matches.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave linears dense whose name matches.")] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Write products as dense matrices.")] = False,
    keep_scores: Annotated[bool, typer.Option("--keep-scores", help="Keep scores in the plan.")] = False,
    scores: Annotated[Path | None, typer.Option(metavar="DIR", help="Decide from kept scores.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    restart: Restart = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_external_symlinks: Links = False,
    max_ppl_ratio: MaxRatio = None,
    json: Json = False,
    debug: Debug = False,
) -> Job:
    """Prune a model, prove the result and report on it."""
    several = sparsity.split(",") if sparsity else [None]
    flags = {
        "output": output,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "prune.method": method,
        "prune.sparsity": sparsity_of(several[0], ratio=sparsity_ratio, kind=sparsity_type),
        "prune.fold": fold or None,
        "prune.keep_scores": keep_scores or None,
        "prune.include": include or None,
        "prune.exclude": exclude or None,
        "calibration.source": calibration,
        "calibration.samples": samples,
        "calibration.length": length,
        "evaluate.max_ppl_ratio": max_ppl_ratio,
    }
    chosen = structprune.choose_recipe(model, sets=sets or (), flags=flags)
    opening = structprune.Opening(
        stream=stream,
        trust_remote_code=trust_remote_code,
        allow_external_symlinks=allow_external_symlinks,
    )
    writing = structprune.Writing(overwrite=overwrite, restart=restart)
    wanted = [] if len(several) == 1 else [sparsity_of(text) or 0.0 for text in several]
    if dry_run:
        return Job(
            lambda _: structprune.dry_run(chosen, wanted, opening=opening, writing=writing), summary.key_lines
        )
    if wanted:
        return Job(
            lambda progress: structprune.prune_each(
                chosen, wanted, opening=opening, writing=writing, progress=progress
            ),
            summary.runs_lines,
        )
    return Job(
        lambda progress: structprune.prune(
            chosen, opening=opening, writing=writing, scores=scores, progress=progress
        ),
        summary.run_lines,
    )


@app.command()
def apply(
    model: Model,
    output: Output,
    plan: Annotated[Path, typer.Option(metavar="DIR", help="A plan, or a folder structprune wrote.")],
    stream: Stream = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_external_symlinks: Links = False,
    json: Json = False,
    debug: Debug = False,
) -> Job:
    """Carry out the plan of an earlier run; needs no data."""
    opening = structprune.Opening(
        stream=stream,
        trust_remote_code=trust_remote_code,
        allow_external_symlinks=allow_external_symlinks,
    )
    writing = structprune.Writing(overwrite=overwrite)
    return Job(
        lambda progress: structprune.apply(
            model, output, plan, opening=opening, writing=writing, revision=revision, progress=progress
        ),
        summary.run_lines,
    )


@app.command()
def inspect(
    model: Model,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_external_symlinks: Links = False,
    json: Json = False,
    debug: Debug = False,
) -> Job:
    """Say what a model is, and what can be pruned in it."""
    opening = structprune.Opening(
        trust_remote_code=trust_remote_code, allow_external_symlinks=allow_external_symlinks
    )
    return Job(lambda _: structprune.inspect(model, opening=opening, revision=revision), summary.key_lines)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method, with its fields.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> Job:
    """List the methods, or the fields of one."""
    return Job(
        lambda _: structprune.methods(name), summary.methods_lines if name is None else summary.method_lines
    )


@app.command()
def verify(
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder that structprune wrote, or any model.")
    ],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="The model it was made from.")] = None,
    trust_remote_code: Trust = False,
    allow_external_symlinks: Links = False,
    json: Json = False,
    debug: Debug = False,
) -> Job:
    """Measure a folder from its files, reload it in a fresh process and compare."""
    opening = structprune.Opening(
        trust_remote_code=trust_remote_code, allow_external_symlinks=allow_external_symlinks
    )
    return Job(
        lambda progress: structprune.verify(output, against, opening=opening, progress=progress),
        summary.verification_lines,
    )


@app.command()
def evaluate(
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="A text for the perplexity; repeatable.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks of lm-eval.")] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="Your own task files.")] = None,
    length: Length = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from one window to the next.")] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first windows of each text.")] = None,
    batch_size: Batch = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None,
    compare: Annotated[str | None, typer.Option(metavar="DENSE", help="Measured beside it.")] = None,
    max_ppl_ratio: MaxRatio = None,
    device: Device = None,
    dtype: Dtype = None,
    stream: Stream = None,
    sets: Sets = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_external_symlinks: Links = False,
    json: Json = False,
    debug: Debug = False,
) -> Job:
    """Measure perplexity, divergence from a dense model, and lm-eval tasks."""
    flags = {
        "text": text or None,
        "tasks": tasks,
        "include_path": include_path,
        "length": length,
        "stride": stride,
        "windows": windows,
        "batch_size": batch_size,
        "limit": limit,
        "compare": compare,
        "max_ppl_ratio": max_ppl_ratio,
    }
    options = choose_options(EvaluateOptions, sets=sets or (), flags=flags)
    where = choose_options(Where, flags={"device": device, "dtype": dtype})
    opening = structprune.Opening(
        where.dtype, where.device, stream, trust_remote_code, allow_external_symlinks
    )
    return Job(
        lambda progress: structprune.evaluate(
            model, options, opening=opening, revision=revision, progress=progress
        ),
        summary.evaluation_lines,
    )


@app.command()
def recover(
    model: Model,
    output: Output,
    data: Annotated[str, typer.Option(help="A text file, a data set's name, or demo.")],
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of each matrix's change (default 16)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest (default 1e-4)")] = None,
    length: Length = None,
    batch_size: Batch = None,
    teacher: Annotated[str | None, typer.Option(metavar="DENSE", help="A dense model to imitate.")] = None,
    keep_adapter: Annotated[bool | None, typer.Option("--keep-adapter", help="Do not merge.")] = None,
    seed: Seed = None,
    device: Device = None,
    sets: Sets = None,
    restart: Restart = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_external_symlinks: Links = False,
    json: Json = False,
    debug: Debug = False,
) -> Job:
    """Train a pruned model again without reviving a removed weight."""
    flags = {
        "data": data,
        "steps": steps,
        "rank": rank,
        "learning_rate": learning_rate,
        "length": length,
        "batch_size": batch_size,
        "teacher": teacher,
        "keep_adapter": keep_adapter,
        "seed": seed,
    }
    options = choose_options(RecoverOptions, sets=sets or (), flags=flags)
    where = choose_options(Where, flags={"device": device})
    opening = structprune.Opening(
        device=where.device,
        trust_remote_code=trust_remote_code,
        allow_external_symlinks=allow_external_symlinks,
    )
    writing = structprune.Writing(overwrite=overwrite, restart=restart)
    return Job(
        lambda progress: structprune.recover(
            model, output, options, opening=opening, writing=writing, revision=revision, progress=progress
        ),
        summary.recovery_lines,
    )


@app.command()
def env(json: Json = False, debug: Debug = False) -> Job:
    """Print what a bug report needs: the machine and the versions."""
    return Job(lambda _: structprune.environment(), summary.key_lines)
