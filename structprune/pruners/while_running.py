"""A model with a decision for the length of a `with`, where no folder is to be written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from structprune.errors import UsageError
from structprune.models.streamed import Batch
from structprune.plan.plan import Plan
from structprune.pruners.catalogue import find
from structprune.pruners.pruner import Pruner


@contextmanager
def pruning(
    model: PreTrainedModel, pruner: Pruner | Plan | str, batches: Sequence[Batch] = ()
) -> Iterator[Plan]:
    """Let a model run pruned for the length of a `with`; afterwards it is as it was.

    Args:
        model: In memory.
        pruner: Of a method that works while the model runs; or its name, for its defaults; or what one
            decided before.
        batches: What it is calibrated on, where the method needs data.

    Yields:
        What was decided.

    Raises:
        UsageError: The method changes weights; or it needs data, and there is none.
    """
    plan, chosen = None, pruner
    if isinstance(pruner, Plan):
        plan, chosen = pruner, find(pruner.method).model_validate(pruner.config)
    elif isinstance(pruner, str):
        chosen = find(pruner)()
    assert isinstance(chosen, Pruner)
    if not chosen.at_run_time:
        raise UsageError(
            f"{chosen.method()} changes the weights, not how a model runs",
            hint="prune a checkpoint with structprune.prune",
        )
    if plan is None and chosen.needs_data and not batches:
        raise UsageError(f"{chosen.method()} needs data to decide", hint="pass batches with images")
    if plan is None:
        plan = chosen.calibrate(model, batches)
    chosen.apply(model, plan)
    try:
        yield plan
    finally:
        chosen.undo(model, plan)
