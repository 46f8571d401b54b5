"""Peak memory and speed of a streamed run: 8 blocks against 32, streamed against resident, 128 k tokens.

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
from model import VOCABULARY, random_llama, token_file

LENGTH, BATCH = 256, 4
HIDDEN, FFN = 768, 2048
# A small model, so that logits of a single window would already be as large as all that it is allowed.
LARGE_VOCABULARY, SLIM, SLIM_FFN, SLIM_BLOCKS = 2**17, 256, 704, 4
SLACK = 256 * 2**20  # what a run may take beside its parts, slices of logits among it


def run(
    source: Path, output: Path, text: Path, flag: str, samples: int, *, windows: int = 1
) -> dict[str, float]:
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
        f"evaluate.windows={windows}",
        "--set",
        f"evaluate.length={LENGTH}",
        "--set",
        f"evaluate.batch_size={windows}",
        "--set",
        "evaluate.generations=false",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    report = json.loads(done.stdout)
    ours = sum(seconds for phase, seconds in report["phases"].items() if phase not in ("evaluate", "prove"))
    return {"peak": report["peak_rss_bytes"], "seconds": ours, "bytes": report["bytes"]["dense"]}


def needed(hidden: int, ffn: int, vocabulary: int, samples: int) -> dict[str, int]:
    """Return the float32 bytes of what a streamed run cannot do without."""
    return {
        "block": (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden) * 4,
        "largest": vocabulary * hidden * 4,
        # The hidden states of all samples, and what one batch is made into on its way through a block.
        "activations": samples * LENGTH * hidden * 4 + BATCH * LENGTH * (6 * hidden + 3 * ffn) * 4,
    }


def limit(runtime: float, parts: dict[str, int]) -> float:
    """Return the most that a streamed run may take, without slack."""
    return runtime + max(3 * parts["block"], 2 * parts["largest"]) + parts["activations"]


def main() -> None:
    """Run 8 and 32 blocks, streamed and resident, and a large vocabulary; print the growth and the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--samples", type=int, default=16, help=f"calibration samples of {LENGTH} tokens")
    options = parser.parse_args()
    samples = options.samples
    parts = needed(HIDDEN, FFN, VOCABULARY, samples)
    wide = needed(SLIM, SLIM_FFN, LARGE_VOCABULARY, samples)
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
        slim = random_llama(
            folder / "slim",
            blocks=SLIM_BLOCKS,
            hidden=SLIM,
            ffn=SLIM_FFN,
            vocabulary=LARGE_VOCABULARY,
            dtype=torch.float32,
        )
        result["128 k tokens"] = run(slim, folder / "out-slim", text, "--stream", samples, windows=BATCH)
        print("128 k tokens", json.dumps(result["128 k tokens"]), file=sys.stderr)
        # The same run on a model of next to no size: what the programs take whatever is pruned.
        tiny = random_llama(folder / "tiny", blocks=2, hidden=64, ffn=128, dtype=torch.float32)
        runtime = run(tiny, folder / "out-tiny", text, "--stream", samples)["peak"]
    small, large = result["8 stream"], result["32 stream"]
    figures = {
        "block_bytes": parts["block"],
        "runtime_bytes": runtime,
        "activation_bytes": parts["activations"],
        "growth_of_added_bytes": (large["peak"] - small["peak"]) / (large["bytes"] - small["bytes"]),
        "peak_over_limit": large["peak"] / limit(runtime, parts),
        "vocabulary_limit_bytes": limit(runtime, wide) + SLACK,
        "vocabulary_peak_over_limit": result["128 k tokens"]["peak"] / (limit(runtime, wide) + SLACK),
        "seconds_over_resident": large["seconds"] / result["32 resident"]["seconds"],
    }
    if options.json:
        print(json.dumps({"runs": result, **figures}))
        return
    for label, row in result.items():
        print(f"{label:12}  peak {row['peak'] / 2**20:7.0f} MiB  {row['seconds']:6.1f} s")
    for key, value in figures.items():
        print(f"{key:24} {value:.3f}" if value < 1000 else f"{key:24} {value / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
