"""What became of each block of a pruned model, as charts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from structprune.plan.plan import PlanHead
from structprune.plan.promise import Computed
from structprune.report.charts import Axis, Chart, bars
from structprune.report.figures import fraction, percent, scaled
from structprune.report.plots import zeros_share

UNITS = ("", "k", "M", "G")
IN_FILES = "Counted in the files; stacked by matrix."
# What no count of a model comes near, and a float still holds.
LARGEST = 2**63


def block_charts(report: Mapping[str, Any], plans: Sequence[PlanHead]) -> list[Chart]:
    """Return one chart for everything that was counted block by block.

    Args:
        report: The report of a run.
        plans: What the run's plans say, in order.
    """
    charts = [*_zeros(report), *_parameters(report)]
    for plan in plans:
        charts += [*_units(plan), *_tokens(plan)]
    return charts


def counted_short(value: float) -> str:
    """Return a count as it stands beside an axis: "1.1M"."""
    return scaled(value, UNITS).replace(" ", "")


def percent_short(value: float) -> str:
    """Return a share as it stands beside an axis: "50%"."""
    return percent(value).replace(".0%", "%")


def _zeros(report: Mapping[str, Any]) -> Iterator[Chart]:
    """Yield the zeros of each block, stacked by matrix, as they stand in the files."""
    if report["sparsity"] and report["blocks"]:
        rows = [
            (str(block["block"]), {kind: zeros_share(block, kind) for kind in block["matrices"]})
            for block in report["blocks"]
        ]
        said = f"measured {fraction(report['sparsity'])}"
        yield bars(
            "Zeros in each block's matrices",
            IN_FILES,
            rows,
            Axis("zeros", percent_short),
            (report["sparsity"], said),
        )


def _parameters(report: Mapping[str, Any]) -> Iterator[Chart]:
    """Yield what is left of each block, stacked by matrix, where parameters left."""
    if report["parameters"]["pruned"] < report["parameters"]["dense"] and report["blocks"]:
        rows = [
            (str(block["block"]), {kind: one["parameters"] for kind, one in block["matrices"].items()})
            for block in report["blocks"]
        ]
        yield bars(
            "Parameters left in each block's matrices", IN_FILES, rows, Axis("parameters", counted_short)
        )


def _units(plan: PlanHead) -> Iterator[Chart]:
    """Yield how many units of each kind stay in each block."""
    kept = plan.facts.get("kept")
    if not isinstance(kept, list) or not all(isinstance(one, dict) for one in kept):
        return
    for kind in dict.fromkeys(str(kind) for one in kept for kind in one):
        counts = [one.get(kind, 0) for one in kept]
        if all(isinstance(count, int) and 0 <= count < LARGEST for count in counts) and any(counts):
            rows = [(str(block), {kind: float(count)}) for block, count in enumerate(counts)]
            what = kind.replace("_", " ").replace("kv", "key-value")
            title = f"{what} left in each block".capitalize()
            note = f"What {plan.method} decided; the proof held the shapes in the files to it."
            yield bars(title, note, rows, Axis(what, counted_short))


def _tokens(plan: PlanHead) -> Iterator[Chart]:
    """Yield how many visual tokens each block computes, twice where attention computes others."""
    stored = plan.promises.stored if plan.promises else ()
    computed = [one for one in stored if isinstance(one, Computed)]
    if not computed or any(max(one.attention, one.feed_forward, one.of) >= LARGEST for one in computed):
        return
    places = {"attention": [one.attention for one in computed]}
    if (after := [one.feed_forward for one in computed]) != places["attention"]:
        places["feed-forward"] = after
    of = max(one.of for one in computed)
    most = "at most " if any(one.at_most for one in computed) else ""
    for place, counts in places.items():
        rows = [(str(block), {place: float(count)}) for block, count in enumerate(counts)]
        where = f"each block's {place}" if len(places) > 1 else "each block"
        note = f"Of an image, {most}so many are computed under {plan.method}."
        line = (of, f"{of:,} in an image")
        yield bars(f"Visual tokens in {where}", note, rows, Axis("visual tokens", counted_short), line)
