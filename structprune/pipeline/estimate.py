"""What a run takes of each of the processes that share it: bytes, and from measured rates its time."""

from collections.abc import Sequence
from typing import Any

from structprune.evaluation.footprint import free_bytes
from structprune.evaluation.rates import Rates, Site, choose_rates, rates_file, read_rates
from structprune.models.arch import blocks
from structprune.models.cost import stored_bytes
from structprune.models.identity import skeleton, stored_layout
from structprune.models.opening import RESIDENT_COPIES
from structprune.models.streamed import Model
from structprune.pruners.demand import Demand, Sharing
from structprune.pruners.pruner import Pruner
from structprune.recipe.options import RecoverOptions
from structprune.recovery.demand import (
    state_bytes,
    step_sharing,
    training_bytes,
    training_demand,
)
from structprune.storage.tensor_file import nbytes_of

# What Python, torch and transformers take before any weight is read; measured on Linux, CPU build.
RUNTIME_BYTES = 450_000_000
MEASURE = "structprune bench --rates"
CONSISTS = "of deciding, each part after the other; writing, measuring and proving come on top"


def estimate_run(
    stages: Sequence[Pruner], models: Sequence[Model], sharing: Sharing, device: str
) -> dict[str, Any]:
    """Return what deciding takes of the process that does most.

    Args:
        stages: In order.
        models: What each of them finds; the first is that of the files.
        sharing: How much data is looked at, and by how many processes.
        device: Where they compute.

    Returns:
        "check" and "load": bytes read before the first stage; "stages": of each "method", the bytes that its
        walks read, those that all processes send for a block and in all, and "seconds" by what takes them;
        "seconds" of all together, and "time", what they are made of; None where no rates were measured.
    """
    place = Site.here(device, sharing.ranks)
    rates, word = choose_rates(read_rates(rates_file()), place)
    stored = stored_bytes(models[0])
    first = {"check_bytes": stored.all // sharing.ranks, "load_bytes": 0 if sharing.streamed else stored.all}
    found: list[dict[str, Any]] = []
    seconds = 0.0
    for stage, model in zip(stages, models, strict=True):
        demand, dtype = stage.demand(model, sharing), str(model.dtype).removeprefix("torch.")
        if demand is None:
            found.append({"method": stage.method(), "seconds": None})
            continue
        taken = None if rates is None else seconds_of(demand, rates, dtype)
        seconds += 0.0 if taken is None else sum(taken.values())
        found.append(
            {
                "method": stage.method(),
                "read_bytes": round(demand.read_bytes),
                "reduced_per_block_bytes": round(demand.sent_bytes / len(stored.blocks)),
                "reduced_bytes": round(demand.sent_bytes),
                "seconds": taken and {part: float(f"{value:.3g}") for part, value in taken.items()},
            }
        )
    if rates is None:
        launched = f"torchrun --nproc-per-node {sharing.ranks} -m " if sharing.ranks > 1 else ""
        hint = f"no rates of this machine: `{launched}{MEASURE}` measures some"
        return first | {"stages": found, "seconds": None, "time": f"{word}; {hint}" if word else hint}
    seconds += sum(first.values()) / rates.read_bytes
    return first | {
        "stages": found,
        "seconds": float(f"{seconds:.3g}"),
        "time": f"{CONSISTS}; {word}" if word else CONSISTS,
    }


def estimate_training(
    options: RecoverOptions, model: Model, teacher: Model | None, device: str
) -> dict[str, Any]:
    """Return what a recovery by one process takes.

    Args:
        options: How to train.
        model: What is trained; a twin without weights is enough.
        teacher: What it imitates, if anything.
        device: Where it computes.

    Returns:
        "steps"; "memory_bytes", and "free_bytes" of the device; "state_bytes" on disk while it trains;
        "seconds" of all steps and looks at the held-out text, None where no rates were measured.
    """
    sharing = step_sharing(options, model)
    needed = RUNTIME_BYTES + training_bytes(options, model, teacher, sharing, device)
    found: dict[str, Any] = {
        "steps": options.steps,
        "memory_bytes": needed,
        "free_bytes": free_bytes(device),
        "state_bytes": state_bytes(options, model),
    }
    rates, _ = choose_rates(read_rates(rates_file()), Site.here(device, 1))
    if rates is None:
        return found | {"seconds": None}
    taken = seconds_of(training_demand(options, model, teacher, sharing), rates, options.dtype)
    return found | {"seconds": float(f"{sum(taken.values()):.3g}")}


def memory_bytes(stages: Sequence[Pruner], model: Model, sharing: Sharing) -> int:
    """Return the peak that each process is expected to need: runtime, weights held at once, activations.

    Args:
        stages: In order.
        model: What the first finds; its files tell how large its tensors are.
        sharing: How much data is looked at, and by how many processes.
    """
    item = model.dtype.itemsize
    sizes = [nbytes_of(dtype, shape) for one in stored_layout(model).values() for _, dtype, shape in one]
    one = [sum(p.numel() for p in block.parameters()) * item for _, block in blocks(skeleton(model))]
    held = max(3 * max(one), 2 * max(sizes)) if sharing.streamed else int(sum(sizes) * RESIDENT_COPIES)
    hidden: int = model.config.get_text_config().hidden_size
    activations = sharing.tokens * hidden * item
    needs_data = any(pruner.looks_at_data for pruner in stages)
    looked_at = max(pruner.remembered_bytes(model, sharing.ranks) for pruner in stages)
    return RUNTIME_BYTES + held + (2 * activations + looked_at if needs_data else 0)


def seconds_of(demand: Demand, rates: Rates, dtype: str) -> dict[str, float]:
    """Return how long each part of deciding takes; "reduce" where its rate was measured.

    Args:
        demand: What it takes.
        rates: What a process does in a second.
        dtype: What the model computes in.
    """
    single = rates.flops["float32"]
    parts = {
        "read": demand.read_bytes / rates.read_bytes,
        "forward": demand.forward / rates.flops[dtype] + demand.state_bytes / rates.moved_bytes,
        "statistics": demand.products / single
        + demand.squares / rates.squared
        + demand.moved_bytes / rates.moved_bytes,
        "solve": demand.solving.products / single + demand.solving.ranked / rates.ranked,
    }
    if rates.sent_bytes is not None:
        parts["reduce"] = demand.link_bytes / rates.sent_bytes
    return parts
