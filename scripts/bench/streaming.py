"""Peak memory and speed of a streamed run: 8 blocks against 32, and streamed against resident.

Each run is a process of its own, as a user starts it; its peak is the largest resident set of the process and
its children. One shard holds all blocks, which is the hardest case for a streamed reader.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from model import random_llama, token_file

LENGTH, BATCH = 256, 4
HIDDEN, FFN = 768, 2048


def run(source: Path, output: Path, text: Path, flag: str, samples: int) -> dict[str, float]:
    """Prune in a process of its own; return its peak memory and the seconds of its phases."""
    command = [sys.executable, "-m", "structprune", "prune", str(source), str(output), "--method", "wanda"]
    command += [
        "--calibration",
        str(text),
        "--samples",
        str(samples),
        "--length",
        str(LENGTH),
        flag,
        "--json",
    ]
    command += ["--set", f"calibration.batch_size={BATCH}", "--set", f"evaluate.text={text}"]
    command += [
        "--set",
        "evaluate.windows=1",
        "--set",
        f"evaluate.length={LENGTH}",
        "--set",
        "evaluate.batch_size=1",
        "--set",
        "evaluate.generations=false",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    report = json.loads(done.stdout)
    ours = sum(seconds for phase, seconds in report["phases"].items() if phase not in ("evaluate", "prove"))
    return {"peak": report["peak_rss_bytes"], "seconds": ours, "bytes": report["bytes"]["dense"]}


def main() -> None:
    """Run 8 and 32 blocks, streamed and resident, and print the growth and the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--samples", type=int, default=16, help=f"calibration samples of {LENGTH} tokens")
    options = parser.parse_args()
    samples = options.samples
    block = (4 * HIDDEN**2 + 3 * HIDDEN * FFN + 2 * HIDDEN) * 4
    # The hidden states of all samples, and what one batch is made into on its way through a block.
    activations = samples * LENGTH * HIDDEN * 4 + BATCH * LENGTH * (6 * HIDDEN + 3 * FFN) * 4
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = token_file(folder / "text.txt", tokens=samples * LENGTH * 4)
        for blocks in (8, 32):
            source = random_llama(
                folder / f"dense-{blocks}", blocks=blocks, hidden=HIDDEN, ffn=FFN, dtype=torch.float32
            )
            for flag in ("--stream", "--resident"):
                label = f"{blocks} {flag[2:]}"
                result[label] = run(source, folder / f"out-{blocks}{flag}", text, flag, samples)
                print(label, json.dumps(result[label]), file=sys.stderr)
        # The same run on a model of next to no size: what the programs take whatever is pruned.
        tiny = random_llama(folder / "tiny", blocks=2, hidden=64, ffn=128, dtype=torch.float32)
        runtime = run(tiny, folder / "out-tiny", text, "--stream", samples)["peak"]
    small, large = result["8 stream"], result["32 stream"]
    figures = {
        "block_bytes": block,
        "runtime_bytes": runtime,
        "activation_bytes": activations,
        "growth_of_added_bytes": (large["peak"] - small["peak"]) / (large["bytes"] - small["bytes"]),
        "peak_over_limit": large["peak"] / (runtime + max(3 * block, 2 * 8192 * HIDDEN * 4) + activations),
        "seconds_over_resident": large["seconds"] / result["32 resident"]["seconds"],
    }
    if options.json:
        print(json.dumps({"runs": result, **figures}))
        return
    for label, row in result.items():
        print(f"{label:12} blocks  peak {row['peak'] / 2**20:7.0f} MiB  {row['seconds']:6.1f} s")
    for key, value in figures.items():
        print(f"{key:24} {value:.3f}" if value < 1000 else f"{key:24} {value / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
