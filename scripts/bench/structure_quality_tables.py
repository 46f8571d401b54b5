"""The tables and the plots of `structure_quality.py`, from its files, one per model.

A composition is a row of width that no paper has put together so. One is chosen per model: that with the
least geometric mean of KL over the sparsities, on the text to choose on. It is then held against the rows of
the papers, on the text to report.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from cells import Cell, difference, divergence_of, with_error
from figures import README, markdown, write_section
from structure_plots import draw, file_of, panels_of
from structure_rows import AS_SMALL, ROWS, SCORES, SURE, Found, chosen, found_of, shown, sparsities_of


def figures_of(kept: Mapping[str, Any], row: str, cell: Cell) -> dict[str, str]:
    """Return a line of a table by its columns."""
    speeds: dict[str, str] = {name: f"{cell[name][0]:.2f}" for name in ("prefill", "decode") if name in cell}
    return {
        "row": shown(row),
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
    parts.append(f"![KL from the dense model against {', '.join(panels_of(kept))}]({file_of(kept)})")
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


LEGEND = """
Rows marked (paper) are put together as a paper has them, without its training: FLAP, CFSP (and its released
code), LLM-Pruner, ShortGPT, BlockPruner, EAS in its static form. KL: mean nats per token ± standard error
over windows. MB: the weights in the dtype of the model's files. prefill, decode: times faster than dense,
medians of rounds that alternate, in the processor's seconds. agrees: tokens of greedy continuations before
the first that is not the dense model's. repeats: groups of four tokens that stood in the continuation
before. Plots: the grey line of a point spans its rounds, the black one joins those that no other beats."""


def main() -> None:
    """Print the tables of several models; with --write, put them and their plots where they are read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put them into README.md, the plots beside it")
    parser.add_argument("--plots", type=Path, help="a folder to put the plots into")
    options = parser.parse_args()
    kept = [json.loads(path.read_text()) for path in options.files]
    said = "\n\n".join([LEGEND.strip().replace("\n", " "), *map(section, kept)])
    print(said)
    if options.write:
        write_section("structure_quality.py", said)
    for folder in filter(None, (options.plots, README.parent if options.write else None)):
        for one in kept:
            draw(one, folder / file_of(one))


if __name__ == "__main__":
    main()
