"""The tables of `structure_recovery.py`, from its files, one per model.

The composition that is best before training, on the text to choose on, is held against every row after it.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from cells import Cell, difference, divergence_of, with_error
from figures import markdown, write_section
from structure_rows import AS_SMALL, ROWS, SURE, TRAINED, Found, chosen, found_of, shown, sparsities_of

HEADER = ("row", "of the blocks gone", "perplexity", "KL from dense", "from dense trained alike")
WRITTEN = ("agrees", "repeats")


def figures_of(row: str, *cells: Cell) -> list[str]:
    """Return a line of the table from the cells before and after training; of the dense model, only after."""

    def each(say: Callable[[Cell], str]) -> str:
        return " → ".join(map(say, cells))

    return [
        row,
        f"{1 - cells[0]['blocks']:.1%}",
        each(lambda cell: f"{cell['perplexity']:.4g}"),
        each(lambda cell: with_error(*divergence_of([cell]))),
        with_error(*divergence_of([cells[-1]["tuned"]])) if "tuned" in cells[-1] else "",
        each(lambda cell: f"{fmean(cell['agreement']):.1f}"),
        each(lambda cell: f"{cell['repetition']:.0%}"),
    ]


def lead(worse: Cell, better: Cell) -> tuple[float, float]:
    """Return how much farther one recovered cell is from the dense model trained alike, and the error."""
    one, other = (cell["recovered"]["tuned"] for cell in (worse, better))
    return difference(one["windows"], other["windows"], one["tokens"])


def order_kept(pairs: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Return how many pairs of rows stand in the same order before and after, and how many there are."""
    found = [(one[0] - other[0]) * (one[1] - other[1]) > 0 for one, other in combinations(pairs, 2)]
    return sum(found), len(found)


def table_at(kept: Mapping[str, Any], found: Found) -> list[str]:
    """Return the table of one sparsity and what follows from it."""
    best = next((cell for (row, _), cell in found.items() if row == chosen(found)), None)
    lines = [[*figures_of("dense, trained alike", kept["dense"]), *([""] if best else [])]]
    for (row, _), cell in found.items():
        line = figures_of(shown(row), cell, cell["recovered"])
        if best:
            mean, error = lead(cell, best)
            line.append(f"{mean:+.3f} ({mean / error:+.1f} SE)" if error else "")
        lines.append(line)
    header = [*HEADER, *WRITTEN, *([f"less {best['row']}"] if best else [])]
    parts = [markdown(header, lines)]
    same, pairs = order_kept([(cell["kl"], cell["recovered"]["tuned"]["kl"]) for cell in found.values()])
    parts.append(f"Of {pairs} pairs of rows, {same} stand in the same order of KL after training.")
    if failed := [row for (row, _), cell in found.items() if "failed" in cell["training"]]:
        parts.append(f"Nothing beat the start, and nothing was changed: {'; '.join(failed)}.")
    if best:
        small = best["blocks"] + AS_SMALL
        rivals = [cell for (row, _), cell in found.items() if ROWS[row].paper and cell["blocks"] <= small]
        leads = [lead(cell, best) for cell in rivals]
        sure = sum(mean > SURE * error for mean, error in leads)
        parts.append(
            f"**{best['row']}**, chosen before training, is closer after it than {sure} of {len(leads)} "
            f"rows of papers that are as small, by {SURE} standard errors."
        )
    return parts


def section(kept: Mapping[str, Any]) -> str:
    """Return all figures of one model."""
    found, dense = found_of(kept), kept["dense"]
    parts = [f"### {kept['model']}"]
    parts.append(
        f"{kept['protocol']}. {kept['processor']}, 1 thread, {kept['date']}. Dense: perplexity "
        f"{dense['dense_perplexity']:.4g}, repeats {kept['repetition']:.0%}."
    )
    for sparsity in sparsities_of(found):
        cells = {key: cell for key, cell in found.items() if key[1] == sparsity}
        parts += [f"At {sparsity}:", *table_at(kept, cells)]
        if missing := [row for row in TRAINED if (row, sparsity) not in cells]:
            parts.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(parts)


LEGEND = """
Every row, and the dense model, trained with the same budget by the package's own recovery, on text that is
neither chosen on nor reported; one seed. Before → after. KL: mean nats per token ± standard error over
windows, on the text that is reported. Training also adapts a model to the text it trains on, which leads away
from the dense model as it was while perplexity falls: rows are compared by their KL from the dense model
trained alike. agrees: tokens of greedy continuations before the first that is not the dense model's. repeats:
groups of four tokens that stood in the continuation before."""


def main() -> None:
    """Print the tables of several models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put them into README.md, too")
    options = parser.parse_args()
    kept = [json.loads(path.read_text()) for path in options.files]
    said = "\n\n".join([LEGEND.strip().replace("\n", " "), *map(section, kept)])
    print(said)
    if options.write:
        write_section("structure_recovery.py", said)


if __name__ == "__main__":
    main()
