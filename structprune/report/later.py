"""Figures that `evaluate` measured after a run, put beside those that the run's own report holds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from structprune.errors import InputError
from structprune.report.finished import FinishedRun
from structprune.report.report import REPORT_LIMIT
from structprune.report.schema import LaterFigures
from structprune.storage.strict_json import read_json

# What is measured of a kind of thing, each by the thing's name.
KINDS = {"texts": ("perplexity", "divergence"), "questions": ("questions",), "tasks": ("tasks",)}


def add_figures(runs: Sequence[FinishedRun], files: Sequence[Path]) -> list[FinishedRun]:
    """Return the runs with what was measured of them later; of one text, the later figures count.

    Args:
        runs: As their folders tell.
        files: What `structprune evaluate --json` printed, each about one of the runs; later ones last.

    Raises:
        InputError: A file holds no such figures, or was measured on none of the runs.
    """
    found = list(runs)
    for file in files:
        figures = _read_figures(file)
        # Folders may be moved and copied: their report tells them apart, as no two runs wrote the same.
        places = [place for place, run in enumerate(found) if run.id == figures["run"]]
        if not places:
            raise InputError(
                f"{file}: measured on none of the folders that are given",
                hint="give the folder that it was measured on as well, or leave the file out",
            )
        for place in places:
            run = found[place]
            report = {**run.report, "evaluation": _joined(run.report["evaluation"] or {}, figures)}
            found[place] = replace(run, report=report)
    return found


def _read_figures(file: Path) -> dict[str, Any]:
    """Return what a file of `evaluate` holds.

    Raises:
        InputError: It holds something else, or what was measured is no run's folder.
    """
    printed = "give what `structprune evaluate OUT --json` printed"
    try:
        figures = LaterFigures.model_validate(read_json(file, limit_bytes=REPORT_LIMIT))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"]
        raise InputError(f"{file}: no figures of an evaluation: {said}", hint=printed) from None
    if figures.run is None:
        raise InputError(
            f"{file}: measured on a model that no run of structprune wrote, so no run has these figures",
            hint="evaluate a folder that `structprune prune`, `apply` or `recover` wrote",
        )
    return figures.model_dump(exclude_unset=True)


def _joined(first: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return two evaluations as one; what the later one measured again leaves the first one whole."""
    joined: dict[str, Any] = {**first, "protocol": {}}
    mine, theirs = first.get("protocol", {}), later["protocol"]
    for kind, whats in KINDS.items():
        again = {name for what in whats for name in later.get(what, {})}
        for what in whats:
            left = {name: one for name, one in first.get(what, {}).items() if name not in again}
            joined[what] = left | later.get(what, {})
        stamps = {name: {**stamp, "dense": later["dense"]} for name, stamp in theirs.get(kind, {}).items()}
        joined["protocol"][kind] = {**mine.get(kind, {}), **stamps}
    joined["protocol"]["flags"] = [*mine.get("flags", ()), *theirs.get("flags", ())]
    return joined
