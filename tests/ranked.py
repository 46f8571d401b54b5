"""What a worker of a group of processes does: every method decides, and what it decided is told.

    python -m tests.ranked RENDEZVOUS RANK FOLDER

Three workers decide as a group of three; then the first two as a group of two, and the first one alone.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from structprune.errors import InputError
from structprune.models.opening import Opening
from structprune.models.streamed import Model, open_model
from structprune.ranks import Ranks
from tests.methods import STORED_METHODS, home, quick

WORKERS = 3
# Divided by neither two nor three.
BATCHES = 5
PATIENCE = timedelta(seconds=300)


def decide(folder: Path, group: str) -> dict[str, dict[str, list[str]]]:
    """Return by method and way of opening the digests of the blocks that a group decides on."""
    found: dict[str, dict[str, list[str]]] = {}
    for method in STORED_METHODS:
        here = home(method)
        ways: dict[str, Model] = {
            "resident": here.model(),
            "streamed": open_model(folder / here.family, Opening(stream=True)),
        }
        found[method] = {}
        for way, model in ways.items():
            plan = quick(method).calibrate(model, here.batches(count=BATCHES))
            found[method][way] = [block.digest for block in plan.blocks]
        if dist.get_rank() == 0:
            plan.save(folder / f"{group}-{method}")
    return found


def talk(folder: Path) -> dict[str, Any]:
    """Return what a process hears when it talks with the others."""
    ranks = Ranks.here()
    own = folder / f"own-{ranks.count}-{ranks.number}"
    if ranks.first:
        (own / "plans").mkdir(parents=True)
        (own / "plans" / "block").write_bytes(bytes(range(256)))
    ranks.copy_files(own)
    apart, ordered = torch.zeros(ranks.count), torch.full((3, 5), 0.1) * (ranks.number + 1)
    apart[ranks.number] = 0.1
    ranks.add_apart(apart)
    ranks.add_in_order(ordered)
    try:
        ranks.check_alike("this run", {"weights": ranks.number, "seed": 0})
        refused = ""
    except InputError as error:
        refused = str(error)
    return {
        "told": [
            [said, tensors["x"].tolist()] for said, tensors in ranks.tell_each(ranks.number, {"x": apart})
        ],
        "copied": [*(own / "plans" / "block").read_bytes()],
        "ordered": ordered.tolist(),
        "refused": refused,
    }


def main(rendezvous: str, rank: int, folder: Path) -> None:
    """Decide in groups of three, two and one."""
    torch.set_num_threads(1)
    for count in range(WORKERS, 0, -1):
        if rank >= count:
            return
        meeting = f"file://{rendezvous}-{count}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=PATIENCE)
        found: dict[str, Any] = {"": talk(folder), **decide(folder, f"{count}")}
        dist.destroy_process_group()
        (folder / f"{count}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
