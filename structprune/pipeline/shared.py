"""A run that several processes share: all decide and measure, the first alone writes, proves and reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structprune.calibration.data import Calibration
from structprune.checkpoint.source import Source
from structprune.errors import UsageError
from structprune.evaluation.exam import Exam
from structprune.pipeline.decision import decide, shaping_versions
from structprune.pipeline.finish import measure
from structprune.progress import silent
from structprune.pruners.pruner import Pruner
from structprune.ranks import Ranks
from structprune.recipe.recipe import Recipe
from structprune.storage.scratch import scratch_folder


def check_command(recipe: Recipe, ranks: Ranks) -> None:
    """Check that the processes of a run, before they do anything together, are asked for the same.

    Raises:
        InputError: One is asked for something else, or has another version.
    """
    steps = [{"method": step.method(), **step.model_dump(mode="json")} for step in recipe.prune]
    ranks.check_alike("this run", {"prune": steps, "versions": shaping_versions()})


def check_shared(
    recipe: Recipe, calibration: Calibration | None, run: Mapping[str, Any], ranks: Ranks
) -> None:
    """Check that the processes of a run do the same, and that there is enough to do for each.

    Args:
        recipe: The run.
        calibration: What it looks at.
        run: What shapes its bytes and its figures, as this process sees it.
        ranks: Those who share it.

    Raises:
        InputError: One has another model, other data or another version.
        UsageError: There are more of them than batches, or the run cannot be shared.
    """
    if ranks.alone:
        return
    if "scores" in run:
        raise UsageError("--scores: there is nothing to share", hint="leave the launcher out")
    sizes = [len(batch["input_ids"]) for batch in calibration.batches] if calibration else []
    check_division(recipe, sizes, ranks.count)
    ranks.check_alike("this run", run)


def check_division(recipe: Recipe, batches: Sequence[int], count: int) -> None:
    """Check that several processes can share a run.

    Args:
        recipe: The run.
        batches: Samples of each batch that it looks at; empty where it looks at none.
        count: How many processes there are.

    Raises:
        UsageError: It is the work of one process, or there are fewer batches than processes.
    """
    if recipe.recover is not None:
        raise UsageError(
            "recover: trains in a launch of its own", hint="prune first, then torchrun ... recover OUT"
        )
    if any(step.at_run_time for step in recipe.prune):
        raise UsageError(
            f"{recipe.prune[-1].method()}: works while a model runs and is decided by one process",
            hint="leave the launcher out",
        )
    if 0 < len(batches) < count:
        fitting = sum(batches) // count
        raise UsageError(
            f"{count} processes for {len(batches)} batches: each needs one",
            hint=f"--set calibration.batch_size={fitting}" if fitting else "give more --samples",
        )


def assist(
    stages: Sequence[Pruner], source: Source, calibration: Calibration | None, exam: Exam, ranks: Ranks
) -> None:
    """Decide and measure beside the first process: what it writes is kept in a folder that goes.

    Args:
        stages: In order.
        source: What is pruned, in place.
        calibration: What the stages look at.
        exam: What the result is measured on.
        ranks: Those who share the run.
    """
    begun, _ = ranks.tell(0)
    if begun["decides"]:
        with scratch_folder("rank") as place:
            decide(stages, source, calibration, Path(place), silent)
            measure(source, source, exam, ranks=ranks)
