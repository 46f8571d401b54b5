"""How a run treats the place that it writes to: a value that travels whole from the command line."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Writing:
    """How to write a result.

    Args:
        overwrite: Replace an existing output once the new one is complete.
        restart: Forget what an interrupted run left, rather than to go on from it.
        reload: Open the result in a fresh process; without it the proof is of the files alone.
        keep: A complete result of the very same run stays as it is, and its report is read back.
    """

    overwrite: bool = False
    restart: bool = False
    reload: bool = True
    keep: bool = False
