"""Writes one page about one or several finished runs: what was asked, measured, and how they compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from structprune.checkpoint.inputs import Input
from structprune.checkpoint.output import check_output_file
from structprune.errors import UsageError
from structprune.report.finished import read_runs
from structprune.report.later import add_figures
from structprune.report.page import page
from structprune.storage.durable import DurableFile, blame

SUFFIXES = (".html", ".htm")


def report_runs(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    figures: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a page in HTML about finished runs, side by side where there are several.

    The page is complete in itself: it needs no network, no script and no other file.

    Args:
        folders: What `prune`, `apply` or `recover` wrote; only read.
        output: The page to write.
        figures: Files of what `structprune evaluate --json` printed about some of them, or what Python's
            `evaluate` returned, as JSON; what was measured again counts as the last of them says.
        overwrite: A file that is there is replaced.

    Returns:
        "output"; "runs" (per run "name", as the page calls it, "folder" and "method").

    Raises:
        UsageError: No folder is given, or one twice; or the output is no HTML file, or lies in a folder.
        InputError: A folder is no complete result, or holds another report than was written; or a file of
            figures was measured on none of the folders.
        EnvironmentFailure: The output exists or cannot be written.
    """
    if isinstance(folders, str | Path):
        folders = [folders]
    if isinstance(figures, str | Path):
        figures = [figures]
    if not folders:
        raise UsageError("no folder is given", hint="give one or several that structprune wrote")
    path = Path(output).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a page is written as HTML", hint="give a name that ends in .html")
    places = [Path(folder) for folder in folders]
    later = [Path(file).expanduser() for file in figures]
    inputs = [Input("the run in", place.expanduser()) for place in places]
    inputs += [Input("the figures in", file) for file in later]
    final = check_output_file(inputs, path, overwrite=overwrite)
    runs = add_figures(read_runs(places), later)
    written = page(runs).encode()
    with blame(final):
        final.parent.mkdir(parents=True, exist_ok=True)
    with DurableFile(final) as file:
        file.write(written)
    return {
        "output": str(final),
        "runs": [
            {"name": run.name, "folder": str(run.folder), "method": run.report["method"]} for run in runs
        ],
    }
