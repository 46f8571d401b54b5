"""Several runs side by side: only what was measured alike, against the same dense model, is compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structprune.report.block_charts import counted_short, percent_short
from structprune.report.charts import Axis, Chart, Dot, scatter
from structprune.report.figures import bytes_text, number
from structprune.report.finished import FinishedRun
from structprune.report.report import TableRow, footing, table_rows
from structprune.report.sentences import composition, goals_rows

# Two counts that differ by less are one size: headers and exact zeros of a model vary a little.
SAME_SIZE = 0.01
NOTHING = "-"
READ = "Low and to the left is good. The line joins the runs that no other beats in both."


@dataclass(frozen=True)
class SideRow:
    """One figure of several runs.

    Attributes:
        what: What was measured.
        how: How, in a few words.
        dense: Of the dense model.
        cells: Of every run, "-" where it was not measured, or measured otherwise.
    """

    what: str
    how: str
    dense: str
    cells: Sequence[str]


@dataclass(frozen=True)
class _Size:
    """What the runs may differ in, and how it is read from a report; None where it does not apply."""

    axis: Axis
    read: Callable[[Mapping[str, Any]], float | None]


def side_by_side(runs: Sequence[FinishedRun]) -> list[SideRow]:
    """Return the figures of several runs; one that was measured in two ways has two rows."""
    goals = [goals_rows(run.report) for run in runs]
    rows = [SideRow("Method", "", "", [composition(run.report) for run in runs])]
    for place, what in ((2, "Asked"), (4, "Measured")):
        cells = [", ".join(row[place] for row in found) or NOTHING for found in goals]
        rows.append(SideRow(what, "removed, stage by stage" if place == 4 else "", "", cells))
    found: dict[tuple[str, str], dict[int, TableRow]] = {}
    for place, run in enumerate(runs):
        for row in table_rows(run.report):
            found.setdefault((row.what, row.footing), {})[place] = row
    return rows + [_side_row(alike, len(runs)) for alike in found.values()]


def _side_row(alike: Mapping[int, TableRow], count: int) -> SideRow:
    """Return one figure of the runs at some places among so many."""
    first = next(iter(alike.values()))
    same = {row.dense for row in alike.values()} == {first.dense}
    # What only the dense model gets right, say, depends on the run that it is set against.
    said = {
        place: row.pruned if same else f"{row.dense} dense, {row.pruned} pruned"
        for place, row in alike.items()
    }
    cells = [said.get(place, NOTHING) for place in range(count)]
    return SideRow(first.what, first.how, first.dense if same else "", cells)


def trade_offs(runs: Sequence[FinishedRun]) -> list[Chart]:
    """Return how far the runs are from dense against how large they are, for each text and size.

    A text that was cut otherwise, or another dense model, is another chart.
    """
    charts = []
    for name, group in _measured_alike(runs):
        for size in _sizes_of([run.report for run, _, _ in group]):
            found = [(run.name, size.read(run.report), kl, error) for run, kl, error in group]
            dots = [Dot(label, x, kl, error) for label, x, kl, error in found if x is not None]
            title = f"KL from dense on {name}, against {size.axis.title}"
            charts.append(scatter(title, _note(runs, dots), dots, size.axis, KL))
    return charts


def _measured_alike(
    runs: Sequence[FinishedRun],
) -> list[tuple[str, list[tuple[FinishedRun, float, float]]]]:
    """Return (text, runs with their KL and its standard error) where at least two were measured alike."""
    groups: dict[str, tuple[str, list[tuple[FinishedRun, float, float]]]] = {}
    for run in runs:
        found = run.report["evaluation"] or {}
        for kind, what in (("texts", "divergence"), ("questions", "questions")):
            for name, figures in found.get(what, {}).items():
                if figures["kl"] is not None:
                    _, group = groups.setdefault(footing(run.report, kind, name), (name, []))
                    group.append((run, figures["kl"], figures["kl_se"] or 0.0))
    return [one for one in groups.values() if len(one[1]) > 1]


def _sizes_of(reports: Sequence[Mapping[str, Any]]) -> list[_Size]:
    """Return what some runs differ in; where it is nothing, the first that all have."""
    differing = []
    for size in SIZES:
        values = [value for one in reports if (value := size.read(one)) is not None]
        if len(values) > 1 and max(values) - min(values) > SAME_SIZE * max(values):
            differing.append(size)
    return differing or [SIZES[0]]


def _visual_operations(report: Mapping[str, Any]) -> float | None:
    """Return what is left of the operations of visual tokens; None where several stages share in it."""
    found = [stage["while_running"] for stage in report["stages"] if "while_running" in stage]
    return found[0].get("visual_flops") if len(found) == 1 else None


def _note(runs: Sequence[FinishedRun], dots: Sequence[Dot]) -> str:
    there = {dot.label for dot in dots}
    absent = [run.name for run in runs if run.name not in there]
    said = f" Not here, because they were not measured alike: {', '.join(absent)}." if absent else ""
    return READ + said


KL = Axis("KL, nats", number)
SIZES = (
    _Size(Axis("parameters that are not zero", counted_short), lambda one: one["parameters"]["nonzero"]),
    _Size(Axis("bytes of the weight files", bytes_text), lambda one: one["bytes"]["pruned"]),
    _Size(Axis("operations of visual tokens", percent_short), _visual_operations),
)
