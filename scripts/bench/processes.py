"""What two processes save: the processor's seconds of the busier one beside those of one process alone.

    python scripts/bench/processes.py MODEL [--blocks 8] [--methods wanda,sparsegpt,alps,recover] [--write]
    python scripts/bench/processes.py MODEL --before CHECKOUT --methods wanda,sparsegpt

Two workers with one thread each take turns in every repeat: the first one alone on all data; both together on
all data, half each; and both at once, each for itself, on half of the data. Of a method it is `calibrate`
that is timed, all it reads and solves, resident; of recovery a few steps. Whoever waits for the other takes
no time of the processor: gloo sleeps, as the seconds inside its calls show. With --before nothing is shared:
one process of this checkout and one of another take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from figures import markdown, write_section
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from structprune.calibration import data
from structprune.calibration.text_source import TextSource
from structprune.evaluation.machine_rates import measure_rates
from structprune.evaluation.rates import Rates
from structprune.machine import machine
from structprune.models.opening import DTYPES
from structprune.pipeline.estimate import seconds_of
from structprune.pruners.catalogue import find
from structprune.pruners.demand import Sharing
from structprune.ranks import Ranks

GOALS = {"wanda": 1.8, "sparsegpt": 1.8, "alps": 1.6, "recover": 1.6}
ROOT = Path(__file__).parents[2]

Took = dict[str, float]
Row = dict[str, Any]


class Worker:
    """One of two processes that do as they are told, line by line; see `processes_worker.py`.

    Args:
        options: What the script was asked for.
        folder: The model.
        number: Which of the two.
        checkout: Whose structprune runs.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, number: int, checkout: Path = ROOT) -> None:
        script = Path(__file__).with_name("processes_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(number), str(options.batch), options.dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)},
        )

    def begin(self, method: str, way: str, meeting: Path) -> None:
        """Let it do something; what it took is asked for later."""
        assert self._process.stdin is not None
        print(json.dumps([method, way, str(meeting)]), file=self._process.stdin, flush=True)

    def end(self) -> Took:
        """Return the seconds that it took."""
        assert self._process.stdout is not None
        found: Took = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def prepare(options: argparse.Namespace, target: Path) -> None:
    """Save the first blocks of a model, and beside them the tokens to look at."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model.model.layers = model.model.layers[: options.blocks]
    model.config.num_hidden_layers = options.blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: options.blocks]
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = data.load(
        TextSource(options.text), tokenizer, samples=options.samples, length=options.length, batch_size=1
    )
    ids = torch.cat([one["input_ids"] for one in found.batches])
    save_file({"ids": ids}, target.with_name("ids.safetensors"))


def turns(options: argparse.Namespace, workers: Sequence[Worker], place: Path) -> None:
    """Let two workers do every method in every way, repeat by repeat; what each took is added to a file."""
    sizes = [options.blocks, options.samples, options.length]
    for repeat in range(options.repeats):
        for method in options.methods.split(","):
            row: Row = {"method": method, "sizes": sizes, "load": os.getloadavg()[0]}
            for way in options.ways.split(","):
                asked = workers[:1] if way == "alone" else workers
                for one in asked:
                    one.begin(method, way, place / f"{method}-{repeat}")
                row[way] = [one.end() for one in asked]
            with options.json.open("a") as file:
                print(json.dumps(row), file=file)


def estimates(options: argparse.Namespace, row: Row, rates: Rates) -> list[float]:
    """Return how many seconds of the processor one process is said to need, and the busier of two."""
    if row["method"] == "recover":
        return []
    blocks, samples, length = row["sizes"]
    config = AutoConfig.from_pretrained(options.model)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    dtype = config.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    pruner, found = find(row["method"]).model_validate({"sparsity": 0.5}), []
    for ranks in (1, 2):
        demand = pruner.demand(model, Sharing(samples, length, options.batch, ranks))
        assert demand is not None
        found.append(sum(seconds_of(demand, rates, str(dtype).removeprefix("torch.")).values()))
    return found


def summary(mine: Sequence[Row], said: Sequence[float]) -> list[str]:
    """Return a row of the table: medians over the repeats, and beside them what was said before."""
    median, (blocks, samples, length) = statistics.median, mine[0]["sizes"]
    alone = [row["alone"][0]["cpu"] for row in mine]
    busiest = [max(one["cpu"] for one in row["together"]) for row in mine]
    ratios = [one / two for one, two in zip(alone, busiest, strict=True)]
    sending = [max(one["sending"] for one in row["together"]) for row in mine]
    waiting = [max(one["inside"] - one["sending"] for one in row["together"]) for row in mine]
    walls = [
        max(one["wall"] for one in row["halves"]) / max(one["wall"] for one in row["together"])
        for row in mine
        if "halves" in row
    ]
    loads = [row["load"] for row in mine]
    return [
        f"{mine[0]['method']}, {blocks} blocks, {samples} x {length}",
        f"{len(mine)}",
        f"{min(loads):.0f} - {max(loads):.0f}",
        f"{median(alone):.1f}",
        f"{median(busiest):.1f}",
        f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
        f"{GOALS.get(mine[0]['method'], 0):.1f}",
        f"{median(sending):.2f}",
        f"{median(waiting):.1f}",
        f"{median(walls):.2f} ({min(walls):.2f} - {max(walls):.2f})" if walls else "",
        ", ".join(f"{one / two:.2f}" for one, two in zip(said, (median(alone), median(busiest)))),
    ]


HEADER = ["", "repeats", "load", "one", "busier of two", "one / busier", "goal", "sending", "waiting"]
HEADER += ["wall: halves / together", "said / measured: one, two"]


def compare(options: argparse.Namespace, folder: Path, place: Path) -> str:
    """Return a table of one process of this checkout and one of another, taking turns."""
    workers = [Worker(options, folder, 0, one) for one in (options.before, ROOT)]
    rows = []
    for method in options.methods.split(","):
        took: list[list[float]] = [[], []]
        for repeat in range(options.repeats):
            for side in (0, 1) if repeat % 2 else (1, 0):
                workers[side].begin(method, "alone", place)
                took[side].append(workers[side].end()["cpu"])
        ratios = [now / before for before, now in zip(*took, strict=True)]
        medians = [f"{statistics.median(one):.2f}" for one in took]
        rows.append([method, *medians, f"{statistics.median(ratios):.3f}"])
    for one in workers:
        one.close()
    return markdown(["", "before", "now", "now / before"], rows)


def main() -> None:
    """Measure, and print a table or write it into the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--methods", default="wanda,sparsegpt,alps,recover")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default="alone,together,halves")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--json", type=Path, default=Path("processes.jsonl"), help="Rows of all calls.")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rates = [measure_rates("cpu", Ranks())]
    if options.repeats:  # with none, only the table is made of the rows that are there
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            prepare(options, place / "model")
            if options.before:
                print(compare(options, place / "model", place))
                return
            workers = [Worker(options, place / "model", number) for number in range(2)]
            turns(options, workers, place)
            for one in workers:
                one.close()
        rates.append(measure_rates("cpu", Ranks()))
    # Whatever else runs makes a rate lower: the one that was measured at the quieter end.
    best = max(rates, key=lambda one: one.flops["float32"])
    alike: dict[str, list[Row]] = {}
    for line in options.json.read_text().splitlines():
        row = json.loads(line)
        alike.setdefault(f"{row['method']} {row['sizes']}", []).append(row)
    table = markdown(HEADER, [summary(rows, estimates(options, rows[0], best)) for rows in alike.values()])
    text = (
        f"{Path(options.model).name}, batches of {options.batch}, dtype {options.dtype}, one thread each; "
        "the processor's seconds, medians of the repeats (range). Sending: of them inside the calls of the "
        "group; waiting: the seconds of the wall there beyond it. Halves: two processes side by side that "
        "share nothing, half of the data each. Said: what the account of `--dry-run --ranks` says of its "
        f"rates' seconds, {best.flops['float32'] / 1e9:.0f} GFLOP/s in float32. {machine()['processor']}, "
        f"{machine()['cores']} cores that others used as well, torch {torch.__version__}."
    )
    print(f"{table}\n\n{text}")
    if options.write:
        write_section("processes.py", f"{table}\n\n{text}")


if __name__ == "__main__":
    main()
