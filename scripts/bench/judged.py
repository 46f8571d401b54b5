"""What benches of quality hold a pruned model against: what the dense one says, asked once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.evaluation.perplexity import Scores, Windows, score
from structprune.evaluation.speed import timed_pass
from structprune.models.outputs import Output, outputs
from structprune.models.streamed import Batch, Model


class Judged:
    """Windows of a text, with what the dense model says of them.

    Args:
        dense: The model that others are compared with.
        windows: What is scored.
        batch_size: Windows per forward.
    """

    def __init__(self, dense: PreTrainedModel, windows: Windows, batch_size: int) -> None:
        self._dense, self._windows, self._batch_size = dense, windows, batch_size
        parts = torch.split(windows.inputs, batch_size)
        self._said = [*outputs(dense, [{"input_ids": part.clone()} for part in parts])]

    def score(self, model: Model) -> Scores:
        """Return how a model does on the windows."""
        return score(model, self._windows, dense=self._dense, say=self._say, batch_size=self._batch_size)

    def of(self, dense: PreTrainedModel) -> "Judged":
        """Return the same windows with what another model says of them."""
        return Judged(dense, self._windows, self._batch_size)

    def _say(self, dense: Model, batches: Sequence[Batch]) -> Iterator[Output]:
        assert len(batches) == len(self._said)
        yield from self._said


def written(model: PreTrainedModel, prompts: Tensor, tokens: int) -> list[list[int]]:
    """Return the likeliest continuation of each prompt, so many tokens long."""
    found: list[list[int]] = timed_pass(model, prompts, tokens).tokens.tolist()
    return found
