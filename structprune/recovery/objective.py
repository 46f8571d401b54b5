"""What recovery trains on and is judged by: the next token, and what the dense model would have said.

Source: distillation with a temperature, Hinton et al. 2015, https://arxiv.org/abs/1503.02531
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from structprune.models.outputs import Output, per_token

UNKNOWN = -100  # the target of a position whose next token is not known; it costs nothing


class Losses(NamedTuple):
    """What one batch costs.

    Attributes:
        next_token: Cross-entropy of every window, in nats per predicted token, shape [batch].
        distillation: Mean divergence from the teacher per token, a scalar; None without one.
    """

    next_token: Tensor
    distillation: Tensor | None


def losses(
    output: Output, tokens: Tensor, *, dense: Output | None = None, temperature: float = 1.0
) -> Losses:
    """Return what a batch costs; all logits are made slice by slice, in the backward pass once more.

    Args:
        output: What the model that trains says of the batch.
        tokens: The batch, shape [batch, tokens]; the last position predicts nothing that is known.
        dense: What the teacher says of it; no gradient goes there.
        temperature: Of the distillation.
    """
    targets = functional.pad(tokens[:, 1:], (0, 1), value=UNKNOWN).flatten()
    models = [output] if dense is None else [output, dense]

    def measure(targets: Tensor, ours: Tensor, *theirs: Tensor) -> Tensor:
        logits = output.head(ours).float()
        loss = functional.cross_entropy(logits, targets, ignore_index=UNKNOWN, reduction="none")
        if dense is None:
            return loss[None]
        with torch.no_grad():
            expected = dense.head(theirs[0]).float()
        return torch.stack([loss, divergence(logits, expected, temperature)])

    found = per_token(measure, output.vocabulary, targets, *(one.states.flatten(0, 1) for one in models))
    next_token = found[0].view(tokens.shape).sum(dim=1) / (tokens.shape[1] - 1)
    return Losses(next_token, None if dense is None else found[1].mean())


def divergence(logits: Tensor, dense_logits: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 * KL(dense || pruned) of every token, both softened, shape [tokens].

    The square keeps the gradient's size whatever the temperature.

    Args:
        logits: Shape [tokens, vocabulary], of the model that trains.
        dense_logits: The same shape, of the teacher.
        temperature: Both are divided by it; above 0.
    """
    ours = functional.log_softmax(logits / temperature, dim=-1)
    theirs = functional.log_softmax(dense_logits / temperature, dim=-1)
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the rate of one step: up in a straight line, then down along a cosine.

    Args:
        step: From 0 to steps - 1.
        steps: How many there are.
        warmup: How many of them go up; the peak is reached at the last of these.
        peak: The highest rate.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
