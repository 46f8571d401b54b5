"""Time in the blocks after some of them left: as many as stay, so many shares of the time.

A random Llama of about 100 M parameters loses blocks through the command that users run, and both folders are
opened with plain transformers. They take turns on the same tokens. Measured is from what enters the first
block to what leaves the last one, embedding and head apart, on one thread; the figure is the median over
pairs of their ratio. CPU seconds are told beside wall seconds, since others may run on the machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from model import VOCABULARY, random_llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import structprune
from structprune.checkpoint.writing import Writing
from structprune.models.arch import blocks
from structprune.recipe.recipe import Recipe

# What noise may add: a block's time is one of twelve.
ALLOWED = 0.03


def block_seconds(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, float]:
    """Return wall and CPU seconds that one forward spends in the blocks."""
    clocks: list[tuple[float, float]] = []

    def note(*_: object) -> None:
        clocks.append((time.perf_counter(), time.process_time()))

    found = [block for _, block in blocks(model)]
    handles = [found[0].register_forward_pre_hook(note), found[-1].register_forward_hook(note)]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    (start, cpu), (end, cpu_end) = clocks
    return end - start, cpu_end - cpu


def pruned_folder(source: Path, output: Path, count: int) -> Path:
    """Write the model without some of its blocks, chosen at random; returns the folder."""
    prune = {"method": "block_drop", "score": "random", "count": count}
    recipe = {"model": str(source), "output": str(output), "prune": prune, "evaluate": False}
    structprune.prune(Recipe.model_validate(recipe), writing=Writing(reload=False))
    return output


def main() -> None:
    """Print what was measured as one line of JSON; exit 1 where it is not what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--drop", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        source = random_llama(Path(place) / "dense", blocks=asked.blocks, hidden=768, ffn=2048)
        folders = source, pruned_folder(source, Path(place) / "pruned", asked.drop)
        models: list[nn.Module] = [AutoModelForCausalLM.from_pretrained(one).eval() for one in folders]
        ids = torch.randint(VOCABULARY, (1, asked.tokens), generator=torch.Generator().manual_seed(0))
        pairs = [[block_seconds(model, ids) for model in models] for _ in range(asked.repeats + 1)][1:]
    wall, cpu = (
        statistics.median(pruned[clock] / dense[clock] for dense, pruned in pairs) for clock in (0, 1)
    )
    counted = (asked.blocks - asked.drop) / asked.blocks
    found = {"blocks": asked.blocks, "dropped": asked.drop, "counted": counted, "wall": wall, "cpu": cpu}
    print(json.dumps(found | {"within": abs(cpu / counted - 1) <= ALLOWED}))
    raise SystemExit(0 if abs(cpu / counted - 1) <= ALLOWED else 1)


if __name__ == "__main__":
    main()
