"""The tables and the plots of `structure_quality.py`, from its files, one per model.

A composition is a row of width that no paper has put together so. One is chosen per model: that with the
least geometric mean of KL over the sparsities, on the text to choose on. It is then held against the rows of
the papers, on the text to report.
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from cells import Cell, difference, divergence_of, with_error
from figures import markdown, write_section

from structprune.report.plots import PALETTE

# A row that has this much more of the blocks left is not compared as an equal.
AS_SMALL = 0.02
# What counts as better, in standard errors.
SURE = 2


@dataclass(frozen=True)
class Row:
    """A score with a budget and a repair.

    Attributes:
        method: Its file.
        fields: Those that are not the method's defaults.
        width: Whether key-value groups or channels leave.
        paper: Whether a paper has put it together so.
    """

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    width: bool = True
    paper: bool = False

    @property
    def composition(self) -> bool:
        """Tell whether it may be chosen: what no paper has put together, and no baseline."""
        return self.width and not self.paper and self.method != "random_units"


# Scores of units, each with a budget: the method, its fields, and the repair that its paper has.
SCORES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "random_units": ("random_units", {}, None),
    "magnitude_units": ("magnitude_units", {}, "none"),
    "wanda_sp": ("wanda_sp", {}, "none"),
    "wanda_sp, global": ("wanda_sp", {"budget": "global"}, None),
    "flap": ("flap", {}, "bias"),
    "cfsp": ("cfsp", {}, "none"),
    "cfsp, compat": ("cfsp", {"compat": True}, "none"),
    "llm_pruner, vector": ("llm_pruner", {"score": "vector"}, "none"),
    "llm_pruner, element2": ("llm_pruner", {"score": "element2"}, "none"),
    "llm_pruner, mixed": ("llm_pruner", {"score": "mixed"}, "none"),
    "llm_pruner, element2, global": ("llm_pruner", {"score": "element2", "budget": "global"}, None),
}
REPAIRS = ("none", "bias", "least_squares")
DEPTH = {
    "attention_skip": Row("attention_skip", {"adapter": False, "refit": False}, width=False),
    "attention_skip + adapter + refit": Row("attention_skip", width=False, paper=True),
    "block_drop, random": Row("block_drop", {"score": "random"}, width=False),
    "block_drop, influence": Row("block_drop", width=False, paper=True),
    "block_drop, loss of sub-blocks": Row(
        "block_drop", {"score": "loss", "units": ["attention", "mlp"]}, width=False, paper=True
    ),
}
ROWS: dict[str, Row] = {
    f"{name} + {repair}" if repair != "none" else name: Row(
        method, fields | {"repair": repair}, paper=repair == own
    )
    for name, (method, fields, own) in SCORES.items()
    for repair in REPAIRS
} | DEPTH

Found = dict[tuple[str, float], Cell]


def found_of(kept: Mapping[str, Any]) -> Found:
    """Return cells by row and sparsity, in the order of the rows."""
    cells = {(cell["row"], cell["sparsity"]): cell for cell in kept["cells"]}
    return {key: cells[key] for key in sorted(cells, key=lambda key: ([*ROWS].index(key[0]), key[1]))}


def sparsities_of(found: Found) -> list[float]:
    """Return what was measured, ascending."""
    return sorted({sparsity for _, sparsity in found})


def figures_of(kept: Mapping[str, Any], row: str, cell: Cell) -> dict[str, str]:
    """Return a line of a table by its columns."""
    speeds: dict[str, str] = {name: f"{cell[name][0]:.2f}" for name in ("prefill", "decode") if name in cell}
    return {
        "row": f"{row} (paper)" if ROWS[row].paper else row,
        "perplexity": f"{cell['perplexity']:.4g}",
        "KL": with_error(*divergence_of([cell])),
        "M parameters": f"{cell['parameters'] / 1e6:.2f}",
        "of the blocks gone": f"{1 - cell['blocks']:.1%}",
        "MB": f"{cell['parameters'] * kept['itemsize'] / 1e6:.1f}",
        **speeds,
        "agrees": f"{fmean(cell['agreement']):.1f}",
        "repeats": f"{cell['repetition']:.0%}",
    }


def table_at(kept: Mapping[str, Any], found: Found, sparsity: float) -> str:
    """Return the table of one sparsity; without speeds where nothing was timed."""
    lines = [figures_of(kept, row, cell) for (row, at), cell in found.items() if at == sparsity]
    return markdown([*lines[0]], [[*line.values()] for line in lines])


def compared(worse: Cell, better: Cell) -> tuple[float, float]:
    """Return by how much KL falls from one cell to another, and the same in standard errors."""
    mean, error = difference(worse["windows"], better["windows"], worse["tokens"])
    return mean, mean / error


def told(pair: tuple[float, float]) -> str:
    """Return a difference and its standard errors."""
    return f"{pair[0]:+.3f} ({pair[1]:+.1f} SE)"


def refits(found: Found) -> tuple[str, list[float]]:
    """Return the table of what least squares does to each score, and the differences to none in errors."""
    lines, errors = [], []
    for score in SCORES:
        for sparsity in sparsities_of(found):
            none, bias, refit = (
                found.get((f"{score}{end}", sparsity)) for end in ("", " + bias", " + least_squares")
            )
            if refit and (none or bias):
                pairs = [None if one is None else compared(one, refit) for one in (none, bias)]
                lines.append([score, f"{sparsity}", *("" if one is None else told(one) for one in pairs)])
                errors += [one[1] for one in pairs[:1] if one]
    return markdown(("score", "at", "none - least_squares", "bias - least_squares"), lines), errors


def chosen(found: Found) -> str | None:
    """Return the composition that does best on the text to choose on; none where there was no choice."""
    everywhere = sparsities_of(found)
    means = {
        row: fmean(math.log(found[row, sparsity]["choose"]["kl"]) for sparsity in everywhere)
        for row, one in ROWS.items()
        if one.composition and all((row, sparsity) in found for sparsity in everywhere)
    }
    return min(means, key=means.__getitem__) if len(means) > 1 else None


def rivals(found: Found, best: str) -> tuple[str, list[float]]:
    """Return the table of every paper's row against a composition, and in errors those that are as small."""
    lines, errors = [], []
    for (row, sparsity), cell in found.items():
        if ROWS[row].paper:
            mine = found[best, sparsity]
            pair, as_small = compared(cell, mine), cell["blocks"] <= mine["blocks"] + AS_SMALL
            errors += [pair[1]] if as_small else []
            lines.append([row, f"{sparsity}", told(pair), "" if as_small else f"{1 - cell['blocks']:.1%}"])
    return markdown(
        ("paper's row - composition", "at", "KL", "of the blocks gone, where fewer"), lines
    ), errors


def section(kept: Mapping[str, Any]) -> str:
    """Return all figures of one model."""
    found = found_of(kept)
    any_cell = next(iter(found.values()))
    parts = [f"### {kept['model']}"]
    parts.append(
        f"{kept['protocol']}. {kept['processor']}, 1 thread, {kept['date']}. Dense: perplexity "
        f"{any_cell['dense_perplexity']:.4g}, {kept['parameters'] / 1e6:.2f} M parameters, repeats "
        f"{kept['repetition']:.0%}."
    )
    for sparsity in sparsities_of(found):
        parts += [f"At {sparsity}:", table_at(kept, found, sparsity)]
    measured = {row for row, _ in found}
    if missing := [row for row in ROWS if row not in measured]:
        named = "; ".join(missing) if len(missing) < len(measured) else f"the other {len(missing)} rows"
        parts.append(f"Not measured: {named}.")
    table, errors = refits(found)
    if errors:
        better, sure = (sum(one > least for one in errors) for least in (0, SURE))
        parts.append(
            f"Least squares against no repair: better in {better} of {len(errors)}, "
            f"by {SURE} standard errors in {sure}."
        )
        parts.append(table)
    if best := chosen(found):
        table, errors = rivals(found, best)
        sure = sum(one > SURE for one in errors)
        parts.append(
            f"Chosen: **{best}**. On the other text it beats {sure} of {len(errors)} rows of papers "
            f"that are as small by {SURE} standard errors."
        )
        parts.append(table)
    return "\n\n".join(parts)


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Draw KL against measured time of prefill and decode, and against bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = (
        ("prefill time / dense", lambda cell: 1 / cell["prefill"][0]),
        ("decode time / dense", lambda cell: 1 / cell["decode"][0]),
        ("MB", lambda cell: cell["parameters"] * kept["itemsize"] / 1e6),
    )
    found = {key: cell for key, cell in found_of(kept).items() if "prefill" in cell}
    for number, (label, value) in enumerate(panels):
        axes = figure.add_subplot(1, 3, number + 1)
        for place, row in enumerate(ROWS):
            cells = [found[key] for key in found if key[0] == row]
            style: dict[str, Any] = {
                "color": PALETTE[place // 3 % 8],
                "marker": "osD^vP*X<"[place % 3 + place // 24 * 3],
            }
            if cells:
                axes.plot(
                    [*map(value, cells)], [one["kl"] for one in cells], **style, label=row, linewidth=0.6
                )
        axes.set(yscale="log", xlabel=label, ylabel="KL(dense || pruned), nats per token")
        axes.grid(color="#DDDDDD", linewidth=0.6)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.suptitle(kept["model"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


LEGEND = """
Rows marked (paper) are put together as a paper has them, without its training: FLAP, CFSP (and its released
code), LLM-Pruner, ShortGPT, BlockPruner, EAS in its static form. KL: mean nats per token ± standard error
over windows. MB: the weights in the dtype of the model's files. prefill, decode: times faster than dense,
medians of rounds that alternate, in the processor's seconds. agrees: tokens of greedy continuations before
the first that is not the dense model's. repeats: groups of four tokens that stood in the continuation
before."""


def main() -> None:
    """Print the tables of several models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put them into README.md, too")
    parser.add_argument("--plots", type=Path)
    options = parser.parse_args()
    kept = [json.loads(path.read_text()) for path in options.files]
    said = "\n\n".join([LEGEND.strip().replace("\n", " "), *map(section, kept)])
    print(said)
    if options.write:
        write_section("structure_quality.py", said)
    for one in kept if options.plots else ():
        draw(one, options.plots / f"{one['model']}-structure.png")


if __name__ == "__main__":
    main()
