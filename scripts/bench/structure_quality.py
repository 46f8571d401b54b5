"""Structure pruners side by side on a trained model: divergence, perplexity, size, speed, and what it writes.

Protocol: every row calibrates on the same samples. Windows of two texts without overlap are scored: one to
choose a composition on, one to report. Mean KL(dense || pruned) per token with its standard error over
windows; rows are compared window by window. Rows of width are asked for the same number of parameters,
whatever kinds of unit they remove; those of depth for their share of blocks or attentions. Speed is that of
interleaved rounds with the dense model, one prompt on one thread, in the processor's seconds. Prompts are
continued greedily: how many tokens agree with the dense model's before the first that does not, and how many
of the groups of four tokens stood there before. Everything happens in memory, in float32.

    python scripts/bench/structure_quality.py --model demo --json /tmp/demo.json
    python scripts/bench/structure_quality_tables.py /tmp/demo.json --write

The JSON is rewritten after every cell; a second call with the same file measures only what it lacks.
"""

import json
import math
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cells import Cell, held_out_of, kept_cells
from judged import Judged, written
from structure_rows import ROWS
from torch import Tensor
from transformers import PreTrainedModel

from structprune.calibration import data
from structprune.calibration.text_source import TextSource
from structprune.checkpoint.locate import resolve
from structprune.demo.world import HELD_OUT_SEED, TUNING_SEED, text
from structprune.evaluation.speed import Spread, Workload, prompts
from structprune.machine import environment
from structprune.models.cost import parameters_of
from structprune.models.identity import stored_dtypes, weights_of
from structprune.models.opening import Opening
from structprune.models.shapes import cache_entry
from structprune.models.streamed import Batch, open_model
from structprune.models.tokenizer import open_tokenizer
from structprune.pruners.catalogue import find
from structprune.pruners.pruner import Pruner

# The row whose units all rows of width are held against.
ALL_UNITS = "random_units"
# Tokens that are scored in one forward.
TOGETHER = 2048
# Tokens of a prompt, and of what is written after it; a repetition is a group of so many tokens.
PROMPT, WRITTEN, GROUP = 32, 48, 4
DECODED = 16


@dataclass(frozen=True)
class Bench:
    """One model, and what its prunings are held against.

    Attributes:
        folder: The model's.
        dense: In memory.
        batches: What is calibrated on.
        choose: The text to choose a composition on.
        report: The text that is reported.
        prompts: What is continued, shape [prompts, tokens].
        written: How the dense model goes on.
        load: What is timed; nothing where it has no rounds.
    """

    folder: Path
    dense: PreTrainedModel
    batches: list[Batch]
    choose: Judged
    report: Judged
    prompts: Tensor
    written: list[list[int]]
    load: Workload

    def open(self) -> PreTrainedModel:
        """Return a fresh copy of the model."""
        model = open_model(self.folder, Opening(dtype="float32", stream=False))
        assert isinstance(model, PreTrainedModel)
        return model

    def stage(self, row: str, sparsity: float) -> Pruner:
        """Return the pruner of a row; one of fewer kinds of unit removes a larger share of them."""
        one = ROWS[row]
        pruner = find(one.method).model_validate({**one.fields, "sparsity": sparsity})
        if not one.width:
            return pruner
        everything = find(ALL_UNITS).model_validate({"sparsity": sparsity}).forecast(self.dense).of
        share = sparsity * everything / pruner.forecast(self.dense).of
        return pruner.with_goal(round(share, 6))

    def prune(self, row: str, sparsities: Sequence[float]) -> Iterator[tuple[PreTrainedModel, Cell]]:
        """Look at the model once, then yield it pruned to every sparsity, with what is known of it so far."""
        model = self.open()
        stages = [self.stage(row, sparsity) for sparsity in sparsities]
        weights = weights_of(model)
        wanted = [(stage, stage.writer(None, model, weights)) for stage in stages]
        began = time.process_time()
        plans = stages[0].calibrate_each(model, self.batches, wanted)
        seconds = time.process_time() - began
        for sparsity, stage, plan in zip(sparsities, stages, plans, strict=True):
            pruned = stage.apply(self.open(), plan)
            assert isinstance(pruned, PreTrainedModel)
            cell = {"row": row, "sparsity": sparsity, "fields": stage.model_dump(mode="json")}
            cell |= {"calibration_cpu_seconds": seconds, "calibrated_for": len(sparsities)}
            if ROWS[row].composition:
                choose = self.choose.score(pruned)
                cell["choose"] = {"windows": choose.kl, "tokens": choose.tokens, "kl": choose.mean(choose.kl)}
            yield pruned, cell

    def measure(self, row: str, sparsities: Sequence[float]) -> Iterator[Cell]:
        """Yield the cell of every sparsity."""
        for pruned, cell in self.prune(row, sparsities):
            yield cell | self.facts(pruned)

    def facts(self, pruned: PreTrainedModel) -> Cell:
        """Return what is measured of a pruned model."""
        report = self.report.score(pruned)
        cell: Cell = {"windows": report.kl, "tokens": report.tokens, "kl": report.mean(report.kl)}
        cell["perplexity"] = math.exp(report.mean(report.model))
        cell["dense_perplexity"] = math.exp(report.mean(report.dense))
        cell["parameters"] = parameters_of(pruned)
        cell["blocks"] = _block_parameters(pruned) / _block_parameters(self.dense)
        mine = written(pruned, self.prompts, WRITTEN)
        cell["agreement"] = [agreement(*pair) for pair in zip(self.written, mine, strict=True)]
        cell["repetition"] = fmean(map(repetition, mine))
        return cell | (self.speed(pruned) if self.load.repeats else {})

    def speed(self, pruned: PreTrainedModel) -> Cell:
        """Return how many times faster a model is, in rounds that alternate with the dense one."""
        ids, models = prompts(self.dense.config, self.load, 1), (self.dense, pruned)
        for model in models:
            processor_seconds(model, ids, 1)
        rounds = [
            [processor_seconds(model, ids, self.load.new) for model in models]
            for _ in range(self.load.repeats)
        ]
        spreads = [Spread.of([dense[at] / mine[at] for dense, mine in rounds]) for at in (0, 1)]
        prefill, decode = ([one.median, one.low, one.high] for one in spreads)
        return {"prefill": prefill, "decode": decode}


@torch.no_grad()
def processor_seconds(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[float, float]:
    """Return the processor's seconds for a prompt, and for what follows, where others do not show."""
    began = time.process_time()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    read = time.process_time()
    for _ in range(new):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, **cache_entry(output), use_cache=True)
    return read - began, time.process_time() - read


def _block_parameters(model: PreTrainedModel) -> int:
    """Return the parameters that are no token's own."""
    vocabulary = model.config.get_text_config().vocab_size
    return parameters_of(model) - sum(one.numel() for one in model.parameters() if len(one) == vocabulary)


def agreement(dense: Sequence[int], mine: Sequence[int]) -> int:
    """Return how many tokens two continuations share before they part."""
    return next((place for place, pair in enumerate(zip(dense, mine)) if pair[0] != pair[1]), len(dense))


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of groups of tokens that stood in the continuation before."""
    groups = [*zip(*(tokens[start:] for start in range(GROUP)))]
    return 1 - len({*groups}) / len(groups)


def texts_of(options: Namespace, folder: Path) -> tuple[str, str, str]:
    """Return what is calibrated on, as a source, and the texts to choose on and to report.

    A text file serves both: its first half is calibrated on, the second one is chosen on.
    """
    if options.valid is None or options.text is None:
        return "demo", text(TUNING_SEED, 200_000), text(HELD_OUT_SEED, 200_000)
    lines = options.valid.read_text(encoding="utf-8").splitlines(keepends=True)
    first = folder / "first_half.txt"
    first.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    return str(first), "".join(lines[len(lines) // 2 :]), options.text.read_text(encoding="utf-8")


def bench_of(options: Namespace) -> Bench:
    """Open the model and ask it about the texts."""
    folder = resolve(options.model)
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    dense = open_model(folder, Opening(dtype="float32", stream=False))
    assert isinstance(dense, PreTrainedModel)
    with TemporaryDirectory() as place:
        source, *texts = texts_of(options, Path(place))
        found = data.load(
            TextSource(source), tokenizer, samples=options.samples, length=options.length, batch_size=4
        )
    counts, window = (options.choose_windows, options.windows), options.window or options.length
    choose, report = (
        Judged(dense, held_out_of([one], tokenizer, count, window), max(1, TOGETHER // window))
        for one, count in zip(texts, counts, strict=True)
    )
    begun = held_out_of([texts[1]], tokenizer, options.prompts, PROMPT).inputs
    timed = options.timed or options.length
    room = min(timed, data.positions(dense.config) or timed) - DECODED
    load = Workload(room, DECODED, (1,), options.rounds)
    said = written(dense, begun, WRITTEN)
    return Bench(folder, dense, found.batches, choose, report, begun, said, load)


def protocol_of(options: Namespace, bench: Bench) -> str:
    """Return all that decides what a cell holds, but for its row and sparsity."""
    versions, text = environment()["versions"], options.text.name if options.text else "demo"
    choose = f"the second half of {options.valid.name}" if options.valid else "demo, tuning"
    source = f"the first half of {options.valid.name}" if options.valid else "demo"
    timed = f"timed {bench.load.length} + {DECODED} tokens, {options.rounds} rounds"
    timed = timed if options.rounds else "not timed"
    window = options.window or options.length
    return (
        f"{options.windows} windows of {window} tokens of {text}; compositions chosen on "
        f"{options.choose_windows} of {choose}; {options.samples} calibration samples of {options.length} "
        f"tokens of {source}; {options.prompts} prompts of {PROMPT} tokens, continued by {WRITTEN}; "
        f"{timed}; float32, torch "
        f"{versions['torch']}, transformers {versions['transformers']}"
    )


def parser_of(description: str | None, rows: Sequence[str], sparsities: Sequence[float]) -> ArgumentParser:
    """Return what reads the arguments: a model, its texts, what is measured of which rows, and the file."""
    parser = ArgumentParser(description=description, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--valid", type=Path, help="text file to calibrate and to choose on; else the demo's")
    parser.add_argument("--text", type=Path, help="held-out text file; the demo's own unless given")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*rows], metavar="ROW")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[*sparsities])
    numbers = {"samples": 16, "windows": 16, "choose-windows": 16, "length": 512, "prompts": 8, "rounds": 5}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--window", type=int, help="tokens of a scored window; --length unless given")
    parser.add_argument("--timed", type=int, help="tokens of a timed round; --length unless given")
    parser.add_argument("--json", type=Path, required=True)
    return parser


def facts_of(model: str, bench: Bench) -> dict[str, Any]:
    """Return what is known of the dense model and the machine."""
    return {
        "model": Path(model).name,
        "processor": environment()["machine"]["processor"],
        "parameters": parameters_of(bench.dense),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "itemsize": max(dtype.itemsize for dtype in stored_dtypes(bench.dense).values()),
        "repetition": fmean(map(repetition, bench.written)),
    }


def main() -> None:
    """Measure what the JSON lacks."""
    options = parser_of(__doc__, [*ROWS], (0.2, 0.3, 0.5)).parse_args()
    torch.set_num_threads(1)
    bench = bench_of(options)
    kept = kept_cells(options.json, protocol_of(options, bench)) | facts_of(options.model, bench)
    for row in options.rows:
        done = {cell["sparsity"] for cell in kept["cells"] if cell["row"] == row}
        if missing := [one for one in options.sparsities if one not in done]:
            for cell in bench.measure(row, missing):
                kept["cells"].append(cell)
                options.json.write_text(json.dumps(kept))
                print(
                    f"{row} at {cell['sparsity']}: perplexity {cell['perplexity']:.4g}, KL {cell['kl']:.4g}"
                )


if __name__ == "__main__":
    main()
