"""A finished run in its folder: the report as it was written, the recipe, and what its plans say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from structprune.checkpoint.manifest import MANIFEST, OURS, RECIPE_FILE, Manifest, compare, read_manifest
from structprune.checkpoint.partial import partials_of
from structprune.checkpoint.plans import PLANS
from structprune.errors import InputError, UsageError
from structprune.plan.plan import PLAN_FILE, PlanHead, read_head
from structprune.report.report import REPORT_FILE, read_report
from structprune.report.schema import Report
from structprune.storage.safe_open import read_whole
from structprune.storage.strict_yaml import LIMIT_BYTES

AGAIN = "run the command that wrote it again"


@dataclass(frozen=True)
class FinishedRun:
    """What a complete folder says of the run that wrote it.

    Attributes:
        name: What it is called among others.
        folder: Where it is.
        report: Its report.
        recipe: What it was asked to do, as it was asked.
        plans: What its plans say, in order; without their tensors.
        id: What tells it from any other run, as `run_of` gives it.
    """

    name: str
    folder: Path
    report: Mapping[str, Any]
    recipe: str
    plans: Sequence[PlanHead]
    id: str | None = None


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read what stands in the folders of runs; none is touched.

    Raises:
        UsageError: A folder is given twice.
        InputError: One is no complete result of structprune, or holds other files than were written.
    """
    places = [Path(folder).expanduser().resolve() for folder in folders]
    for place, times in Counter(places).items():
        if times > 1:
            raise UsageError(f"{place}: given {times} times", hint="give every folder once")
    return [
        _read_run(folder, place, name)
        for folder, place, name in zip(folders, places, _names(places), strict=True)
    ]


def _names(places: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell all of them apart."""
    depth, ends = 1, [place.parts[-1:] for place in places]
    while len(set(ends)) < len(ends):
        depth += 1
        ends = [place.parts[-depth:] for place in places]
    # A name that is not UTF-8 can stand on no page.
    return ["/".join(end).encode(errors="replace").decode() for end in ends]


def _read_run(folder: Path, place: Path, name: str) -> FinishedRun:
    manifest = _manifest(folder, place)
    if REPORT_FILE not in manifest.files and not (place / REPORT_FILE).exists():
        raise InputError(
            f"{folder}: holds no {REPORT_FILE}",
            hint="give a folder that `structprune prune`, `apply` or `recover` wrote",
        )
    _check_unchanged(place, REPORT_FILE, manifest)
    _check_unchanged(place, RECIPE_FILE, manifest)
    report = checked_report(read_report(place), place)
    recipe = read_whole(place / RECIPE_FILE, limit_bytes=LIMIT_BYTES, root=place)
    plans = []
    for stage in report["stages"]:
        inner = PLANS / stage["folder"]
        if (place / inner).is_dir():
            _check_unchanged(place, (inner / PLAN_FILE).as_posix(), manifest)
            plans.append(read_head(place / inner))
    return FinishedRun(name, place, report, recipe.decode(errors="replace"), plans, run_of(manifest))


def run_of(manifest: Manifest | None) -> str | None:
    """Return what tells the run that wrote a folder from any other: the hash of its report, which has times.

    None where no run wrote it, or its report was changed on purpose.
    """
    written = manifest.files.get(REPORT_FILE) if manifest else None
    return written.sha256 if written else None


def _manifest(folder: Path, place: Path) -> Manifest:
    """Return the manifest of a complete result.

    Raises:
        InputError: There is no such folder, or a run did not complete it, or it is none of ours.
    """
    if not place.is_dir():
        if place.exists():
            raise InputError(f"{folder}: a file, expected a folder", hint="give the folder of a run")
        if any(partial.is_ours for partial in partials_of(place)):
            raise InputError(f"{folder}: incomplete, the run that writes it was interrupted", hint=AGAIN)
        raise InputError(
            f"{folder}: no such folder", hint="check the path; relative ones start at the working directory"
        )
    manifest = read_manifest(place)
    if manifest is not None:
        return manifest
    if (place / OURS).is_dir():
        raise InputError(f"{folder}: incomplete, it has {OURS}/ but no {MANIFEST}", hint=AGAIN)
    if inner := sorted(path.parent.name for path in place.glob(f"*/{MANIFEST}")):
        raise InputError(
            f"{folder}: no result itself, it holds {len(inner)} of them",
            hint=f"give them, such as {folder}/{inner[0]}",
        )
    raise InputError(
        f"{folder}: no folder that structprune wrote: it has no {MANIFEST}",
        hint="give a folder that `structprune prune`, `apply` or `recover` wrote",
    )


def _check_unchanged(place: Path, name: str, manifest: Manifest) -> None:
    """Refuse a file that is not what was written; one without an entry was changed on purpose."""
    if name in manifest.files and (problem := compare(place, name, manifest.files[name], place)):
        raise InputError(
            f"{place}: {problem}",
            hint=f'put it back; or, changed on purpose, delete its entry under "files" in {place / MANIFEST}',
        )


def checked_report(found: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Return of a report what a page may rely on.

    Args:
        found: The report of a run.
        place: The folder that it stands in.

    Raises:
        InputError: It lacks something, or says it in another way.
    """
    if "adapter" in found:
        raise InputError(
            f"{place}: a kept adapter, which has no figures of a model's files",
            hint="recover without --keep-adapter, and give that folder",
        )
    try:
        return Report.model_validate(found).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{place / REPORT_FILE}: {where}: {first['msg']}",
            hint="written by another version, or changed: create the folder again",
        ) from None
