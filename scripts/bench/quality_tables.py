"""The tables and the plot of `quality.py`, from its cells."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cells import Cell, difference, divergence_of, pooled, with_error

from structprune.report.plots import PALETTE

# What is compared: worse, better; where they are unstructured, and where they are N:M.
PAIRS = (("magnitude", "wanda"), ("wanda", "sparsegpt"))
PATTERN_PAIRS = tuple(product(("nowag", "sparsegpt", EQUAL_BYTES), ("armor", "armor, gram")))


def perplexity_of(cells: Sequence[Cell]) -> float:
    """Return the mean perplexity over seeds."""
    return fmean(cell["perplexity"] for cell in cells)


def accuracy_of(cells: Sequence[Cell]) -> str:
    """Return the mean share of right answers over seeds and its standard error over questions."""
    found = [cell for cell in cells if "accuracy" in cell]
    if not found:
        return ""
    mean, error = (fmean(cell["accuracy"][part] for cell in found) for part in (0, 1))
    return f"{mean:.1%} ± {error:.1%} ({len(found)})"


def told(cells: Sequence[Cell]) -> str:
    """Return "mean ± standard error (seeds)", the error with two digits."""
    return f"{with_error(*divergence_of(cells))} ({len(cells)})"


def table(cells: Sequence[Cell], show: Callable[[Sequence[Cell]], str]) -> Iterator[str]:
    """Yield the lines of a Markdown table of one figure: a row per method, a column per sparsity."""
    yield "| | " + " | ".join(SPARSITIES) + " |\n" + "|---" * (len(SPARSITIES) + 1) + "|"
    for row in ROWS:
        found = [[*cells_at(cells, row, sparsity).values()] for sparsity in SPARSITIES]
        if any(found):
            yield f"| {row} | " + " | ".join(show(each) if each else "" for each in found) + " |"


def pairs(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of a Markdown table of paired differences; composed ones against the best single."""
    yield "| worse - better | at | KL | in SE | by seed | gap closed: KL, perplexity |\n" + "|---" * 6 + "|"
    for at in SPARSITIES:
        wanted = [*(PATTERN_PAIRS if ":" in at else PAIRS)]
        found = {row: [*each.values()] for row in ROWS if (each := cells_at(cells, row, at))}
        means = {row: divergence_of(each)[0] for row, each in found.items()}
        if ":" not in at and (single := [row for row in means if "+" not in row]):
            best = min(single, key=means.__getitem__)
            wanted += [(best, row) for row in means if "+" in row]
        for worse, better in wanted:
            first, second = cells_at(cells, worse, at), cells_at(cells, better, at)
            if seeds := sorted(first.keys() & second.keys()):
                both = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
                yield f"| {worse} - {better} | {at} | {compared(*both)} |"


def compared(worse: Sequence[Cell], better: Sequence[Cell]) -> str:
    """Return the rest of a line of `pairs`, for cells of the same seeds."""
    tokens = worse[0]["tokens"]
    mean, error = difference(pooled(worse), pooled(better), tokens)
    seeds = [difference(one["windows"], two["windows"], tokens) for one, two in zip(worse, better)]
    divergence = mean / divergence_of(worse)[0]
    high, low = perplexity_of(worse), perplexity_of(better)
    perplexity = (high - low) / (high - worse[0]["dense_perplexity"])
    each = ", ".join(f"{m / e:.1f}" for m, e in seeds)
    return f"{mean:.5f} | {mean / error:.1f} | {each} | {divergence:.0%}, {perplexity:.0%}"


def losses(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of a Markdown table: ARMOR's losses to NoWag's, other errors to SparseGPT's."""
    yield "| loss of a matrix, over matrices and seeds | at | min | median | max |\n" + "|---" * 5 + "|"
    for row, at in product(ROWS, SPARSITIES):
        ratios = []
        for seed, cell in cells_at(cells, row, at).items():
            rivals = cells_at(cells, "sparsegpt", at).get(seed, {"matrices": {}})["matrices"]
            for label, found in cell["matrices"].items():
                if "armor_loss" in found:
                    ratios.append(found["armor_loss"] / found["nowag_loss"])
                elif label in rivals and ROWS[row][0] != "sparsegpt":
                    ratios.append(found["error"] / rivals[label]["error"])
        if ratios:
            rival = "nowag" if ROWS[row][0] == "armor" else "sparsegpt"
            numbers = f"{min(ratios):.3f} | {median(ratios):.3f} | {max(ratios):.3f}"
            yield f"| {row} / {rival} | {at} | {numbers} |"


def draw(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Draw KL and perplexity (dotted: dense) against sparsity; N:M stands as points at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    for number, label in enumerate(("KL(dense || pruned), nats per token", "perplexity, without random")):
        axes = figure.add_subplot(1, 2, number + 1)
        axes.plot(SPARSITIES, [math.nan] * len(SPARSITIES))  # fixes the order of the columns
        for place, row in enumerate([*ROWS][number:], number):
            cells_of = {at: [*each.values()] for at in SPARSITIES if (each := cells_at(cells, row, at))}
            found = {at: (divergence_of(c)[0], perplexity_of(c))[number] for at, c in cells_of.items()}
            style: dict[str, Any] = {
                "color": PALETTE[place % 8],
                "marker": "osD^vP*X<"[place // 2],
                "label": row,
            }
            for line, pattern in (("--" if "+" in row else "-", False), ("none", True)):
                points = [at for at in found if (":" in at) == pattern]
                if points:
                    axes.plot(points, [found[at] for at in points], linestyle=line, **style)
                    style["label"] = "_"
        axes.set(yscale="log", xlabel="sparsity", ylabel=label)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.axhline(cells[0]["dense_perplexity"], color="#333333", linestyle=":")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
