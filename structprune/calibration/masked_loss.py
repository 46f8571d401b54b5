"""What a model loses on the calibration data with some of its units switched off; every figure is noted."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from structprune.calibration.notebook import Notebook
from structprune.models.arch import arch_of
from structprune.models.groups import BlockKeep
from structprune.models.identity import skeleton
from structprune.models.masking import masked, masked_block
from structprune.models.outputs import Output, outputs, per_token, tail
from structprune.models.rank_batches import rank_batches
from structprune.models.streamed import Batch, Model, StreamedModel
from structprune.models.walk import Walk
from structprune.plan.block import canonical


class MaskedLoss:
    """The loss of a model as a function of what stays of it; the model is left as it is.

    Args:
        model: In memory, or streamed: then every figure takes a walk through its files.
        batches: Calibration data.
        notes: Keeps every figure, so that none is computed twice.
    """

    def __init__(self, model: Model, batches: Sequence[Batch], notes: Notebook) -> None:
        self._model = model
        self._batches = rank_batches(batches)
        self._notes = notes

    @property
    def batches(self) -> int:
        """Return how many batches there are."""
        return len(self._batches.every)

    def __call__(self, keeps: Mapping[int, BlockKeep], batch: int | None = None) -> float:
        """Return the mean loss of the next tokens in nats, padding left out; infinite where it is not finite.

        Args:
            keeps: By index of the block, what stays on.
            batch: Look at one batch only; None for all.

        Raises:
            UsageError: What stays cannot run.
        """
        # Noted under what is switched off: a search that goes on may ask in another order.
        number = int.from_bytes(hashlib.sha256(f"{batch} {_text(keeps)}".encode()).digest()[:6])
        if not self._notes.has(number):
            self._notes.write(
                number, {"loss": torch.tensor(self._measured(keeps, batch), dtype=torch.float64)}
            )
        return float(self._notes.read(number)["loss"])

    @torch.no_grad()
    def _measured(self, keeps: Mapping[int, BlockKeep], wanted: int | None) -> float:
        numbers = [self._batches.number(position) for position in range(len(self._batches))]
        mine = [number for number in numbers if wanted in (None, number)]
        batches = [self._batches.every[number] for number in mine]
        # Of every batch its loss and its tokens: whoever computed them, they are added in this order.
        found = torch.zeros(self.batches, 2, dtype=torch.float64)
        for number, batch, output in zip(mine, batches, self._outputs(keeps, batches), strict=True):
            ids = batch["input_ids"].to(output.states.device)
            real = batch.get("attention_mask", torch.ones_like(ids)).to(ids.device).bool()
            predicts = real[:, :-1] & real[:, 1:]
            losses = per_token(
                _losses(output), output.vocabulary, ids[:, 1:][predicts], output.states[:, :-1][predicts]
            )
            found[number] = torch.tensor([float(losses.double().sum()), losses.numel()])
        self._batches.ranks.add_apart(found)
        total, tokens = (sum(column) for column in found.T.tolist())
        mean = total / max(tokens, 1)
        return mean if math.isfinite(mean) else math.inf

    def _outputs(self, keeps: Mapping[int, BlockKeep], batches: Sequence[Batch]) -> Iterator[Output]:
        if not isinstance(self._model, StreamedModel):
            with masked(self._model, keeps):
                yield from outputs(self._model, batches)
            return
        arch, walk = arch_of(skeleton(self._model)), Walk(self._model, batches)
        for block in walk:
            with masked_block(block.module, arch, keeps.get(block.index, BlockKeep())):
                block.advance()
        with tail(self._model) as finish:
            for batch in batches:
                yield finish(walk.hidden.pop(0), batch)


def _losses(output: Output) -> Any:
    def losses(targets: Tensor, states: Tensor) -> Tensor:
        return functional.cross_entropy(output.head(states).float(), targets, reduction="none")[None]

    return losses


def _text(keeps: Mapping[int, BlockKeep]) -> str:
    """Return what is switched off, with one spelling."""
    said: dict[str, dict[str, Any]] = {}
    for index, keep in sorted(keeps.items()):
        values = {one.name: getattr(keep, one.name) for one in fields(keep)}
        off = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in values.items()
            if value is not None and value is not True
        }
        said |= {str(index): off} if off else {}
    return canonical(said)
