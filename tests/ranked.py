"""What a worker of a group of processes does: every method decides, and what it decided is told.

Three workers decide as a group of three; then the first two as a group of two, and the first one alone.
"""

import json
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from structprune.calibration.collect import collect_inputs
from structprune.errors import InputError, MethodError, QualityError, StructpruneError
from structprune.models.opening import Opening
from structprune.models.rank_batches import RankBatches
from structprune.models.streamed import Model, open_model
from structprune.models.walk import Walk
from structprune.pruners.pruner import Pruner
from structprune.ranks import Ranks
from structprune.storage import scan
from structprune.storage.reader import CheckpointReader
from tests.counted import WORKERS as COUNTED
from tests.counted import count as count_bytes
from tests.methods import STORED_METHODS, Home, home, quick

WORKERS, STREAMED = 3, 2
# Divided by neither two nor three.
BATCHES = 5
PATIENCE = timedelta(seconds=300)


@dataclass(frozen=True)
class Case:
    """What a group decides.

    Attributes:
        method: Which method.
        home: On what it is tried.
        fields: Of the method.
    """

    method: str
    home: Home
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def pruner(self) -> Pruner:
        """Return the pruner."""
        return quick(self.method, **self.fields)


CASES = {
    **{method: Case(method, home(method)) for method in STORED_METHODS},
    "experts": Case("sparsegpt", Home("mixtral")),
    "experts by a pattern": Case("alps", Home("mixtral"), {"sparsity": "2:4", "include": ["experts"]}),
    "experts with a repair": Case("wanda", Home("mixtral"), {"repair": "least_squares"}),
    "transposed": Case("thanos", Home("gpt2")),
    "dense": Case("sparsegpt", Home("llama"), {"propagate": "dense"}),
    "budget": Case("alps", Home("llama"), {"budget": "owl"}),
    "units with a refit": Case("flap", Home("llama"), {"repair": "least_squares"}),
    "gradients with a refit": Case("llm_pruner", Home("llama"), {"repair": "least_squares"}),
}


def decide(folder: Path, group: str) -> dict[str, dict[str, list[str]]]:
    """Return by case and way of opening the digests of the blocks that a group decides on."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, case in CASES.items():
        ways: dict[str, Model] = {"resident": case.home.model()}
        # Once is enough: what a group shares does not depend on where its weights are.
        if name == case.method and dist.get_world_size() == STREAMED:
            ways["streamed"] = open_model(folder / case.home.family, Opening(stream=True))
        found[name] = {}
        for way, model in ways.items():
            plan = case.pruner.calibrate(model, case.home.batches(count=BATCHES))
            found[name][way] = [block.digest for block in plan.blocks]
        if dist.get_rank() == 0:
            plan.save(folder / f"{group}-{name}")
    return found


def grams(ranks: Ranks) -> dict[str, float]:
    """Return of the Gram matrices of a mixture's block that a process has the sums of all elements."""
    here = Home("mixtral")
    block = next(iter(Walk(here.model(), RankBatches(here.batches(count=BATCHES), ranks))))
    found = collect_inputs(block, block.linears, frozenset({"gram"}), advance=False)
    mine = {label for label, owner in found.owners.items() if owner == ranks.number}
    for label in found.inputs.keys() - mine:
        with pytest.raises(LookupError, match="another process"):
            _ = found.inputs[label].gram
    return {label: float(found.inputs[label].gram.double().sum()) for label in mine}


def read(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Return what a process finds in weights that all scan, how many tensors it read, and what it refused."""
    numbers: list[str] = []
    scan_tensor = scan._scan_tensor

    def counted(descriptor: int, path: Path, info: Any, buffer: torch.Tensor) -> Any:
        numbers.append(info.name)
        return scan_tensor(descriptor, path, info, buffer)

    scan._scan_tensor = counted
    try:
        whole = CheckpointReader(folder / "llama").scan(ranks=ranks)
        return {
            "weights": whole.weights,
            "read": len(numbers),
            "of": len(whole.tensors),
            "damaged": refusal(lambda: CheckpointReader(folder / "damaged").scan(ranks=ranks)),
            # Each has a copy of its own.
            "own": CheckpointReader(folder / f"copy-{ranks.number}").scan(ranks=ranks).weights,
        }
    finally:
        scan._scan_tensor = scan_tensor


def refusal(work: Any) -> list[Any]:
    """Return the kind of error that some work ends with, its message, and which process met it."""
    try:
        work()
    except StructpruneError as error:
        return [type(error).__name__, error.message, error.rank]
    return []


def fail(ranks: Ranks, kind: type[StructpruneError]) -> tuple[None, dict[str, torch.Tensor]]:
    """Fail in the last process."""
    if ranks.number == ranks.count - 1:
        raise kind("no factor", hint="give it more")
    return None, {}


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
    sent = torch.arange(ranks.count)[:, None] + 10 * ranks.number
    return {
        **read(folder, ranks),
        "grams": grams(ranks),
        "met": [
            refusal(partial(ranks.share, partial(fail, ranks, kind))) for kind in (QualityError, MethodError)
        ],
        "exchanged": ranks.exchange(sent, [1] * ranks.count, [1] * ranks.count).flatten().tolist(),
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
        if count == COUNTED:
            found["counted"] = count_bytes(folder / "llama")
        dist.destroy_process_group()
        (folder / f"{count}-{rank}.json").write_text(json.dumps(found))
