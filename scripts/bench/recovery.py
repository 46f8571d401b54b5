"""What a recovery takes, plain and with gradient checkpointing, beside what is said before it runs.

Each training is a process of its own, as a user starts it, and the ways take turns. The peak is the largest
resident set of the process. The weight files are compared: checkpointing may not change a byte of them.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from figures import markdown, write_section

import structprune
from structprune.checkpoint.locate import resolve
from structprune.machine import machine, versions
from structprune.models.streamed import open_skeleton
from structprune.pipeline.estimate import estimate_training
from structprune.recipe.options import RecoverOptions
from structprune.report.figures import bytes_text

CHECKPOINTING, ALSO = "--gradient-checkpointing", ", checkpointing"
# High enough that a few steps gain something: what does not is never written.
LEARNING_RATE = 1e-3


def train(pruned: Path, output: Path, words: list[str]) -> dict[str, Any]:
    """Recover in a process of its own; return its peak, the seconds of its training and what it wrote."""
    command = [sys.executable, "-m", "structprune", "recover", str(pruned), str(output), *words]
    command += ["--no-evaluate", "--json", "--learning-rate", str(LEARNING_RATE), "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    report = json.loads(done.stdout)
    files = hashlib.sha256(b"".join(one.read_bytes() for one in sorted(output.glob("*.safetensors"))))
    return {
        "peak": report["peak_rss_bytes"],
        "seconds": report["phases"]["train"],
        "files": files.hexdigest(),
    }


def section(name: str, words: str, rows: dict[str, list[dict[str, Any]]], said: dict[str, int]) -> str:
    """Return the figures as Markdown."""
    table = []
    for way, found in rows.items():
        plain = rows[way.removesuffix(ALSO)]
        peak = max(one["peak"] for one in found)
        seconds = statistics.median(one["seconds"] for one in found)
        table.append(
            [
                way,
                bytes_text(peak),
                f"{peak / max(one['peak'] for one in plain):.2f}",
                bytes_text(said[way]),
                f"{seconds:.0f} s",
                f"{seconds / statistics.median(one['seconds'] for one in plain):.2f}",
            ]
        )
    found = versions()
    header = ["way", "peak", "of plain", "said before", "training", "of plain"]
    return (
        f"{name}, {words}; median of {len(next(iter(rows.values())))} runs that took turns, one thread, "
        f"{machine()['processor']}, torch {found['torch']}, transformers {found['transformers']}, "
        f"{date.today()}. With and without checkpointing the weight files are the same byte for byte.\n\n"
        f"{markdown(header, table)}"
    )


def main() -> None:
    """Prune a model by magnitude, recover it in four ways in turns, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the figures into README.md")
    asked = parser.parse_args()
    sizes = {"steps": asked.steps, "batch_size": asked.batch_size, "length": asked.length, "samples": 60}
    words = [
        "--data",
        asked.data,
        *(word for key, value in sizes.items() for word in (f"--{key.replace('_', '-')}", str(value))),
    ]
    ways = {
        "alone": [],
        f"alone{ALSO}": [CHECKPOINTING],
        "with a teacher": ["--teacher", asked.model],
        f"with a teacher{ALSO}": ["--teacher", asked.model, CHECKPOINTING],
    }
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    dense = open_skeleton(resolve(asked.model))
    said = {
        way: estimate_training(
            RecoverOptions(gradient_checkpointing=CHECKPOINTING in flags, **sizes),
            dense,
            dense if "--teacher" in flags else None,
            "cpu",
        )["memory_bytes"]
        for way, flags in ways.items()
    }
    with tempfile.TemporaryDirectory() as name:
        pruned = Path(name) / "pruned"
        structprune.prune(asked.model, pruned, "magnitude", sparsity=0.5, evaluate=False)
        for _ in range(asked.repeats):
            for way, flags in ways.items():
                rows[way].append(train(pruned, Path(name) / "out", [*words, *flags]))
                print(way, json.dumps(rows[way][-1]), file=sys.stderr)
    for way in ("alone", "with a teacher"):
        if len({one["files"] for one in [*rows[way], *rows[f"{way}{ALSO}"]]}) != 1:
            sys.exit("gradient checkpointing changed the weights")
    size = f"{asked.steps} steps of {asked.batch_size} x {asked.length} tokens after magnitude at 50%"
    text = section(Path(asked.model).name, size, rows, said)
    print(text)
    if asked.write:
        write_section("recovery.py", text)


if __name__ == "__main__":
    main()
