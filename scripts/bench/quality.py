"""Every weight pruner side by side on a trained model: divergence from dense, perplexity, right answers.

Protocol: windows of held-out text without overlap, spread evenly over it; mean KL(dense || pruned) per token
with its standard error over windows. Each seed draws other calibration samples, and other random scores.
Methods are compared window by window, a window's divergence averaged over the seeds that both have, so what
a window makes hard for all of them cancels. Everything happens in memory, in float32.

With --questions N, lm-eval's accuracy stands beside it: over the demo's own tasks, or for a text over N times
choosing in which of four orders its next words stand.

    python scripts/bench/quality.py --model demo --json /tmp/demo.json --plots /tmp

The JSON is rewritten after every cell; a second call with the same file measures only what it lacks.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cells import Cell, held_out_of, kept_cells
from quality_tables import (
    EQUAL_BYTES,
    ROWS,
    SPARSITIES,
    accuracy_of,
    cells_at,
    draw,
    losses,
    pairs,
    perplexity_of,
    table,
    told,
)
from transformers import PreTrainedTokenizerBase

from structprune.calibration import data
from structprune.calibration.text_source import TextSource
from structprune.checkpoint.locate import resolve
from structprune.demo.tasks import MULTIPLE_CHOICE, write_choices, write_tasks
from structprune.demo.world import HELD_OUT_SEED, text
from structprune.evaluation.harness import harness, metrics
from structprune.evaluation.perplexity import Windows, score
from structprune.models.arch import all_linears
from structprune.models.opening import Opening
from structprune.models.streamed import Model, open_model
from structprune.models.tokenizer import open_tokenizer
from structprune.pruners.catalogue import find

MOST_OVERHEAD = 0.125
# Words that a question shows, words in each of its answers, and answers.
SHOWN, ANSWER, CHOICES = 48, 8, 4


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
    tasks: list[str]
    questions: Path

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
            TextSource(self.calibration),
            self.tokenizer,
            samples=self.samples,
            length=length,
            seed=seed,
            batch_size=16,
        )
        model = open_model(self.folder, Opening(dtype="float32"))
        begin = time.process_time()
        plan = stage.calibrate(model, found.batches)
        seconds = time.process_time() - begin
        pruned = stage.apply(model, plan)
        scores = score(pruned, self.held_out, dense=self.dense, batch_size=16)
        facts = [block.facts.get("matrices", {}) for block in plan.blocks]
        matrices = {label: _losses(found) for block in facts for label, found in block.items()}
        cell = {"row": row, "sparsity": sparsity, "seed": seed, "fields": fields, "matrices": matrices}
        cell |= {"calibration_cpu_seconds": seconds, "windows": scores.kl, "tokens": scores.tokens}
        cell |= {"kl": scores.mean(scores.kl), "kl_se": scores.error(scores.kl)}
        cell["perplexity"] = math.exp(scores.mean(scores.model))
        if self.tasks:
            cell["accuracy"] = self.accuracy(pruned)
        return cell | {"dense_perplexity": math.exp(scores.mean(scores.dense))}

    def accuracy(self, model: Model) -> tuple[float, float]:
        """Return the share of right answers, averaged over the tasks, and its standard error."""
        found = harness(model, self.tokenizer, self.tasks, include_path=self.questions, batch_size=32)
        tasks = metrics(found).values()
        errors = math.fsum(float(each["acc_stderr"] or 0) ** 2 for each in tasks)
        return fmean(float(each["acc"] or 0) for each in tasks), math.sqrt(errors) / len(tasks)


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


def write_questions(folder: Path, path: str | None, count: int) -> list[str]:
    """Write lm-eval tasks and return their names: the demo's, or in which order a text's words go on."""
    if path is None:
        write_tasks(folder, size=count)
        return [*MULTIPLE_CHOICE]
    words = " ".join(data.pieces(TextSource(path))).split()
    draw, length = Random(0), SHOWN + ANSWER
    rows = []
    for place in draw.sample(range(len(words) // length), count):
        piece = words[place * length : (place + 1) * length]
        orders = [piece[SHOWN:], *(draw.sample(piece[SHOWN:], ANSWER) for _ in range(CHOICES - 1))]
        answer = draw.randrange(CHOICES)
        orders[0], orders[answer] = orders[answer], orders[0]
        choices = [" " + " ".join(order) for order in orders]
        rows.append({"prompt": " ".join(piece[:SHOWN]), "choices": choices, "answer": answer})
    write_choices(folder, "word_order", rows)
    return ["word_order"]


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
    parser.add_argument("--questions", type=int, default=0, help="per task of lm-eval; 0 asks none")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plots", type=Path)
    options = parser.parse_args()
    folder = resolve(options.model)
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    dense = open_model(folder, Opening(dtype="float32"))
    pieces = [text(HELD_OUT_SEED, 200_000)] if options.text is None else data.pieces(TextSource(options.text))
    held_out = held_out_of(pieces, tokenizer, options.windows, options.length)
    wrapper, overhead = wrapper_of(dense)
    asked = TemporaryDirectory()
    tasks = write_questions(Path(asked.name), options.text, options.questions) if options.questions else []
    bench = Bench(
        folder=folder,
        tokenizer=tokenizer,
        dense=dense,
        held_out=held_out,
        calibration=options.calibration,
        samples=options.samples,
        wrapper=wrapper,
        overhead=overhead,
        tasks=tasks,
        questions=Path(asked.name),
    )
    protocol = (
        f"{options.windows} windows of {options.length} tokens ({held_out.scored} scored), "
        f"{options.samples} samples, float32, torch {torch.__version__}; "
        f"armor's wrappers {wrapper} x {wrapper}, {overhead:.1%} of the linears' parameters"
    )
    kept = kept_cells(options.json, protocol)
    cells: list[Cell] = kept["cells"]
    for seed, at, row in product(options.seeds, options.sparsities, options.methods):
        done = {
            number: cell
            for number, cell in cells_at(cells, row, at).items()
            if "accuracy" in cell or not options.questions
        }
        if seed in done:
            continue
        # Magnitude has no seed: what was measured once holds for every one.
        known = next(iter(done.values()), None) if row == "magnitude" else None
        if cell := known | {"seed": seed} if known else bench.measure(row, at, seed):
            cells = [one for one in cells if (one["row"], one["sparsity"], one["seed"]) != (row, at, seed)]
            cells.append(cell)
            kept["cells"] = cells
            options.json.write_text(json.dumps(kept))
    print(f"{protocol}; dense perplexity {cells[0]['dense_perplexity']:.4g}")
    perplexities = table(cells, lambda each: f"{perplexity_of(each):.4g}")
    tables = [table(cells, told), perplexities, pairs(cells), losses(cells)]
    if options.questions:
        kept.setdefault("dense_accuracy", bench.accuracy(dense))
        kept["questions"] = options.questions
        options.json.write_text(json.dumps(kept))
        print("dense accuracy {:.1%} ± {:.1%}".format(*kept["dense_accuracy"]))
        tables.append(table(cells, accuracy_of))
    for lines in tables:
        print("", *lines, sep="\n")
    if options.plots:
        draw(cells, options.plots / f"{Path(options.model).name}.png", protocol)


if __name__ == "__main__":
    main()
