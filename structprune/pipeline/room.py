"""How much a run writes, and whether weights that it does not change may stay where they are."""

from collections.abc import Sequence
from pathlib import Path

from structprune.checkpoint.output import check_linkable
from structprune.checkpoint.writing import Writing
from structprune.models.cost import weight_bytes, weight_files
from structprune.pruners.pruner import Pruner


def bytes_written(folder: Path, stages: Sequence[Pruner], output: Path, writing: Writing) -> int:
    """Return how many bytes of weights a run can write at most.

    A reflink is counted as a copy: whether the disk can do it shows only when it is done.

    Args:
        folder: The model.
        stages: What prunes it.
        output: The folder to write.
        writing: How.

    Raises:
        UsageError: A stage changes weights that are only to be referred to.
        EnvironmentFailure: Files are to be linked, and lie on another disk than the output.
    """
    if changing := [stage.method() for stage in stages if not stage.at_run_time]:
        writing.refuse("refer", because=f"{' and '.join(changing)} changes weights, so they must be written")
    if writing.unchanged == "link":
        check_linkable(weight_files(folder), output)
    return weight_bytes(folder) if changing or writing.unchanged == "copy" else 0
