"""Methods side by side on the demo model: divergence from dense over held-out text, random selection beside.

Protocol: held-out text of the demo's generator, windows without overlap, mean KL(dense || pruned) per token
with its standard error over windows; methods are compared window by window, so what a window makes hard for
all of them cancels. Calibration samples are drawn with each seed; magnitude has no seed.
"""

import argparse
import json
import math
from typing import Any

import torch
from cells import difference
from rich.console import Console
from rich.table import Table

from structprune.calibration import data
from structprune.calibration.text_source import TextSource
from structprune.checkpoint.locate import resolve
from structprune.demo.world import HELD_OUT_SEED, text
from structprune.evaluation.perplexity import Scores, Windows, score, windows_of
from structprune.models.opening import Opening
from structprune.models.streamed import Model, open_model
from structprune.models.tokenizer import open_tokenizer
from structprune.pruners.catalogue import find

METHODS = ("random", "magnitude", "wanda")
SPARSITIES: tuple[float | str, ...] = (0.5, 0.6, 0.7, "2:4")
SAMPLES, LENGTH, WINDOWS = 128, 256, 96


def measured(method: str, sparsity: float | str, seed: int, dense: Model, held_out: Windows) -> Scores:
    """Prune a fresh copy of the demo model in memory and score it against the dense one."""
    folder = resolve("demo")
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    pruner = find(method)
    fields: dict[str, Any] = {"sparsity": sparsity} | (
        {"seed": seed} if "seed" in pruner.model_fields else {}
    )
    stage = pruner.model_validate(fields)
    batches = data.load(
        TextSource("demo"), tokenizer, samples=SAMPLES, length=LENGTH, seed=seed, batch_size=16
    ).batches
    model = open_model(folder, Opening(dtype="float32"))
    return score(stage.apply(model, stage.calibrate(model, batches)), held_out, dense=dense, batch_size=16)


def main() -> None:
    """Measure every method at every sparsity with every seed and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = resolve("demo")
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    ids = torch.tensor(tokenizer(text(HELD_OUT_SEED, 200_000), add_special_tokens=False)["input_ids"])
    held_out = windows_of(ids[: WINDOWS * LENGTH], LENGTH)
    dense = open_model(folder, Opening(dtype="float32"))
    rows: list[dict[str, Any]] = []
    for sparsity in SPARSITIES:
        for seed in range(options.seeds):
            found = {m: measured(m, sparsity, seed, dense, held_out) for m in METHODS}
            row: dict[str, Any] = {"sparsity": sparsity, "seed": seed}
            for method, scores in found.items():
                row[method] = scores.mean(scores.kl)
                row[f"{method}_se"] = scores.error(scores.kl)
                row[f"{method}_perplexity"] = math.exp(scores.mean(scores.model))
            row["dense_perplexity"] = math.exp(found["wanda"].mean(found["wanda"].dense))
            for name, worse, better in (
                ("random - magnitude", *METHODS[:2]),
                ("magnitude - wanda", *METHODS[1:]),
            ):
                mean, error = difference(found[worse].kl, found[better].kl, found[worse].tokens)
                row[name] = mean / error  # in standard errors
            rows.append(row)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"mean KL(dense || pruned) per token, {WINDOWS} windows of {LENGTH} tokens")
    for column in ("sparsity", "seed", *METHODS, "random - magnitude", "magnitude - wanda"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row[m]:.4f} ± {row[m + '_se']:.4f}" for m in METHODS]
        gaps = [f"{row[name]:.1f} SE" for name in ("random - magnitude", "magnitude - wanda")]
        table.add_row(str(row["sparsity"]), str(row["seed"]), *cells, *gaps)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
