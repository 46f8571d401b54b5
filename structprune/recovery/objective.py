"""What recovery trains on and is judged by: the next token, and what the dense model would have said.

Source: distillation with a temperature, Hinton et al. 2015, https://arxiv.org/abs/1503.02531
"""

import math

from torch import Tensor
from torch.nn import functional


def next_token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of every window, in nats per predicted token, shape [batch].

    Args:
        logits: Shape [batch, tokens, vocabulary]; the last position predicts nothing that is known.
        tokens: Shape [batch, tokens].
    """
    predictions = logits[:, :-1].float()
    losses = functional.cross_entropy(predictions.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(tokens.shape[0], -1).mean(dim=1)


def distillation_loss(logits: Tensor, dense_logits: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 * mean KL(dense || pruned) per token, both softened; a scalar.

    The square keeps the gradient's size whatever the temperature.

    Args:
        logits: Shape [batch, tokens, vocabulary], of the model that trains.
        dense_logits: The same shape, of the teacher.
        temperature: Both are divided by it; above 0.
    """
    ours = functional.log_softmax(logits.float() / temperature, dim=-1).flatten(0, 1)
    theirs = functional.log_softmax(dense_logits.float() / temperature, dim=-1).flatten(0, 1)
    divergence = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return divergence * temperature**2


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
