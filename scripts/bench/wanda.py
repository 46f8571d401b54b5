"""How close a Wanda run comes to the work it cannot avoid, on a random Llama of 100 M parameters.

Baseline, in the same run and thread: two plain forwards of the calibration tokens through the blocks, plus
reading and writing the bytes of the checkpoint once. Ours: everything `prune` does except proving the result
and measuring its perplexity, which are timed beside it. The two take turns.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from model import random_llama, token_file

import structprune
from structprune.calibration import data
from structprune.calibration.text_source import TextSource
from structprune.models.streamed import open_model
from structprune.models.tokenizer import open_tokenizer

SAMPLES, LENGTH, BATCH = 16, 512, 8


def unavoidable(source: Path, target: Path, text: Path) -> dict[str, float]:
    """Run the baseline once and return its seconds."""
    model, tokenizer = open_model(source), open_tokenizer(source)
    assert tokenizer is not None
    batches = data.load(
        TextSource(str(text)), tokenizer, samples=SAMPLES, length=LENGTH, batch_size=BATCH
    ).batches
    body = model.base_model
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(2):
            for batch in batches:
                body(**batch, use_cache=False)
    forwards = time.perf_counter() - start
    start = time.perf_counter()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as reader, (target / file.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 2**22)
            writer.flush()
    return {"forwards": forwards, "bytes": time.perf_counter() - start}


def main() -> None:
    """Time both in turn and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = random_llama(folder / "dense", blocks=options.blocks, hidden=768, ffn=2048)
        text = token_file(folder / "text.txt", tokens=SAMPLES * LENGTH * 2)
        for repeat in range(options.repeats):
            target = folder / f"baseline-{repeat}"
            target.mkdir()
            base = unavoidable(source, target, text)
            report = structprune.prune(
                str(source),
                folder / f"out-{repeat}",
                "wanda",
                calibration={"source": str(text), "samples": SAMPLES, "length": LENGTH, "batch_size": BATCH},
                evaluate={"text": str(text), "windows": 4, "length": LENGTH},
            )
            phases = report["phases"]
            ours = sum(seconds for phase, seconds in phases.items() if phase not in ("evaluate", "prove"))
            rows.append(
                {
                    "baseline": sum(base.values()),
                    **base,
                    "ours": ours,
                    "ratio": ours / sum(base.values()),
                    **phases,
                }
            )
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    if options.json:
        print(json.dumps({"runs": rows, "median": medians}))
        return
    for key, value in medians.items():
        print(f"{key:12} {value:8.2f}" + ("" if key == "ratio" else " s"))


if __name__ == "__main__":
    main()
