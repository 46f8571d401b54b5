"""The plot of `tokens_quality.py`: right answers against tokens kept, and against their operations."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cells import Cell

from structprune.report.plots import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What knows nothing of the picture is grey.
BASELINES: dict[str, dict[str, Any]] = {
    "random_tokens": {"color": PALETTE[7], "marker": "x", "linestyle": "--"},
    "grid_tokens": {"color": PALETTE[7], "marker": "+", "linestyle": ":"},
    "downsample": {"color": PALETTE[7], "marker": "v", "linestyle": "-."},
}
# Of the others as many have a line as can be told apart; yellow is too pale for one.
COLOURS = PALETTE[:6]
MARKERS = "os^DPX"
# Of the operations of visual tokens, mean over shares: about what those take that drop at the embeddings.
CHEAP = 0.2
# Both ends of a 95% interval lie so many standard errors away.
ERRORS = 1.96
WIDTH, HEIGHT, DPI, COLOURS_KEPT = 5.6, 4.2, 110, 64


def file_of(kept: Mapping[str, Any]) -> str:
    """Return the name of a model's plot."""
    return f"{kept['model'].replace(', ', '-').replace(' ', '-')}-tokens.png"


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Draw a line of each method in two panels: against tokens kept, and against their operations.

    Args:
        kept: A model's file of cells.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(2 * WIDTH, HEIGHT), layout="constrained")
    panels = {
        "visual tokens kept in the last block": "keep_ratio",
        "operations of visual tokens / dense": "visual_flops",
    }
    dense = fmean(kept["dense"])
    for axes, (label, fact) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
        for method, style in styles(kept["cells"]).items():
            _line(axes, [one for one in kept["cells"] if one["method"] == method], fact, style)
        axes.axhline(dense, color=INK, linestyle="-", linewidth=1.0)
        axes.annotate(
            f"dense {dense:.1%}",
            (0.02, dense),
            (0, 3),
            axes.get_yaxis_transform(),
            "offset points",
            fontsize=8,
        )
        axes.set(xscale="log", xlabel=label, xlim=(0.02, 0.75), ylim=(0, 1.08))
        axes.xaxis.set_major_formatter(_percent)
        axes.xaxis.set_minor_formatter("")
        axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5])
        axes.yaxis.set_major_formatter(_percent)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left = figure.axes[0]
    left.set_ylabel("right answers, with 95% intervals")
    figure.axes[1].legend(loc="lower right", frameon=False, fontsize=8)
    figure.suptitle(f"{kept['model']}: {len(kept['dense'])} questions on images", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with BytesIO() as buffer:
        figure.savefig(buffer, dpi=DPI)
        # So few colours take a third of the bytes.
        Image.open(buffer).quantize(COLOURS_KEPT).save(path, optimize=True)


def styles(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Return how methods are drawn: baselines, and those that answer most, half of them of the cheapest."""
    right: dict[str, list[float]] = {}
    spent: dict[str, list[float]] = {}
    for one in cells:
        right.setdefault(one["method"], []).append(fmean(one["right"]))
        spent.setdefault(one["method"], []).append(one["facts"]["visual_flops"])
    whole = [name for name in right.keys() - BASELINES.keys() if len(right[name]) == len(_shares(cells))]
    ranked = sorted(whole, key=lambda name: (-fmean(right[name]), name))
    # Of those that ask the tower in two ways the better one.
    others = list({name.partition(" ")[0]: name for name in reversed(ranked)}.values())[::-1]
    others.sort(key=ranked.index)
    cheap = [name for name in others if fmean(spent[name]) < CHEAP][: len(COLOURS) // 2]
    dear = [name for name in others if name not in cheap][: len(COLOURS) - len(cheap)]
    best = zip(dear + cheap, COLOURS, MARKERS)
    return BASELINES | {name: {"color": colour, "marker": marker} for name, colour, marker in best}


def _line(axes: "Axes", cells: Sequence[Cell], fact: str, style: Mapping[str, Any]) -> None:
    if not cells:
        return
    points = sorted(_point([one for one in cells if one["share"] == share], fact) for share in _shares(cells))
    places, means, errors = zip(*points)
    axes.errorbar(
        places, means, errors, label=cells[0]["method"], markersize=5, linewidth=1.3, capsize=3, **style
    )


def _shares(cells: Sequence[Cell]) -> list[float]:
    return list(dict.fromkeys(one["share"] for one in cells))


def _point(seeds: Sequence[Cell], fact: str) -> tuple[float, float, float]:
    """Return what is left or what it costs, the share of right answers over seeds, and half an interval.

    Several seeds answer the same questions: the interval is that of a mean over questions.
    """
    each = [fmean(answers) for answers in zip(*(one["right"] for one in seeds), strict=True)]
    mean = fmean(each)
    error = math.sqrt(fmean((one - mean) ** 2 for one in each) / len(each))
    return seeds[0]["facts"][fact], mean, ERRORS * error


def _percent(value: float, _: object) -> str:
    return f"{value:.0%}"
