"""Recovery: train a masked low-rank change on text, keep what helps on text that was kept away, merge it.

Everything is computed in float32 whatever dtype the model is stored in: in half precision a step of this size
is lost in rounding, or the loss explodes. What counts is measured with weights rounded to the stored dtype.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from structprune.checkpoint.adapter import LowRankChange, merge
from structprune.errors import InputError, QualityError
from structprune.models.outputs import BodyAndHead
from structprune.progress import Progress
from structprune.recipe.options import RecoverOptions
from structprune.recovery.masked_lora import MaskedLayers
from structprune.recovery.masks import check_merged, reapply, zeros
from structprune.recovery.objective import Losses, learning_rate, losses
from structprune.recovery.windows import split_off

log = logging.getLogger(__name__)


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
    """

    start_loss: float
    best_loss: float
    best_step: int = 0
    history: list[HeldOutCheck] = field(default_factory=list)
    stopped: str = ""
    factors: dict[str, LowRankChange] = field(default_factory=dict)


def main_process(device: str = "auto") -> bool:
    """Tell whether this process is the one that writes, when a launcher started several.

    Args:
        device: As given to `train`.
    """
    from accelerate import PartialState

    return bool(PartialState(cpu=device == "cpu").is_main_process)


def train(
    model: PreTrainedModel,
    masks: Mapping[str, Tensor],
    windows: Tensor,
    options: RecoverOptions,
    *,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Recovery:
    """Recover a pruned model in place: train, keep the best, merge; no removed weight comes back.

    Args:
        model: In the dtypes it will be saved in; they are the same afterwards.
        masks: By parameter name, in the parameter's layout, True = kept. These tensors train. A weight
            that is zero though its mask keeps it stays zero too, so that the measured sparsity does not move.
        windows: Token ids, shape [windows, length]; a part of them is held out.
        options: How to train.
        teacher: The dense model; its logits are imitated in the proportion that the options give. It is moved
            to the device, otherwise unchanged.
        seed: Of the split, of the order and of the first factors.
        device: "auto" for the accelerator there is, or "cpu".
        progress: Called with "recover", steps done, steps in all.

    Returns:
        The losses and the best change; `model` has it merged.

    Raises:
        QualityError: Nothing beats the start, or the loss is not a number before anything did; the model's
            weights are then as they were.
        InputError: Too few windows, a tensor that cannot be trained, or a teacher with another vocabulary.
    """
    training, held_out = split_off(windows, options.held_out, seed)
    if teacher is not None:
        check_teacher(model, teacher)
    reapply(model, masks)
    removed = {name: zeros(model.get_parameter(name)) for name in masks}
    dtypes = {name: model.get_parameter(name).dtype for name in masks}
    with _in_float32(model), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = MaskedLayers(
            model, sorted(masks), rank=options.rank, alpha=options.alpha, ranks=options.ranks
        )
        try:
            loop = _Loop(model, layers, dtypes, options, teacher, device)
            recovery = loop.run(training, held_out, seed, progress)
        finally:
            layers.remove()
    if recovery.best_step == 0:
        raise _no_gain(recovery)
    for name, factors in recovery.factors.items():
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(merge(parameter, factors))
        check_merged(name, parameter, removed[name])
    return recovery


class _Loop:
    """The training of one model; what `accelerate` needs is kept together here."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: MaskedLayers,
        dtypes: Mapping[str, torch.dtype],
        options: RecoverOptions,
        teacher: PreTrainedModel | None,
        device: str,
    ) -> None:
        from accelerate import Accelerator

        # "no" also against a launcher's own setting.
        self.accelerator: Any = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.layers, self.dtypes, self.options = layers, dtypes, options
        # No weight decay: it would pull the change back to zero, and the held-out check already guards it.
        optimizer = torch.optim.AdamW(layers.parameters(), lr=options.learning_rate, weight_decay=0.0)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.parts = BodyAndHead(model)
        self.teacher: BodyAndHead | None = None
        if teacher is not None:
            self.teacher = BodyAndHead(teacher.to(self.accelerator.device).eval())

    def run(self, training: Tensor, held_out: Tensor, seed: int, progress: Progress | None) -> Recovery:
        """Train to the end, or until the loss is not a number; keep the best."""
        options = self.options
        order = torch.Generator().manual_seed(seed)
        train_loader, check_loader = self.accelerator.prepare(
            DataLoader(TensorDataset(training), batch_size=options.batch_size, shuffle=True, generator=order),
            DataLoader(TensorDataset(held_out), batch_size=options.batch_size),
        )
        batches = _endless(train_loader)
        start = self.measure(check_loader)
        recovery = Recovery(start, start)
        if not math.isfinite(start):
            recovery.stopped = f"the held-out loss is {start} before the first step"
            return recovery
        taken: list[float] = []
        for step in range(1, options.steps + 1):
            taken.append(self.step(batches, step))
            if not math.isfinite(taken[-1]):
                recovery.stopped = f"the loss or its gradient is not finite at step {step}"
                break
            if progress is not None:
                progress("recover", step, options.steps)
            if step % options.check_every == 0 or step == options.steps:
                check = HeldOutCheck(step, sum(taken) / len(taken), self.measure(check_loader))
                taken = []
                self._keep_best(recovery, check)
        if recovery.stopped:
            log.warning("recovery stops early: %s", recovery.stopped)
        return recovery

    def step(self, batches: Iterator[Tensor], step: int) -> float:
        """Take one step; return the mean loss over all processes, NaN when the step could not be taken."""
        options = self.options
        warmup = round(options.warmup * options.steps)
        rate = learning_rate(step - 1, steps=options.steps, warmup=warmup, peak=options.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        tokens = next(batches)
        loss = self.loss(tokens)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.layers.parameters(), options.clip)
        mean = self.accelerator.gather(loss.detach()).mean().item()
        if not math.isfinite(mean) or not math.isfinite(norm):
            return math.nan
        self.optimizer.step()
        return float(mean)

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the loss of one batch, a scalar; with a teacher, both parts in their proportion."""
        found = self.losses(tokens, self.teacher)
        loss = found.next_token.mean()
        if found.distillation is None:
            return loss
        share = self.options.teacher_weight
        return (1 - share) * loss + share * found.distillation

    def losses(self, tokens: Tensor, teacher: BodyAndHead | None = None) -> Losses:
        """Return what one batch costs; no more than a slice of its logits is ever held."""
        batch, dense = {"input_ids": tokens}, None
        # A loop over experts asks for the parametrised weight once for each of them; it is built once.
        with parametrize.cached():
            output = self.parts.run(batch, call=self.model)
        if teacher is not None:
            with torch.no_grad():
                dense = teacher.run(batch)
        return losses(output, tokens, dense=dense, temperature=self.options.temperature)

    @torch.no_grad()
    def measure(self, loader: Any) -> float:
        """Return the mean held-out loss, nats per token, with weights rounded to their stored dtypes."""
        found = []
        with self.layers.rounded(self.dtypes):
            for (tokens,) in loader:
                found.append(self.accelerator.gather_for_metrics(self.losses(tokens).next_token))
        return float(torch.cat(found).double().mean())

    def _keep_best(self, recovery: Recovery, check: HeldOutCheck) -> None:
        """Write a check down, and the factors when they are the best so far."""
        recovery.history.append(check)
        log.info("step %d: training loss %.4f, held-out loss %.4f", *check)
        if check.held_out_loss < recovery.best_loss:
            recovery.best_loss, recovery.best_step = check.held_out_loss, check.step
            recovery.factors = self.layers.factors()


def _endless(loader: Any) -> Iterator[Tensor]:
    """Yield batches, epoch after epoch, each in another order."""
    while True:
        for (tokens,) in loader:
            yield tokens


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model in float32, without dropout; its dtypes, devices and mode are restored at the end."""
    before = {name: (t.dtype, t.device) for name, t in _tensors(model)}
    mode = model.training
    # Dropout would only blur the few steps there are; what guards against overfitting is the held-out check.
    for _, tensor in _tensors(model):
        tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
    model.train(False)
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            dtype, device = before[name]
            tensor.data = tensor.data.to(device, dtype)
        model.train(mode)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that speaks of other tokens; both may be without weights.

    Raises:
        InputError: The vocabularies differ in size.
    """
    ours, theirs = (m.get_input_embeddings().get_parameter("weight").shape[0] for m in (model, teacher))
    if ours != theirs:
        raise InputError(
            f"the teacher has {theirs} tokens in its vocabulary, the model {ours}",
            hint="the teacher is the dense model that was pruned",
        )


def _no_gain(recovery: Recovery) -> QualityError:
    """Say by how much every check missed the start."""
    if recovery.stopped:
        return QualityError(
            f"{recovery.stopped}, and nothing before it beat the start ({recovery.start_loss:.4f})",
            hint="use a smaller learning rate",
        )
    best = min(recovery.history, key=lambda check: check.held_out_loss)
    return QualityError(
        f"no check beat the held-out loss at the start, {recovery.start_loss:.4f}; "
        f"the lowest was {best.held_out_loss:.4f} after step {best.step}",
        hint="use other data, more steps or another learning rate",
    )
