"""The tables of `quality.py`, from its files: several of one model are taken together.

python scripts/bench/quality_tables.py /tmp/demo.json /tmp/real.json --write
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cells import Cell, difference, divergence_of, pooled, with_error
from figures import README, markdown, write_section
from quality_plot import draw, file_of
from quality_rows import EQUAL_BYTES, ROWS, SMALLER, SPARSITIES, UNITS, cells_at, perplexity_of

EVERY, COLUMNS = [*ROWS, *UNITS], [*SPARSITIES, *SMALLER]
# What is compared: worse, better; where they are unstructured, and where they are N:M.
PAIRS = (("magnitude", "wanda"), ("wanda", "sparsegpt"), ("cfsp", "cfsp + least_squares"))
PATTERN_PAIRS = (
    ("wanda", "wanda + least_squares"),
    *product(("nowag", "sparsegpt", EQUAL_BYTES), ("armor", "armor, gram")),
)
# Where continuations are shown.
SHOWN = ("0.5", "2:4", "20% smaller")
LOSSES = "| loss of a matrix, over matrices and seeds | at | min | median | max |\n" + "|---" * 5 + "|"


def accuracy_of(cells: Sequence[Cell]) -> str:
    """Return the mean share of right answers over seeds."""
    found = [cell["accuracy"][0] for cell in cells if "accuracy" in cell]
    return f", {fmean(found):.0%}" if found else ""


def told(cells: Sequence[Cell]) -> str:
    """Return perplexity, what is right, and KL with its standard error; nothing without cells."""
    if not cells:
        return ""
    size = f", {cells[0]['parameters'] / 1e6:.1f} M left" if cells[0]["sparsity"] in SMALLER else ""
    return f"{perplexity_of(cells):.4g}{accuracy_of(cells)} ({with_error(*divergence_of(cells))}){size}"


def table(kept: Mapping[str, Any]) -> str:
    """Return a row per method, a column per sparsity, with the processor's seconds of deciding."""
    cells = kept["cells"]
    columns = [at for at in COLUMNS if any(cell["sparsity"] == at for cell in cells)]
    dense = f"{kept['dense']['perplexity']:.4g}{accuracy_of([kept['dense']])} (0)"
    lines = [["dense", *[dense] * len(columns), "", ""]]
    for row in EVERY:
        found = [[*cells_at(cells, row, at).values()] for at in columns]
        if any(found):
            every = [cell for each in found for cell in each]
            seconds = median(cell["calibration_cpu_seconds"] for cell in every)
            seeds = f"{max(len(each) for each in found)}"
            lines.append([row, *map(told, found), f"{seconds:.0f}", seeds])
    return markdown(["", *columns, "s to decide", "seeds"], lines)


def pairs(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of a Markdown table of paired differences; composed ones against the best single."""
    yield "| worse - better | at | KL | in SE | by seed | gap closed: KL, perplexity |\n" + "|---" * 6 + "|"
    for at in COLUMNS:
        wanted = [*(PATTERN_PAIRS if ":" in at else PAIRS)]
        found = {row: [*each.values()] for row in EVERY if (each := cells_at(cells, row, at))}
        means = {row: divergence_of(each)[0] for row, each in found.items()}
        if ":" not in at and (single := [row for row in means if "+" not in row]):
            best = min(single, key=means.__getitem__)
            wanted += [(best, row) for row in means if "+" in row]
        for worse, better in dict.fromkeys(wanted):  # a best one may be in a named pair already
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
    """Yield the rows of a table: ARMOR's losses to NoWag's, other errors to SparseGPT's."""
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


def continuations(kept: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of what each model writes after each prompt, where it was asked."""
    cells = [cell for cell in kept["cells"] if "written" in cell and cell["sparsity"] in SHOWN]
    if not cells:
        return
    order = [(at, row) for at in SHOWN for row in EVERY]
    cells.sort(key=lambda cell: order.index((cell["sparsity"], cell["row"])))
    lines = [["dense", *kept["dense"]["written"]]]
    lines += [[f"{cell['row']}, {cell['sparsity']}", *cell["written"]] for cell in cells]
    safe = [[" ".join(text.replace("|", "/").split()) for text in line] for line in lines]
    yield "The likeliest continuations:"
    yield markdown(["", *(f"{prompt} ..." for prompt in kept["prompts"])], safe)


def section(kept: Mapping[str, Any]) -> str:
    """Return all figures of one model."""
    parts = [f"### {kept['model']}", f"![Perplexity against the weights that are left]({file_of(kept)})"]
    parts.append(
        f"{kept['protocol']}. {kept['processor']}, 1 thread, {kept['date']}. Dense: "
        f"{kept['parameters'] / 1e6:.2f} M parameters, {kept['linears'] / 1e6:.2f} M of them in the linears "
        f"of the blocks. {kept.get('about', '')}"
    )
    parts += [table(kept), "\n".join(pairs(kept["cells"]))]
    if lines := [*losses(kept["cells"])]:
        parts.append("\n".join([LOSSES, *lines]))
    return "\n\n".join([*parts, *continuations(kept)])


LEGEND = """
A cell: perplexity (with the share of right answers where questions were asked), in brackets mean nats of
KL(dense || pruned) per token ± standard error over windows. s to decide: the processor's seconds of
calibrating and solving, the median over the row. Smaller: so much of the
blocks' parameters leaves the files, whichever kinds of unit a method removes (cfsp: channels); elsewhere
zeros. In pairs: by how much KL falls, the same in standard errors of the paired windows, and the share of
the way back to dense."""


def together(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what is kept of each model; the cells of files of one model and protocol stand together."""
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        one = json.loads(path.read_text())
        known = found.setdefault(one["model"], one)
        if known["protocol"] != one["protocol"]:
            raise SystemExit(f"{path}: {one['model']} was measured with another protocol")
        if known is not one:
            known["cells"] += one["cells"]
            known["date"] = max(known["date"], one["date"])
    return [*found.values()]


def main() -> None:
    """Print the tables of several models; with --write, put them and their plots where they are read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put them into README.md, the plots beside it")
    parser.add_argument("--plots", type=Path, help="a folder to put the plots into")
    options = parser.parse_args()
    kept = together(options.files)
    said = "\n\n".join([LEGEND.strip().replace("\n", " "), *map(section, kept)])
    print(said)
    if options.write:
        write_section("quality.py", said, others_stay=True)
    for folder in filter(None, (options.plots, README.parent if options.write else None)):
        for one in kept:
            draw(one, folder / file_of(one))


if __name__ == "__main__":
    main()
