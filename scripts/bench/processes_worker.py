"""What a worker of `processes.py` does: as each line of stdin says, and on stdout what it took.

python scripts/bench/processes_worker.py FOLDER NUMBER BATCH DTYPE
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PreTrainedModel

from structprune.errors import QualityError
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.pruners.catalogue import find
from structprune.ranks import Ranks
from structprune.recipe.options import RecoverOptions
from structprune.recovery.masks import nonzero_masks
from structprune.recovery.training import train

# Steps of recovery, and sequences of each.
STEPS, TRAINED = 2, 8
CALLS = ("all_reduce", "gather", "broadcast", "all_gather", "barrier")


def job_of(
    model: PreTrainedModel, ids: torch.Tensor, method: str, way: str, batch: int
) -> Callable[[], None]:
    """Return what is timed: deciding, or a few steps of recovery; half of it for whoever works by halves."""
    share = 2 if way == "halves" else 1
    if method == "recover":
        asked = RecoverOptions(
            steps=STEPS, batch_size=TRAINED // share, length=ids.shape[1], check_every=STEPS
        )
        masks = nonzero_masks(model)

        def recover() -> None:
            # That so few steps may be no gain is no matter here.
            with contextlib.suppress(QualityError):
                train(model, masks, ids, asked, ranks=Ranks.here())

        return recover
    pruner = find(method).model_validate({"sparsity": 0.5})
    batches = [{"input_ids": one} for one in torch.split(ids[: len(ids) // share], batch)]
    writer = pruner.writer(None, model, "weights")

    def calibrate() -> None:
        pruner.calibrate(model, batches, writer)

    return calibrate


def timed(job: Callable[[], None]) -> dict[str, float]:
    """Return the seconds of the processor and of the wall, and both inside calls of the group."""
    found = {"sending": 0.0, "inside": 0.0}
    with counted_calls(found):
        cpu, wall = time.process_time(), time.perf_counter()
        job()
        return found | {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


@contextlib.contextmanager
def counted_calls(found: dict[str, float]) -> Iterator[None]:
    """Add up what calls of torch.distributed take, for the length of a `with`."""
    former = {name: getattr(dist, name) for name in CALLS}

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                found["sending"] += time.process_time() - cpu
                found["inside"] += time.perf_counter() - wall

        return run

    for name, call in former.items():
        setattr(dist, name, counted(call))
    try:
        yield
    finally:
        for name, call in former.items():
            setattr(dist, name, call)


def main(folder: Path, number: int, batch: int, dtype: str) -> None:
    """Work until there are no more lines."""
    torch.set_num_threads(1)
    model = open_model(folder, Opening(dtype=dtype, stream=False))
    assert isinstance(model, PreTrainedModel)
    ids = load_file(folder.with_name("ids.safetensors"))["ids"]
    for line in sys.stdin:
        method, way, meeting = json.loads(line)
        job = job_of(model, ids, method, way, batch)
        if way == "together":
            patience = timedelta(hours=1)
            meet = f"file://{meeting}"
            dist.init_process_group("gloo", init_method=meet, rank=number, world_size=2, timeout=patience)
            dist.barrier()
        found = timed(job)
        if way == "together":
            dist.destroy_process_group()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
