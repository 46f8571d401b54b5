"""The pictures of a report, with matplotlib's object interface: no window, no state shared between plots."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structprune.errors import EnvironmentFailure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: its colours stay apart for every common kind of colour blindness, and in grey.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "xx", "..")
INK = "#333333"
DPI = 150
# Beyond this ratio the smallest bar is invisible on a linear scale.
LINEAR_RATIO = 12


def sparsity_per_block(path: Path, report: Mapping[str, Any]) -> Path:
    """Draw the sparsity of each block, stacked by what each kind of matrix adds to it; return the file.

    Args:
        path: The PNG to write.
        report: A report, or the JSON of a verification: its "blocks" are drawn, its "sparsity" is a line.

    Raises:
        EnvironmentFailure: matplotlib is not installed.
    """
    blocks = report["blocks"]
    kinds = list(dict.fromkeys(kind for block in blocks for kind in block["matrices"]))
    figure, (axes,) = _figure(1, width=max(7.0, min(16.0, 3.5 + 0.35 * len(blocks))))
    from matplotlib.ticker import MaxNLocator

    places = [block["block"] for block in blocks]
    heights = [0.0] * len(blocks)
    for number, kind in enumerate(kinds):
        parts = [zeros_share(block, kind) for block in blocks]
        axes.bar(
            places,
            parts,
            bottom=heights,
            width=0.8,
            label=kind,
            color=PALETTE[number % len(PALETTE)],
            hatch=HATCHES[number // len(PALETTE) % len(HATCHES)],
            edgecolor="white",
            linewidth=0.5,
        )
        heights = [low + part for low, part in zip(heights, parts, strict=True)]
    axes.axhline(report["sparsity"], color=INK, linestyle=":", linewidth=1.2)
    axes.annotate(
        f"measured {report['sparsity']:.2%}",
        (1, report["sparsity"]),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 3),
        textcoords="offset points",
        horizontalalignment="right",
        color=INK,
        fontsize=8,
    )
    axes.set_ylim(0, min(1.0, max([*heights, report["sparsity"], 0.05]) * 1.15))
    axes.set_xlabel("Block")
    axes.set_ylabel("Zeros in the block's matrices")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.7, len(blocks) - 0.3)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_title("Sparsity of each block, stacked by matrix", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    # Reversed, so that the legend reads from top to bottom as the bars do.
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8
    )
    return _save(figure, path)


def methods(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str = "") -> Path:
    """Draw each method's divergence from dense and its perplexity, side by side; return the file.

    Args:
        path: The PNG to write.
        rows: Per method "label", "kl" and "kl_se" (nats per token), "perplexity", and "dense", the dense
            model's perplexity in the same run; a figure that is None is left out.
        title: What was measured: the text, the protocol.

    Raises:
        EnvironmentFailure: matplotlib is not installed.
    """
    figure, (left, right) = _figure(2, width=max(8.0, 3.0 + 1.3 * len(rows)))
    labels = [str(row["label"]) for row in rows]
    _bars(left, labels, [row.get("kl") for row in rows], [row.get("kl_se") for row in rows])
    left.set_title("Divergence from dense", loc="left")
    left.set_ylabel("KL(dense || pruned), nats per token\n(whiskers: one standard error)")
    _bars(right, labels, [row.get("perplexity") for row in rows], [None] * len(rows))
    right.set_title("Perplexity", loc="left")
    right.set_ylabel("Perplexity")
    dense = next((row["dense"] for row in rows if row.get("dense") is not None), None)
    if dense is not None:
        right.axhline(dense, color=INK, linestyle=":", linewidth=1.4, label=f"dense {dense:.4g}")
        right.legend(loc="best", frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    return _save(figure, path)


def _bars(
    axes: "Axes", labels: Sequence[str], values: Sequence[float | None], errors: Sequence[float | None]
) -> None:
    """Draw one bar per label with its value on top; on a logarithmic scale where the values lie far apart."""
    found = [value for value in values if value is not None and math.isfinite(value) and value > 0]
    logarithmic = bool(found) and max(found) > LINEAR_RATIO * min(found)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(min(found) / 2, max(found) * 3)
    elif found:
        axes.set_ylim(0, max(found) * 1.18)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        if value is None or not math.isfinite(value):
            axes.annotate(
                "not\nfinite", (place, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8
            )
            continue
        axes.bar(
            place,
            value,
            width=0.7,
            color=PALETTE[place % len(PALETTE)],
            yerr=error,
            capsize=4,
            error_kw={"ecolor": INK, "linewidth": 1},
        )
        axes.annotate(
            f"{value:.3g}",
            (place, max(value + (error or 0), axes.get_ylim()[0])),
            xytext=(0, 4),
            textcoords="offset points",
            horizontalalignment="center",
            fontsize=8,
            color=INK,
        )
    axes.set_xticks(
        range(len(labels)),
        labels,
        rotation=25 if len(labels) > 3 else 0,
        ha="right" if len(labels) > 3 else "center",
    )
    axes.set_xlim(-0.6, len(labels) - 0.4)


def zeros_share(block: Mapping[str, Any], kind: str) -> float:
    """Return the zeros of one kind of matrix as a fraction of all weights of the block's matrices."""
    matrix = block["matrices"].get(kind)
    return matrix["zeros"] / block["parameters"] if matrix and block["parameters"] else 0.0


def _percent(value: float, _: object) -> str:
    return f"{value:.0%}"


def _figure(panels: int, *, width: float) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise EnvironmentFailure("plots need matplotlib", hint="pip install 'structprune[report]'") from None
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    found = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK)
    return figure, found


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # matplotlib would write its version into the file.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path
