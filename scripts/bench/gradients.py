"""Peak memory and speed of gradient norms: 8 blocks against 32, block by block against the whole model.

Each run is a process of its own, measured from its start. The baseline is what needs no walk: the model in
memory, one backward pass per sample, gradients and their sums of all weights side by side. Medians, because
the C library's allocator keeps up to some tens of MiB of freed memory, more in one run than in the next.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from model import VOCABULARY, random_llama
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from structprune.machine import peak_rss
from structprune.models.backward import backward
from structprune.models.opening import Opening
from structprune.models.streamed import Batch, open_model

MODES = ("streamed", "resident", "whole")


def walk(source: Path, batches: list[Batch], folder: Path, *, stream: bool) -> Tensor:
    """Return the sum of all l1 norms of the linears, block by block."""
    total = torch.zeros(())
    for _, gradients in backward(
        open_model(source, Opening(stream=stream)), batches, means=("l1",), folder=folder
    ):
        total += sum(norm.l1.sum() for norm in gradients.values())
    return total


def whole(source: Path, batches: list[Batch]) -> Tensor:
    """Return the same from backward passes of the whole model."""
    model = open_model(source)
    assert isinstance(model, PreTrainedModel)
    chosen = [parameter for name, parameter in model.named_parameters() if "proj" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in chosen))
    sums = [torch.zeros_like(parameter) for parameter in chosen]
    samples = [ids for batch in batches for ids in batch["input_ids"]]
    for ids in samples:
        logits = model(input_ids=ids[None], use_cache=False).logits
        loss: Any = functional.cross_entropy(logits[0, :-1], ids[1:])
        loss.backward()
        for total, parameter in zip(sums, chosen, strict=True):
            assert parameter.grad is not None
            total += parameter.grad.abs()
            parameter.grad = None
    return torch.stack([total.sum() for total in sums]).sum() / len(samples)


def measure(source: Path, mode: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Compute the norms in this process; return its peak memory, the seconds and a number to compare."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (options.samples, options.length), generator=generator)
    batches = [{"input_ids": part} for part in torch.split(ids, options.batch)]
    runs: dict[str, Callable[[], Tensor]] = {
        "streamed": lambda: walk(source, batches, folder, stream=True),
        "resident": lambda: walk(source, batches, folder, stream=False),
        "whole": lambda: whole(source, batches),
    }
    start = time.perf_counter()
    total = runs[mode]()
    return {"peak": peak_rss(), "seconds": time.perf_counter() - start, "total": float(total)}


def main() -> None:
    """Run 8 and 32 blocks in every mode; print peaks, seconds and the growth of the peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("SOURCE", "MODE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, mode, folder = options.child
        print(json.dumps(measure(Path(source), mode, Path(folder), options)))
        return
    block = (4 * options.hidden**2 + 3 * options.hidden * options.ffn + 2 * options.hidden) * 4
    runs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for blocks in (8, 32):
            source = random_llama(
                Path(name) / f"dense-{blocks}", blocks=blocks, hidden=options.hidden, ffn=options.ffn
            )
            for mode in MODES:
                command = [sys.executable, *sys.argv, "--child", str(source), mode, name]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                rows: list[dict[str, float]] = []
                for _ in range(options.repeat):
                    done = subprocess.run(
                        command, check=True, capture_output=True, text=True, env=environment
                    )
                    rows.append(json.loads(done.stdout))
                runs[f"{blocks} {mode}"] = {key: median(row[key] for row in rows) for key in rows[0]}
    growth = {mode: (runs[f"32 {mode}"]["peak"] - runs[f"8 {mode}"]["peak"]) / (24 * block) for mode in MODES}
    if options.json:
        print(json.dumps({"runs": runs, "block_bytes": block, "growth_of_added_bytes": growth}))
        return
    print(f"one block holds {block / 2**20:.1f} MiB")
    for label, row in runs.items():
        peak, seconds, total = row["peak"] / 2**20, row["seconds"], row["total"]
        print(f"{label:12}  peak {peak:7.0f} MiB  {seconds:6.1f} s  sum of l1 {total:.6g}")
    for mode, value in growth.items():
        print(f"{mode:9} growth of the peak over the added bytes {value:.3f}")


if __name__ == "__main__":
    main()
