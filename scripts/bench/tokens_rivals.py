"""quality_dpp beside its rivals at equal operations: right answers, and how far they are from dense.

Each rival is asked for shares of an image's tokens in the last block; quality_dpp for as many operations as
the rival takes there. Both answer the same questions, greedily: differences are paired, with a 95% interval
over questions. KL: of the first token of the answer, from the dense model, in nats.

    python scripts/bench/tokens_rivals.py --json one.json
    python scripts/bench/tokens_rivals.py --model DIR --questions FILE --json two.json
    python scripts/bench/tokens_rivals.py --write one.json two.json

The JSON is rewritten after every cell; a second call with the same file measures only what it lacks.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cells import Cell, kept_cells
from figures import markdown, write_section
from tokens_quality import SHARES, Bench, parts
from tokens_quality_tables import interval, paired
from torch import Tensor

from structprune.errors import UsageError
from structprune.evaluation.questions import answer
from structprune.machine import environment
from structprune.pruners.catalogue import find
from structprune.pruners.while_running import pruning

OURS = "quality_dpp"
RIVALS = ("transprune", "pyramiddrop", "fastv", "sparsevlm")
HEADER = ("rival", "its share", "FLOPs", "right", "KL", "ours: share", "FLOPs", "right", "KL")
NOTE = (
    "Each rival asked for a share of the tokens in the last block, and quality_dpp for as many operations as "
    "it takes there (FLOPs: of visual tokens in the blocks, against dense). KL from dense of the first token "
    "of an answer, in nats. Differences: quality_dpp less the rival, paired by question, with 95% intervals. "
    "Left out: what a rival takes that quality_dpp cannot, for its first stage leaves more."
)


def look(bench: Bench, dense: Sequence[Tensor] = ()) -> tuple[Cell, list[Tensor]]:
    """Return which answers are right and how far they are from dense ones, and their first tokens' logits."""
    right: list[bool] = []
    divergences: list[float] = []
    first: list[Tensor] = []
    for number, (part, batch) in enumerate(zip(parts(bench.exam.questions), bench.asked, strict=True)):
        bench.features.batch = number
        found = answer(bench.model, part, batch, bench.processor)
        right += found.right
        first.append(found.first)
        if dense:
            apart = dense[number].exp() * (dense[number] - found.first)
            divergences += apart.sum(-1).clamp(min=0).tolist()
    bench.features.batch = None
    return {"right": right, "kl": divergences}, first


def measure(bench: Bench, method: str, target: Mapping[str, float], dense: Sequence[Tensor]) -> Cell:
    """Return a cell: a method with what was asked for."""
    with pruning(bench.model, find(method).model_validate({"target": target})) as plan:
        return {"method": method, "target": dict(target), "facts": plan.facts} | look(bench, dense)[0]


def wanted(cells: Sequence[Cell]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what is measured: every rival at every share, and then ours at the same operations."""
    for share in SHARES:
        for rival in RIVALS:
            yield rival, {"keep_ratio": share}
    for one in [one for one in cells if one["method"] in RIVALS]:
        yield OURS, {"visual_flops": round(one["facts"]["visual_flops"], 3)}


def section(kept: Mapping[str, Any]) -> str:
    """Return the table of a model."""
    told = f"{kept['protocol']}; dense {fmean(kept['dense']):.1%} right. {kept['processor']}, {kept['date']}."
    rows = []
    for rival in RIVALS:
        for one in (one for one in kept["cells"] if one["method"] == rival):
            asked = {"visual_flops": round(one["facts"]["visual_flops"], 3)}
            ours = [mine for mine in kept["cells"] if (mine["method"], mine["target"]) == (OURS, asked)]
            rows += [row(one, mine) for mine in ours]
    header = [*HEADER, "right, less rival's", "KL, less rival's"]
    return "\n\n".join([f"### {kept['model']}", told, markdown(header, rows)])


def row(rival: Cell, ours: Cell) -> list[str]:
    """Return a line of the table."""
    line = [rival["method"]]
    for one in (rival, ours):
        facts = one["facts"]
        line += [f"{facts['keep_ratio']:.1%}", f"{facts['visual_flops']:.3f}"]
        line += [f"{fmean(one['right']):.1%}", f"{fmean(one['kl']):.4f}"]
    mean, error = interval(ours["kl"], rival["kl"])
    return [*line, paired(ours["right"], rival["right"]), f"{mean:+.4f} ± {error:.4f}"]


def main() -> None:
    """Measure what the JSON lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo-vision")
    parser.add_argument("--questions", default="demo-vision")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--write", type=Path, nargs="+", default=[], help="JSONs for the section of README.md"
    )
    options = parser.parse_args()
    if options.json:
        torch.set_num_threads(1)
        bench = Bench(options.model, options.questions, "demo-vision", options.limit)
        versions, processor = environment()["versions"], environment()["machine"]["processor"]
        protocol = (
            f"{len(bench.exam.questions)} questions of {Path(options.questions).name}; float32, "
            f"torch {versions['torch']}, transformers {versions['transformers']}"
        )
        kept = kept_cells(options.json, protocol)
        cell, dense = look(bench)
        kept |= {"model": Path(options.model).name, "processor": processor, "dense": cell["right"]}
        kept["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
        for method, target in wanted(kept["cells"]):
            if any((one["method"], one["target"]) == (method, target) for one in kept["cells"]):
                continue
            try:
                kept["cells"].append(measure(bench, method, target, dense))
            except UsageError as error:
                print(f"{method} {target}: {error}", flush=True)
                continue
            options.json.write_text(json.dumps(kept))
            made = kept["cells"][-1]
            said = f"{fmean(made['right']):.3f} right, KL {fmean(made['kl']):.4f}"
            print(f"{method} {target}: {said}", flush=True)
    if options.write:
        files = [json.loads(one.read_text()) for one in options.write]
        write_section(Path(__file__).name, "\n\n".join([NOTE, *map(section, files)]))


if __name__ == "__main__":
    main()
