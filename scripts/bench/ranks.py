"""Ranks by importance against equal ranks: cfsp, then LoRA of the same total rank on the same text.

Both trainings of a seed start from the same pruned model and see the same sequences in the same order.

    python scripts/bench/ranks.py --work /tmp/ranks --wiki MODEL CALIBRATION TEST --write

What is complete under --work is not made again, so a second call goes on where the first one stopped.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from figures import markdown, write_section

import structprune
from structprune.checkpoint.writing import Writing
from structprune.machine import environment
from structprune.recipe.options import EvaluateOptions, RecoverOptions

SEEDS = (0, 1, 2)
ARMS: dict[str, Any] = {"equal": {}, "importance": "importance"}
STEPS, BATCH, LENGTH, RANK, RATE = 100, 4, 256, 8, 1e-3
WINDOWS = 60


@dataclass(frozen=True)
class World:
    """A dense model, how much of its channels leaves, what it is trained on and measured on."""

    name: str
    model: str
    sparsity: float
    training: str
    test: str


def recovered(world: World, seed: int, work: Path) -> dict[str, dict[str, Any]]:
    """Return the reports of a pruned model and of both its recoveries."""
    writing = Writing(keep=True, reload=False)
    asked = EvaluateOptions(
        text=(world.test,), length=LENGTH, windows=WINDOWS, compare=world.model, generations=False
    )
    pruned = work / f"{world.name}-{seed}-pruned"
    found = {
        "pruned": structprune.prune(
            world.model,
            pruned,
            "cfsp",
            sparsity=world.sparsity,
            seed=seed,
            calibration={"source": world.training, "samples": 64, "length": LENGTH},
            evaluate=asked,
            writing=writing,
        )
    }
    for arm, ranks in ARMS.items():
        options = RecoverOptions(
            data=world.training,
            steps=STEPS,
            batch_size=BATCH,
            length=LENGTH,
            rank=RANK,
            ranks=ranks,
            learning_rate=RATE,
            seed=seed,
        )
        output = work / f"{world.name}-{seed}-{arm}"
        found[arm] = structprune.recover(str(pruned), output, options, evaluate=asked, writing=writing)
    return found


def figures(report: dict[str, Any]) -> tuple[float, float]:
    """Return the divergence from the dense model and the perplexity."""
    (kl,) = report["evaluation"]["divergence"].values()
    (perplexity,) = report["evaluation"]["perplexity"].values()
    return kl["kl"], perplexity["model"]


def rows_of(world: World, found: list[dict[str, dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return the table's rows of one model, and the difference seed by seed."""
    rows = []
    for arm in ("pruned", *ARMS):
        each = [figures(one[arm]) for one in found]
        kl, perplexity = (fmean(values) for values in zip(*each, strict=True))
        seeds = ", ".join(f"{value:.4f}" for value, _ in each)
        rows.append((f"{world.name} {world.sparsity:.0%}, {arm}", f"{kl:.4f}", seeds, f"{perplexity:.2f}"))
    both = [(figures(one["importance"]), figures(one["equal"])) for one in found]
    kl, perplexity = ([first[place] - second[place] for first, second in both] for place in (0, 1))
    seeds = ", ".join(f"{value:+.4f}" for value in kl)
    rows.append(("importance less equal", _spread(kl, 4), seeds, _spread(perplexity, 2)))
    return rows


def _spread(apart: list[float], digits: int) -> str:
    error = stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return f"{fmean(apart):+.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    """Measure, print the table, and with --write put it among the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--wiki", nargs=3, metavar=("MODEL", "CALIBRATION", "TEST"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    worlds = [World("demo", "demo", 0.5, "demo", "demo")]
    if options.wiki:
        model, training, test = options.wiki
        worlds.append(World("WikiText model", model, 0.3, training, test))
    rows = [
        row
        for world in worlds
        for row in rows_of(world, [recovered(world, seed, options.work) for seed in options.seeds])
    ]
    machine = environment()["machine"]
    said = (
        f"cfsp, then {STEPS} steps of {BATCH} x {LENGTH} tokens, mean rank {RANK}, alpha {2 * RANK}, "
        f"learning rate {RATE:g}, no teacher; nats per token, {WINDOWS} windows of {LENGTH} held-out tokens. "
        "Less: the mean difference with its standard error over seeds. The WikiText model is trained on text "
        f"of the test's own kind and leaves the dense model for it. {machine['processor']}."
    )
    shown = f"{markdown(('', 'KL from dense', 'seeds', 'perplexity'), rows)}\n\n{said}"
    print(shown)
    if options.write:
        write_section(Path(__file__).name, shown)


if __name__ == "__main__":
    main()
