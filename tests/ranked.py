"""What a worker of a group of processes does: every method decides, and what it decided is told.

    python -m tests.ranked RENDEZVOUS RANK FOLDER

Three workers decide as a group of three; then the first two as a group of two, and the first one alone.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from tests.methods import STORED_METHODS, home, quick

WORKERS = 3
# Five do not divide by two or by three.
BATCHES = 5
PATIENCE = timedelta(seconds=120)


def decide(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return by method and way of opening the digests of the blocks that a group decides on."""
    found: dict[str, dict[str, list[str]]] = {}
    for method in STORED_METHODS:
        here = home(method)
        resident, data = here.model(), here.batches(count=BATCHES)
        plan = quick(method).calibrate(resident, data)
        found[method] = {"resident": [block.digest for block in plan.blocks]}
        saved = folder / here.family
        if (saved / "config.json").is_file():
            streamed = open_model(saved, Opening(stream=True))
            plan = quick(method).calibrate(streamed, data)
            found[method]["streamed"] = [block.digest for block in plan.blocks]
    return found


def main(rendezvous: str, rank: int, folder: Path) -> None:
    """Decide in groups of three, two and one."""
    torch.set_num_threads(1)
    for count in range(WORKERS, 0, -1):
        if rank >= count:
            return
        meeting = f"file://{rendezvous}-{count}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=PATIENCE)
        found = decide(folder)
        dist.destroy_process_group()
        (folder / f"decided-{count}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
