"""Independent work on the tensors of a block, on the processes of a run."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from structprune.plan.key import Key
from structprune.ranks import Ranks

Work = tuple[int, Callable[[], Mapping[Key, Tensor]]]
"""Which process does it, and what returns the tensors that come of it."""


def tensors_on_ranks(work: Sequence[Work], ranks: Ranks) -> dict[Key, Tensor]:
    """Return the tensors that come of all the work; every process does its own and is told the rest.

    Args:
        work: Each for one process.
        ranks: Those who share the run.

    Raises:
        StructpruneError: One process met it; all raise it.
    """
    found: dict[Key, Tensor] = {}

    def do() -> tuple[None, dict[str, Tensor]]:
        for owner, make in work:
            if owner == ranks.number:
                found.update(make())
        return None, {str(key): value for key, value in found.items()}

    for number, (_, told) in enumerate(ranks.share(do)):
        if number != ranks.number:
            found |= {Key.parse(text): value for text, value in told.items()}
    return found
