"""The plot of `quality.py`: perplexity against the weights that are left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quality_rows import ROWS, SMALLER, UNITS, cells_at, perplexity_of

from structprune.report.plots import INK, PALETTE

# Perplexities above so many times the dense one are left out: they would press the others together.
MOST = 40
WIDTH, HEIGHT, DPI = 9.0, 5.0, 120
MARKERS = "osD^vP*X<>hp"


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
    """Draw a line per row over its sparsities; N:M and rows of whole units in a panel each.

    Args:
        kept: A model's file of cells.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    dense = kept["dense"]["perplexity"]
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate([*ROWS, *UNITS]):
        cells = [
            [*cells_at(kept["cells"], row, at).values()] for at in {c["sparsity"] for c in kept["cells"]}
        ]
        points = sorted((left_of(kept, each[0]), perplexity_of(each)) for each in cells if each)
        points = [point for point in points if point[1] < MOST * dense]
        if points:
            axes.plot(
                *zip(*points),
                color=PALETTE[place % len(PALETTE)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle="--" if row in UNITS else "-" if "+" in row else ":",
                linewidth=1.2,
                label=row,
            )
    axes.plot([1], [dense], color=INK, marker="o", markersize=8, linestyle="none", label="dense")
    axes.axhline(dense, color=INK, linestyle=":", linewidth=0.8)
    axes.set(
        yscale="log", xlabel="parameters that are not zero / all of the dense model", ylabel="perplexity"
    )
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside right upper", frameon=False)
    figure.suptitle(f"{kept['model']}: what pruning costs", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
