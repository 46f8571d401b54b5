"""The plot of `quality.py`: perplexity against the weights that are left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quality_rows import ROWS, SMALLER, SPARSITIES, UNITS, cells_at, perplexity_of

from structprune.report.plots import INK, PALETTE

# Perplexities above so many times the dense one are left out: they would press the others together.
MOST = 40
WIDTH, HEIGHT, DPI = 9.0, 5.0, 120
MARKERS = "osD^vP*X<>hpd"


def file_of(kept: Mapping[str, Any]) -> str:
    """Return the name of a model's plot."""
    return f"{kept['model']}.png"


def left_of(kept: Mapping[str, Any], cell: Mapping[str, Any]) -> float:
    """Return the share of the dense model's parameters that is stored and not zero."""
    at = str(cell["fields"]["sparsity"])
    if cell["sparsity"] in SMALLER:
        removed = 0.0
    elif ":" in at:
        few, of = map(int, at.split(":"))
        removed = 1 - few / of
    else:
        removed = float(at)
    return float(cell["parameters"] - removed * kept["linears"]) / float(kept["parameters"])


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Draw a line per row over its sparsities; hollow where N of M weights stay.

    Args:
        kept: A model's file of cells.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    dense = kept["dense"]["perplexity"]
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate([*ROWS, *UNITS]):
        style: dict[str, Any] = {
            "color": PALETTE[place % len(PALETTE)],
            "marker": MARKERS[place % len(MARKERS)],
        }
        points = points_of(kept, row)
        if low := sorted(point for at, point in points.items() if ":" not in at):
            axes.plot(*zip(*low), linestyle="-" if "+" in row else ":", linewidth=1.2, label=row, **style)
            style["label"] = "_"
        if high := [point for at, point in points.items() if ":" in at]:
            axes.plot(*zip(*high), linestyle="none", markerfacecolor="white", **{"label": row, **style})
    axes.plot([1], [dense], color=INK, marker="o", markersize=9, linestyle="none", label="dense")
    axes.axhline(dense, color=INK, linestyle=":", linewidth=0.8)
    axes.set(yscale="log", xlabel="parameters that are not zero / all of the dense model's")
    axes.set_ylabel("perplexity")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside right upper", frameon=False, title="hollow: 2:4", title_fontsize=8)
    title = f"{kept['model']}: what pruning costs (left out: beyond {MOST} times dense)"
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def points_of(kept: Mapping[str, Any], row: str) -> dict[str, tuple[float, float]]:
    """Return by sparsity what a row has left, and its perplexity, where that is not beyond the picture."""
    cells = {at: [*cells_at(kept["cells"], row, at).values()] for at in (*SPARSITIES, *SMALLER)}
    points = {at: (left_of(kept, each[0]), perplexity_of(each)) for at, each in cells.items() if each}
    return {at: one for at, one in points.items() if one[1] < MOST * kept["dense"]["perplexity"]}
