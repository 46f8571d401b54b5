"""What a worker of a group of processes does: it trains with the others, in copies and divided.

Three workers train as a group of three; then the first two as a group of two.
"""

import gc
import itertools
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from structprune.errors import Interrupted
from structprune.models.opening import Opening
from structprune.models.streamed import StreamedModel, open_model
from structprune.progress import Progress, silent
from structprune.ranks import Ranks
from structprune.recovery import masked_lora, sharding
from structprune.recovery.masks import masks_of
from structprune.recovery.outcome import Recovery
from structprune.recovery.state import TrainingState
from structprune.recovery.training import train, train_divided
from structprune.storage.tensor_file import save_tensors
from tests.recovering import options, walks

WORKERS = 3
PATIENCE = timedelta(seconds=300)
STEPS = 50
FEW: dict[str, Any] = {"steps": 6, "check_every": 3, "learning_rate": 1e-2}
FAMILIES = ("llama", "gpt2", "mixtral", "gemma3")
KINDS = (Tensor, torch.nn.Parameter)
MATRICES = 7  # of a block
DEEP, DENSE = "deep", "dense"


def streamed(folder: Path) -> StreamedModel:
    """Open a model of which nothing is in memory."""
    model = open_model(folder, Opening(stream=True, device="cpu"))
    assert isinstance(model, StreamedModel)
    return model


def divided(folder: Path, teacher: Path | None = None, **more: Any) -> tuple[Recovery, StreamedModel]:
    """Train with a part of the model in each process; return what came of it, and the part."""
    model = streamed(folder)
    state, progress = more.pop("state", None), more.pop("progress", silent)
    found = train_divided(
        model,
        [],
        walks(96, seed=20_000),
        options(**more),
        teacher=streamed(teacher) if teacher else None,
        ranks=Ranks.here(),
        state=state,
        progress=progress,
    )
    return found, model


def copied(folder: Path, teacher: Path | None = None, **more: Any) -> tuple[Recovery, Any]:
    """Train with the whole model in each process; return what came of it, and the model."""
    model: Any = open_model(folder, Opening(stream=False, device="cpu"))
    dense: Any = open_model(teacher, Opening(stream=False, device="cpu")) if teacher else None
    state = more.pop("state", None)
    found = train(
        model,
        masks_of(model, []),
        walks(96, seed=20_000),
        options(**more),
        teacher=dense,
        ranks=Ranks.here(),
        state=state,
    )
    return found, model


def facts(recovery: Recovery) -> dict[str, Any]:
    """Return the losses of a training."""
    return {
        "start": recovery.start_loss,
        "train": [check.train_loss for check in recovery.history],
        "held_out": [check.held_out_loss for check in recovery.history],
    }


def write_factors(path: Path, recovery: Recovery) -> None:
    """Write the best change, from the process that has it."""
    tensors = {f"{name}.left": one.left for name, one in recovery.factors.items()}
    tensors |= {f"{name}.right": one.right for name, one in recovery.factors.items()}
    if Ranks.here().first:
        save_tensors(path, tensors)


def stop_at(step: int) -> Progress:
    """Stop the training in a step, before its check."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "recover" and done == step:
            raise Interrupted(signal.SIGTERM)

    return stop


@contextmanager
def counting() -> Iterator[list[int]]:
    """Note the bytes of all matrices in memory when a block is divided, and once while it runs."""
    found: list[int] = [0]
    calls = itertools.count()

    def census() -> None:
        # Activations have three dimensions, matrices two and their parts one.
        alive = [one for one in gc.get_objects() if type(one) in KINDS and one.ndim < 3]
        stores = [one.untyped_storage() for one in alive if one.device.type == "cpu"]
        found[0] = max(found[0], sum({store.data_ptr(): store.nbytes() for store in stores}.values()))

    def counted(function: Any, every: int) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls) % every == 0:
                census()
            return function(*args, **kwargs)

        return run

    gc.collect()
    gc.freeze()  # what is there already is not looked at each time
    with (
        mock.patch.object(sharding, "fully_shard", counted(sharding.fully_shard, 1)),
        mock.patch.object(masked_lora, "add_masked", counted(masked_lora.add_masked, MATRICES)),
    ):
        yield found
    gc.unfreeze()


def memory(folder: Path) -> dict[str, Any]:
    """Return what a training in parts holds: at rest, and at its peak beside that of a whole model."""
    few = {"steps": 1, "check_every": 1, "rank": 1, "batch_size": Ranks.here().count}
    with counting() as peak:
        recovery, model = divided(folder / DEEP, **few)
    del recovery
    parameters = dict(model.skeleton.named_parameters())
    parts = [one.to_local() for one in parameters.values() if isinstance(one, DTensor)]
    with counting() as whole_peak:
        copied(folder / DEEP, **few)
    return {
        "whole": [name for name, one in parameters.items() if not isinstance(one, DTensor)],
        "rest": sum(one.untyped_storage().nbytes() for one in parts),
        "bytes": sum(one.numel() * one.element_size() for one in parameters.values()),
        "peak": peak[0],
        "whole_peak": whole_peak[0],
    }


def three(folder: Path) -> dict[str, Any]:
    """Train as a group of three, which no size of the model is a multiple of."""
    ways: dict[str, Any] = {"copied": copied, "divided": divided}
    return {way: facts(run(folder / "llama", **FEW, batch_size=6)[0]) for way, run in ways.items()}


def two(folder: Path) -> dict[str, Any]:
    """Train as a group of two."""
    found: dict[str, Any] = {}
    long = {"steps": STEPS, "check_every": 1, "learning_rate": 5e-3}
    found["long copied"] = facts(copied(folder / "llama", **long)[0])
    found["long divided"] = facts(divided(folder / "llama", **long)[0])
    for family in FAMILIES:
        recovery, model = divided(folder / family, **FEW)
        write_factors(folder / f"divided-{family}", recovery)
        found[family] = facts(recovery) | {
            "left": [
                str(p.device) for _, p in model.skeleton.named_parameters() if not isinstance(p, DTensor)
            ]
        }
    for family in ("llama", "mixtral"):
        recovery, _ = divided(folder / family, gradient_checkpointing=True, **FEW)
        found[f"checkpointing {family}"] = facts(recovery)
    found["teacher"] = facts(divided(folder / "llama", folder / DENSE, **FEW)[0])
    state = folder / "state"
    try:
        divided(folder / "llama", state=TrainingState(state), progress=stop_at(5), **FEW)
    except Interrupted:
        dist.barrier()
    found["state"] = sorted(path.name for path in state.iterdir())
    recovery, _ = divided(folder / "llama", state=TrainingState(state), **FEW)
    write_factors(folder / "resumed", recovery)
    found["resumed"] = facts(recovery) | {"steps": recovery.steps_resumed}
    copied(folder / "llama", state=TrainingState(folder / "copied"), **FEW)
    found["bfloat16"] = facts(divided(folder / "llama", dtype="bfloat16", **FEW)[0])
    found["memory"] = memory(folder)
    return found


def main(rendezvous: str, rank: int, folder: Path) -> None:
    """Train in groups of three and two."""
    torch.set_num_threads(1)
    for count, run in ((3, three), (2, two)):
        if rank >= count:
            return
        meeting = f"file://{rendezvous}-{count}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=PATIENCE)
        found = run(folder)
        dist.destroy_process_group()
        (folder / f"{count}-{rank}.json").write_text(json.dumps(found))
