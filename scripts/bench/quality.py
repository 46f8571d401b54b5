"""Every weight pruner side by side on a trained model: divergence from dense, perplexity, right answers.

Protocol: windows of held-out text without overlap, spread evenly over it, or with --first its first ones;
mean KL(dense || pruned) per token with its standard error over windows. Each seed draws other calibration
samples, and other random scores. Methods are compared window by window, a window's divergence averaged over
the seeds that both have, so what a window makes hard for all of them cancels. The best structure methods
stand beside them, where the model is smaller. Everything happens in memory, in float32.

With --questions N, lm-eval's accuracy stands beside it: over the demo's own tasks, or for a text over N times
choosing in which of four orders its next words stand. With --continued N, every model writes N tokens after
each of three prompts.

    python scripts/bench/quality.py --model demo --json /tmp/demo.json
    python scripts/bench/quality_tables.py /tmp/demo.json --write

The JSON is rewritten after every cell; a second call with the same file measures only what it lacks. Several
calls at once take a file each; the tables take them together. The cells of a real model are in smollm2.json.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from cells import Cell, held_out_of, kept_cells
from judged import Judged, written
from quality_rows import ALL_UNITS, EQUAL_BYTES, ROWS, SMALLER, SPARSITIES, UNITS, cells_at
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from structprune.calibration import data
from structprune.calibration.text_source import TextSource
from structprune.checkpoint.locate import resolve
from structprune.demo.tasks import MULTIPLE_CHOICE, write_choices, write_tasks
from structprune.demo.world import HELD_OUT_SEED, text
from structprune.evaluation.harness import harness, metrics
from structprune.machine import environment
from structprune.models.arch import all_linears
from structprune.models.cost import parameters_of
from structprune.models.opening import Opening
from structprune.models.streamed import Model, open_model
from structprune.models.tokenizer import open_tokenizer
from structprune.pruners.catalogue import find

MOST_OVERHEAD = 0.125
# Words that a question shows, words in each of its answers, and answers.
SHOWN, ANSWER, CHOICES = 48, 8, 4
# Tokens of one forward, to bound the memory of a batch.
TOGETHER = 4096
PROMPTS = (
    "The city of Rome was founded",
    "Water boils when",
    "In 1969 , the first men walked on the Moon . They",
)


@dataclass(frozen=True)
class Bench:
    """One model, and what its prunings are held against.

    Attributes:
        folder: The model's.
        tokenizer: The model's.
        dense: In memory.
        judged: The held-out windows.
        calibration: What is calibrated on, as a source.
        samples: How many samples of it.
        length: Tokens of a sample.
        wrapper: Side of ARMOR's wrapper blocks.
        overhead: What they add to the linears.
        tasks: lm-eval's.
        questions: The folder of the tasks.
        continued: Tokens that are written after each prompt.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    dense: PreTrainedModel
    judged: Judged
    calibration: str
    samples: int
    length: int
    wrapper: int
    overhead: float
    tasks: list[str]
    questions: Path
    continued: int

    def open(self) -> PreTrainedModel:
        """Return a fresh copy of the model."""
        model = open_model(self.folder, Opening(dtype="float32", stream=False))
        assert isinstance(model, PreTrainedModel)
        return model

    def fields(self, row: str, sparsity: str, seed: int) -> dict[str, Any] | None:
        """Return a row's fields at a sparsity; None where it says nothing there that another row does not."""
        if (row in UNITS) != (sparsity in SMALLER):
            return None
        method, fields = UNITS[row] if row in UNITS else ROWS[row]
        pattern = ":" in sparsity
        only_patterns = method == "armor" or row == EQUAL_BYTES
        # N:M leaves a budget nothing to share out.
        if (only_patterns and not pattern) or (pattern and "budget" in fields):
            return None
        found = {**fields, "sparsity": self.share(method, fields, sparsity) if row in UNITS else sparsity}
        if row == EQUAL_BYTES:
            # 16 bits a kept value and one bit a position, which is as much as 2 bits for each value of 2:4.
            kept, of = map(int, sparsity.split(":"))
            found["sparsity"] = str(round(1 - kept / of - self.overhead, 6))
        own = {
            "armor": {"wrapper_size": self.wrapper},
            "random": {"seed": seed},
            "random_units": {"seed": seed},
        }
        return found | own.get(method, {})

    def share(self, method: str, fields: dict[str, Any], size: str) -> str:
        """Return the share of a method's units that must leave, so that every row is as small."""

        def parameters(name: str, more: dict[str, Any]) -> int:
            return find(name).model_validate({**more, "sparsity": SMALLER[size]}).forecast(self.dense).of

        return str(round(SMALLER[size] * parameters(ALL_UNITS, {}) / parameters(method, fields), 6))

    def measure(self, row: str, sparsity: str, seed: int) -> Cell | None:
        """Prune a fresh copy and score it; None where the row has no answer."""
        if (fields := self.fields(row, sparsity, seed)) is None:
            return None
        stage = find((UNITS | ROWS)[row][0]).model_validate(fields)
        found = data.load(
            TextSource(self.calibration),
            self.tokenizer,
            samples=self.samples,
            length=self.length,
            seed=seed,
            batch_size=max(1, TOGETHER // self.length),
        )
        model = self.open()
        begin = time.process_time()
        plan = stage.calibrate(model, found.batches)
        seconds = time.process_time() - begin
        pruned = stage.apply(model, plan)
        assert isinstance(pruned, PreTrainedModel)
        facts = [block.facts.get("matrices", {}) for block in plan.blocks]
        matrices = {label: _losses(found) for block in facts for label, found in block.items()}
        cell = {"row": row, "sparsity": sparsity, "seed": seed, "fields": fields, "matrices": matrices}
        return cell | {"calibration_cpu_seconds": seconds} | self.facts(pruned)

    def facts(self, pruned: PreTrainedModel) -> Cell:
        """Return what is measured of a pruned model."""
        scores = self.judged.score(pruned)
        cell: Cell = {"windows": scores.kl, "tokens": scores.tokens}
        cell |= {"kl": scores.mean(scores.kl), "kl_se": scores.error(scores.kl)}
        cell["perplexity"] = math.exp(scores.mean(scores.model))
        cell["dense_perplexity"] = math.exp(scores.mean(scores.dense))
        cell["top1"] = scores.mean(scores.agree)
        cell["parameters"] = parameters_of(pruned)
        if self.tasks:
            cell["accuracy"] = self.accuracy(pruned)
        return cell | ({"written": self.continuations(pruned)} if self.continued else {})

    def accuracy(self, model: Model) -> tuple[float, float]:
        """Return the share of right answers, averaged over the tasks, and its standard error."""
        found = harness(model, self.tokenizer, self.tasks, include_path=self.questions, batch_size=32)
        tasks = metrics(found).values()
        errors = math.fsum(float(each["acc_stderr"] or 0) ** 2 for each in tasks)
        return fmean(float(each["acc"] or 0) for each in tasks), math.sqrt(errors) / len(tasks)

    def continuations(self, model: PreTrainedModel) -> list[str]:
        """Return the likeliest continuation of each prompt."""
        prompts = [self.tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
        found = [written(model, ids, self.continued)[0] for ids in prompts]
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]


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


def bench_of(options: argparse.Namespace, questions: Path) -> tuple[Bench, dict[str, Any]]:
    """Open the model and ask it about the text; return what else is known of both as well."""
    folder = resolve(options.model)
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    dense = open_model(folder, Opening(dtype="float32", stream=False))
    assert isinstance(dense, PreTrainedModel)
    pieces = [text(HELD_OUT_SEED, 200_000)] if options.text is None else data.pieces(TextSource(options.text))
    length = options.window or options.length
    held_out = held_out_of(pieces, tokenizer, options.windows, length, first=options.first)
    wrapper, overhead = wrapper_of(dense)
    tasks = write_questions(questions, options.text, options.questions) if options.questions else []
    bench = Bench(
        folder=folder,
        tokenizer=tokenizer,
        dense=dense,
        judged=Judged(dense, held_out, max(1, TOGETHER // length)),
        calibration=options.calibration,
        samples=options.samples,
        length=options.length,
        wrapper=wrapper,
        overhead=overhead,
        tasks=tasks,
        questions=questions,
        continued=options.continued,
    )
    versions = environment()["versions"]
    protocol = (
        f"{'the first ' if options.first else ''}{options.windows} windows of {length} tokens of "
        f"{Path(options.text or 'demo').name} ({held_out.scored} scored), {options.samples} calibration "
        f"samples of {options.length} tokens of {Path(options.calibration).name}, float32, torch "
        f"{versions['torch']}, transformers {versions['transformers']}; armor's wrappers "
        f"{wrapper} x {wrapper}, {overhead:.1%} of the linears' parameters"
    )
    known = {"protocol": protocol, "model": Path(options.model).name, "parameters": parameters_of(dense)}
    known["linears"] = sum(linear.weight.numel() for block in all_linears(dense) for linear in block)
    known["prompts"] = [*PROMPTS]
    known |= {"processor": environment()["machine"]["processor"], "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    return bench, known | ({"about": options.about} if options.about else {})


def main() -> None:
    """Measure what the JSON lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="demo", help="a text file")
    parser.add_argument("--text", help="held-out text file; the demo's own unless given")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *UNITS], default=[*ROWS, *UNITS], metavar="ROW")
    every = [*SPARSITIES, *SMALLER]
    parser.add_argument("--sparsities", nargs="*", choices=every, default=every, metavar="SPARSITY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, number in {"samples": 64, "windows": 64, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--window", type=int, help="tokens of a scored window; --length unless given")
    parser.add_argument("--first", action="store_true", help="score the first windows of the text")
    parser.add_argument("--questions", type=int, default=0, help="per task of lm-eval; 0 asks none")
    parser.add_argument("--continued", type=int, default=0, help="tokens written after each prompt")
    parser.add_argument("--about", help="a sentence on the model, which stands beside its figures")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    asked = TemporaryDirectory()
    bench, known = bench_of(options, Path(asked.name))
    kept = kept_cells(options.json, known["protocol"]) | known
    cells: list[Cell] = kept["cells"]
    if "dense" not in kept:
        kept["dense"] = bench.facts(bench.dense)
    for seed, at, row in product(options.seeds, options.sparsities, options.rows):
        done = {
            number: cell
            for number, cell in cells_at(cells, row, at).items()
            if "accuracy" in cell or not options.questions
        }
        if seed in done:
            continue
        # Magnitude has no seed: what was measured once holds for every one.
        known_cell = next(iter(done.values()), None) if row == "magnitude" else None
        if cell := known_cell | {"seed": seed} if known_cell else bench.measure(row, at, seed):
            cells = [one for one in cells if (one["row"], one["sparsity"], one["seed"]) != (row, at, seed)]
            cells.append(cell)
            options.json.write_text(json.dumps(kept | {"cells": cells}))
            print(f"{row} at {at}: perplexity {cell['perplexity']:.4g}, KL {cell['kl']:.4g}", flush=True)


if __name__ == "__main__":
    main()
