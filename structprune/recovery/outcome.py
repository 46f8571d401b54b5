"""What training led to, so far or at its end."""

from dataclasses import dataclass, field
from typing import NamedTuple

from structprune.checkpoint.adapter import LowRankChange


class HeldOutCheck(NamedTuple):
    """One look at the held-out windows; losses in nats per token."""

    step: int
    train_loss: float
    held_out_loss: float


@dataclass
class Recovery:
    """What training led to.

    Args:
        start_loss: Held-out loss before the first step, in nats per token.
        best_loss: The lowest held-out loss, measured with weights rounded as they are stored.
        best_step: The step it was measured after; 0 while nothing beats the start.
        history: Every check, in order.
        stopped: Why training ended early; empty when it ran to its end.
        factors: The change at the best step, by parameter name, float32.
        steps_resumed: Steps that an earlier, interrupted run had taken.
        zeros: How many weights of each changed tensor are zero, before and after, by parameter name.
    """

    start_loss: float
    best_loss: float
    best_step: int = 0
    history: list[HeldOutCheck] = field(default_factory=list)
    stopped: str = ""
    factors: dict[str, LowRankChange] = field(default_factory=dict)
    steps_resumed: int = 0
    zeros: dict[str, int] = field(default_factory=dict)
