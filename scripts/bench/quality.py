"""Every weight pruner side by side on a trained model: divergence from dense over held-out text, perplexity.

Protocol: windows of held-out text without overlap, spread evenly over it; mean KL(dense || pruned) per token
with its standard error over windows. Each seed draws other calibration samples, and other random scores.
Methods are compared window by window, a window's divergence averaged over the seeds that both have, so what
a window makes hard for all of them cancels. Everything happens in memory, in float32.

    python scripts/bench/quality.py --model demo --json /tmp/demo.json --plots /tmp

The JSON is rewritten after every cell; a second call with the same file measures only what it lacks.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from methods import difference
from transformers import PreTrainedTokenizerBase

from structprune.calibration import data
from structprune.checkpoint.source import resolve
from structprune.demo.world import HELD_OUT_SEED, text
from structprune.evaluate.perplexity import Windows, score, windows_of
from structprune.models.arch import all_linears
from structprune.models.streamed import Model, open_model
from structprune.models.tokenizer import open_tokenizer
from structprune.pruner import find
from structprune.report.plots import PALETTE

Cell = dict[str, Any]

SPARSITIES = ("0.3", "0.5", "0.6", "0.7", "2:4", "4:8")
EQUAL_BYTES = "sparsegpt, armor's bytes"
# By row: the method, and the fields that are not its defaults. The first rows are each from one paper (OWL
# is one), those with a plus from several. N:M leaves a budget nothing to do: it is left out there.
SINGLE = ("random", "magnitude", "wanda", "gblm", "ria", "nowag", "sparsegpt", "alps")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SINGLE} | {
    "owl (wanda)": ("wanda", {"budget": "owl"}),
    "owl (sparsegpt)": ("sparsegpt", {"budget": "owl"}),
    "wanda + owl + least_squares": ("wanda", {"budget": "owl", "repair": "least_squares"}),
    "alps + owl": ("alps", {"budget": "owl"}),
    "armor": ("armor", {}),
    "armor, gram": ("armor", {"proxy": "gram"}),
    EQUAL_BYTES: ("sparsegpt", {}),
}
# What is compared: worse, better; where they are unstructured, and where they are N:M.
PAIRS = (("magnitude", "wanda"), ("wanda", "sparsegpt"))
PATTERN_PAIRS = tuple(product(("nowag", "sparsegpt", EQUAL_BYTES), ("armor", "armor, gram")))
MOST_OVERHEAD = 0.125


@dataclass(frozen=True)
class Bench:
    """One model, its texts, and the side of ARMOR's wrapper blocks with what they add to the linears."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    dense: Model
    held_out: Windows
    calibration: str
    samples: int
    wrapper: int
    overhead: float

    def fields(self, row: str, sparsity: str, seed: int) -> dict[str, Any] | None:
        """Return a row's fields at a sparsity; None where it says nothing there that another row does not."""
        method, fields = ROWS[row]
        pattern = ":" in sparsity
        only_patterns = method == "armor" or row == EQUAL_BYTES
        if (only_patterns and not pattern) or (pattern and [*fields] == ["budget"]):
            return None
        found = {name: value for name, value in fields.items() if not (pattern and name == "budget")}
        found["sparsity"] = sparsity
        if row == EQUAL_BYTES:
            # 16 bits a kept value and one bit a position, which is as much as 2 bits for each value of 2:4.
            kept, of = map(int, sparsity.split(":"))
            found["sparsity"] = round(1 - kept / of - self.overhead, 6)
        own = {"armor": {"wrapper_size": self.wrapper}, "random": {"seed": seed}}
        return found | own.get(method, {})

    def measure(self, row: str, sparsity: str, seed: int) -> Cell | None:
        """Prune a fresh copy and score it; None where the row has no answer."""
        if (fields := self.fields(row, sparsity, seed)) is None:
            return None
        stage = find(ROWS[row][0]).model_validate(fields)
        length = self.held_out.inputs.shape[1]
        found = data.load(
            self.calibration, self.tokenizer, samples=self.samples, length=length, seed=seed, batch_size=16
        )
        model = open_model(self.folder, dtype="float32")
        begin = time.process_time()
        plan = stage.calibrate(model, found.batches)
        seconds = time.process_time() - begin
        scores = score(stage.apply(model, plan), self.held_out, dense=self.dense, batch_size=16)
        facts = [block.facts.get("matrices", {}) for block in plan.blocks]
        matrices = {label: _losses(found) for block in facts for label, found in block.items()}
        cell = {"row": row, "sparsity": sparsity, "seed": seed, "fields": fields, "matrices": matrices}
        cell |= {"calibration_cpu_seconds": seconds, "windows": scores.kl, "tokens": scores.tokens}
        cell |= {"kl": scores.mean(scores.kl), "kl_se": scores.error(scores.kl)}
        cell["perplexity"] = math.exp(scores.mean(scores.model))
        return cell | {"dense_perplexity": math.exp(scores.mean(scores.dense))}


def _losses(facts: Mapping[str, Any]) -> dict[str, float]:
    found = {name: facts[name] for name in ("error", "nowag_loss") if name in facts}
    return found | ({"armor_loss": facts["losses"][-1]} if "losses" in facts else {})


def wrapper_of(model: Model) -> tuple[int, float]:
    """Return the largest power of two that fits every linear and the overhead allowed, and its overhead."""
    shapes = [linear.weight.shape for block in all_linears(model) for linear in block]
    per_side = sum(map(sum, shapes)) / sum(map(math.prod, shapes))
    common = math.gcd(*(side for shape in shapes for side in shape))
    size = max(s for s in (8, 16, 32, 64, 128) if common % s == 0 and s * per_side <= MOST_OVERHEAD)
    return size, size * per_side


def held_out_of(path: str | None, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Windows:
    """Return `count` windows spread evenly over a text; the demo's own held-out text where path is None."""
    pieces: Iterable[str] = [text(HELD_OUT_SEED, 200_000)] if path is None else data.pieces(path)
    every = windows_of(data.encode(pieces, tokenizer), length, first=data.opening(tokenizer).window)
    step = len(every.inputs) // count
    if not step:
        raise SystemExit(f"the text has only {len(every.inputs)} windows of {length} tokens")
    picked = slice(0, count * step, step)
    return Windows(every.inputs[picked], every.starts[picked])


def cells_at(cells: Sequence[Cell], row: str, sparsity: str) -> dict[int, Cell]:
    """Return the cells of a row at a sparsity, by seed."""
    return {cell["seed"]: cell for cell in cells if (cell["row"], cell["sparsity"]) == (row, sparsity)}


def pooled(cells: Sequence[Cell]) -> list[float]:
    """Return each window's divergence, averaged over seeds."""
    return [fmean(window) for window in zip(*(cell["windows"] for cell in cells), strict=True)]


def divergence_of(cells: Sequence[Cell]) -> tuple[float, float]:
    """Return the mean KL over seeds and its standard error over windows."""
    tokens = cells[0]["tokens"]
    return difference(pooled(cells), [0.0] * len(tokens), tokens)


def perplexity_of(cells: Sequence[Cell]) -> float:
    """Return the mean perplexity over seeds."""
    return fmean(cell["perplexity"] for cell in cells)


def told(cells: Sequence[Cell]) -> str:
    """Return "mean ± standard error (seeds)", the error with two digits."""
    mean, error = divergence_of(cells)
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 4
    return f"{mean:.{digits}f} ± {error:.{digits}f} ({len(cells)})"


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


def main() -> None:
    """Measure what the JSON lacks, then print the tables and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="demo", help="a text file")
    parser.add_argument("--text", help="held-out text file; the demo's own unless given")
    parser.add_argument("--methods", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--sparsities", nargs="*", choices=SPARSITIES, default=[*SPARSITIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, number in {"samples": 64, "windows": 64, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plots", type=Path)
    options = parser.parse_args()
    folder = resolve(options.model)
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    dense = open_model(folder, dtype="float32")
    held_out = held_out_of(options.text, tokenizer, options.windows, options.length)
    wrapper, overhead = wrapper_of(dense)
    bench = Bench(folder, tokenizer, dense, held_out, options.calibration, options.samples, wrapper, overhead)
    protocol = (
        f"{options.windows} windows of {options.length} tokens ({held_out.scored} scored), "
        f"{options.samples} samples, float32, torch {torch.__version__}; "
        f"armor's wrappers {wrapper} x {wrapper}, {overhead:.1%} of the linears' parameters"
    )
    kept = json.loads(options.json.read_text()) if options.json.exists() else {"cells": []}
    if kept.get("protocol", protocol) != protocol:
        raise SystemExit(f"{options.json}: measured with another protocol, {kept['protocol']}")
    cells: list[Cell] = kept["cells"]
    for seed, at, row in product(options.seeds, options.sparsities, options.methods):
        same = cells_at(cells, row, at)
        if seed in same:
            continue
        # Magnitude has no seed: what was measured once holds for every one.
        known = next(iter(same.values()), None) if row == "magnitude" else None
        if cell := known | {"seed": seed} if known else bench.measure(row, at, seed):
            cells.append(cell)
            options.json.write_text(json.dumps({"protocol": protocol, "cells": cells}))
    print(f"{protocol}; dense perplexity {cells[0]['dense_perplexity']:.4g}")
    perplexities = table(cells, lambda each: f"{perplexity_of(each):.4g}")
    for lines in (table(cells, told), perplexities, pairs(cells), losses(cells)):
        print("", *lines, sep="\n")
    if options.plots:
        draw(cells, options.plots / f"{Path(options.model).name}.png", protocol)


if __name__ == "__main__":
    main()
