"""The command `export`: sparse weights packed to be stored, and dense again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import structprune
from structprune.cli.commands import Debug, Job, Json, Links, Overwrite, Restart, Trust, app
from structprune.cli.summary import table


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A pruned model's folder, or a packed one.")],
    output: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to write.")],
    to: Annotated[str, typer.Option("--to", metavar="2:4|bitmask|dense", help="How weights are stored.")],
    restart: Restart = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    allow_external_symlinks: Links = False,
    json: Json = False,  # noqa: ARG001 - read from the words themselves, as everywhere
    debug: Debug = False,  # noqa: ARG001
) -> Job:
    """Store a pruned model without its zeros, or write such a folder dense again, bit by bit."""
    opening = structprune.Opening(
        trust_remote_code=trust_remote_code, allow_external_symlinks=allow_external_symlinks
    )
    writing = structprune.Writing(overwrite=overwrite, restart=restart)
    return Job(
        lambda progress: structprune.export(
            model, output, to, opening=opening, writing=writing, progress=progress
        ),
        export_lines,
    )


def export_lines(result: Mapping[str, Any]) -> str:
    """Return what an export wrote and what it saved, in a few lines."""
    dense, packed = result["bytes"]["dense"], result["bytes"]["packed"]
    where = f"{result['output']} ({result['seconds']:.0f} s)"
    if result["to"] == "dense":
        files = f"{len(result['files'])} weight files, the bytes that were packed"
        return table([("got", f"{packed:,} -> {dense:,} bytes"), ("proved", files), ("where", where)])
    linears = result["linears"]
    share = linears["packed_bytes"] / linears["dense_bytes"]
    rows = [
        ("got", f"{dense:,} -> {packed:,} bytes"),
        ("packed", f"{linears['packed']} linears as {result['to']}, {share:.2%} of their dense bytes"),
        ("as they were", f"{len(result['left'])} tensors, {_reasons(result['left'])}"),
        ("proved", "every tensor unpacks to its bits"),
        ("where", where),
        ("loads in", "nothing as it is; `structprune export DEST DENSE --to dense` gives the model back"),
    ]
    return table(rows)


def _reasons(left: list[Mapping[str, str]]) -> str:
    """Return why tensors were left, and how many for each reason."""
    linears = [row for row in left if row["reason"] != "no linear of a decoder block"]
    if not linears:
        return "none of them a linear of a decoder block"
    return f"{len(linears)} of them linears, such as {linears[0]['name']}: {linears[0]['reason']}"
