"""The plot of `structure_quality.py`: divergence from the dense model against measured time and bytes.

Each panel numbers its Pareto front: the points that no other one beats in both at once.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cells import Cell
from structure_rows import ROWS, Found, Row, found_of, shown, sparsities_of

from structprune.report.plots import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Yellow is too pale for a hollow marker, and the last colour is the grey of what leaves at random.
COLOURS = dict(
    zip(
        ("magnitude_units", "wanda_sp", "flap", "cfsp", "llm_pruner", "attention_skip", "block_drop"),
        (*PALETTE[:6], INK),
        strict=True,
    )
)
GREY = PALETTE[7]
DEPTH = "whole attentions or blocks"
# What makes up for the loss; rows of depth have repairs of their own.
MARKERS = {"none": "o", "bias": "s", "least_squares": "^", DEPTH: "D"}
# Inches of a panel, and dots per inch: two panels are as wide as a page shows them, all below 100 kB.
WIDTH, HEIGHT, DPI, COLOURS_KEPT = 5.6, 4.6, 110, 64
SMALL: dict[str, Any] = {"fontsize": 7.5, "color": INK, "ha": "center"}
RIGHT: dict[str, Any] = {"fontsize": 8, "color": INK, "ha": "right", "va": "top"}
LEGEND: dict[str, Any] = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "alignment": "left"}
# Lines of this size that fit below the legends.
MOST = 20

Value = Callable[[Cell], list[float]]
Key = tuple[str, float]


def file_of(kept: Mapping[str, Any]) -> str:
    """Return the name of a model's plot."""
    return f"{kept['model']}-structure.png"


def panels_of(kept: Mapping[str, Any]) -> dict[str, tuple[Value, float]]:
    """Return by label what stands against KL, and what it is of the dense model; times where all have some.

    A value is a median with its lowest and highest round.
    """

    def time_of(name: str) -> tuple[Value, float]:
        return lambda cell: [1 / cell[name][place] for place in (0, 2, 1)], 1.0

    timed = all("prefill" in cell for cell in kept["cells"])
    panels = {f"time of {name} / dense": time_of(name) for name in ("prefill", "decode") if timed}
    megabytes = kept["itemsize"] / 1e6
    panels["weights, MB"] = (
        lambda cell: [cell["parameters"] * megabytes] * 3,
        kept["parameters"] * megabytes,
    )
    return panels


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the points that no other one beats, the least in both, from left to right."""
    found: list[int] = []
    for place in sorted(range(len(points)), key=points.__getitem__):
        if not found or points[place][1] < points[found[-1]][1]:
            found.append(place)
    return found


def style_of(row: Row) -> dict[str, Any]:
    """Return how a row's points look: filled as a paper has it, hollow otherwise, a grey cross at random."""
    if row.baseline:
        return {"color": GREY, "marker": "x", "markersize": 5}
    colour = COLOURS[row.method]
    marker = MARKERS[row.fields["repair"] if row.width else DEPTH]
    fill = colour if row.paper else "white"
    return {"color": colour, "marker": marker, "markerfacecolor": fill, "markersize": 5}


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Draw a panel of each kind that was measured, and beside them what the signs mean.

    Args:
        kept: A model's file of cells.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    found, panels = found_of(kept), panels_of(kept)
    lines = (len(panels) + 2) // 2
    figure = Figure(figsize=(2 * WIDTH, lines * HEIGHT), layout="constrained")
    places = figure.subplots(lines, 2).flatten().tolist()
    fronts = [
        [[*found][place] for place in front_of([(value(cell)[0], cell["kl"]) for cell in found.values()])]
        for value, _ in panels.values()
    ]
    keys = sorted({key for front in fronts for key in front}, key=lambda key: found[key]["kl"])
    numbers = {key: number for number, key in enumerate(keys, 1)}
    for axes, (label, (value, dense)), front in zip(places, panels.items(), fronts):
        _rows(axes, found, value)
        points = [(value(found[key])[0], found[key]["kl"]) for key in front]
        axes.step(*zip(*points), where="post", color=INK, linewidth=0.8, zorder=2)
        for key, point in zip(front, points):
            axes.annotate(f"{numbers[key]}", point, (-7, -9), textcoords="offset points", **SMALL)
        axes.axvline(dense, color=INK, linestyle=":", linewidth=1.2)
        axes.annotate("dense", (dense, 0.98), (-4, 0), axes.get_xaxis_transform(), "offset points", **RIGHT)
        axes.set(yscale="log", xlabel=label, ylabel="KL(dense || pruned), nats per token")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _signs(places[-1], found, numbers)
    figure.suptitle(f"{kept['model']}: pruned structure, every row at {_listed(sparsities_of(found))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with BytesIO() as buffer:
        figure.savefig(buffer, dpi=DPI)
        # So few colours take a third of the bytes.
        Image.open(buffer).quantize(COLOURS_KEPT).save(path, optimize=True)


def _rows(axes: "Axes", found: Found, value: Value) -> None:
    for name, row in ROWS.items():
        cells = [cell for (own, _), cell in found.items() if own == name]
        if cells:
            middles, lows, highs = zip(*map(value, cells))
            kls = [cell["kl"] for cell in cells]
            axes.hlines(kls, lows, highs, color="#CCCCCC", linewidth=0.6, zorder=1)
            axes.plot(middles, kls, linestyle="", **style_of(row))


def _signs(axes: "Axes", found: Found, numbers: Mapping[Key, int]) -> None:
    """Write what colours, markers and numbers mean."""
    from matplotlib.lines import Line2D

    def sign(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="", markersize=6, label=label, **style)

    measured = {"at random" if ROWS[name].baseline else ROWS[name].method for name, _ in found}
    known = {name: ("o", colour) for name, colour in COLOURS.items()} | {"at random": ("x", GREY)}
    signs = [
        sign(name, marker=marker, color=colour)
        for name, (marker, colour) in known.items()
        if name in measured
    ]
    shapes = [sign(name, marker=marker, color=INK, mfc="white") for name, marker in MARKERS.items()]
    shapes += [sign("filled: as a paper has it", marker="o", color=INK)]
    axes.axis("off")
    axes.add_artist(axes.legend(handles=signs, loc="upper left", title="score", ncols=2, **LEGEND))
    axes.legend(handles=shapes, loc="upper right", title="repair", **LEGEND)
    fronts = [f"{number:2d}  {shown(name)}, {at}" for (name, at), number in numbers.items()]
    size = min(8.0, 8.0 * MOST / len(fronts))
    said = "\n".join(["on a front (line), by KL:", *fronts])
    axes.text(0, 0, said, fontsize=size, color=INK, va="bottom")


def _listed(sparsities: Sequence[float]) -> str:
    return ", ".join(f"{one:.0%}" for one in sparsities)
