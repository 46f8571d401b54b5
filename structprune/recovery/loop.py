"""The training loop: step after step, a look at the held-out windows now and then, the best one kept."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from structprune.errors import EnvironmentFailure
from structprune.models.outputs import BodyAndHead
from structprune.progress import Progress, silent
from structprune.ranks import Ranks
from structprune.recipe.options import RecoverOptions
from structprune.recovery.masked_lora import MaskedLayers
from structprune.recovery.objective import Losses, learning_rate, losses
from structprune.recovery.outcome import HeldOutCheck, Recovery
from structprune.recovery.sharding import whole
from structprune.recovery.state import TrainingState
from structprune.recovery.windows import Order

log = logging.getLogger(__name__)


class Loop:
    """The training of one model.

    Args:
        model: With the layers in it, on the device of its process; divided, or a copy in each process.
        layers: What trains.
        dtypes: What each trained parameter will be stored in, by name.
        options: How to train.
        teacher: The dense model, or None; on the same device.
        ranks: Those that train together.
        state: Where the training is written down at every check, and where an earlier one may lie.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: MaskedLayers,
        dtypes: Mapping[str, torch.dtype],
        options: RecoverOptions,
        teacher: PreTrainedModel | None,
        ranks: Ranks,
        state: TrainingState | None,
    ) -> None:
        self.layers, self.dtypes, self.options = layers, dtypes, options
        self.ranks, self.state = ranks, state
        self.parameters = [*layers.named_parameters().values()]
        # No weight decay: it would pull the change back to zero, and the held-out check already guards it.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.learning_rate, weight_decay=0.0)
        self.parts, self.device = BodyAndHead(model), model.device
        self.teacher = None if teacher is None else BodyAndHead(teacher)
        self.divided = model if isinstance(model, FSDPModule) else None

    def run(self, training: Tensor, held_out: Tensor, progress: Progress) -> Recovery:
        """Train to the end, or until a loss is not a number; keep the best.

        Args:
            training: Token ids to train on, shape [windows, length].
            held_out: Token ids to judge by, shape [windows, length].
            progress: Told "recover", steps done, steps in all; before them how far the first look is.
        """
        options = self.options
        order = Order(len(training), options.seed)
        recovery = self._begin(held_out, progress)
        taken: list[float] = []
        for step in range(recovery.steps_resumed + 1, options.steps + 1):
            if recovery.stopped:
                break
            taken.append(self.step(training[self._share(order, step)], step))
            if not math.isfinite(taken[-1]):
                recovery.stopped = f"the loss or its gradient is not finite at step {step}"
                continue
            progress("recover", step, options.steps)
            if step % options.check_every == 0 or step == options.steps:
                self._check(recovery, HeldOutCheck(step, sum(taken) / len(taken), self.measure(held_out)))
                taken = []
        if recovery.stopped:
            log.warning("recovery stops early: %s", recovery.stopped)
        return recovery

    def step(self, tokens: Tensor, step: int) -> float:
        """Take one step; return the mean loss over all processes, NaN when the step could not be taken."""
        options = self.options
        warmup = round(options.warmup * options.steps)
        rate = learning_rate(step - 1, steps=options.steps, warmup=warmup, peak=options.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.loss(tokens.to(self.device))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        self._average_gradients()
        norm = whole(clip_grad_norm_(self.parameters, options.clip))
        mean = self.ranks.gather(loss.detach()[None]).mean().item()
        if not math.isfinite(mean) or not math.isfinite(norm):
            return math.nan
        self.optimizer.step()
        return mean

    def _average_gradients(self) -> None:
        """Replace each gradient by its mean over all processes.

        The sum is our own, over all gradients in one fixed order: PyTorch's wrapper sorts them anew after its
        first step, and a run that resumes would add them up in another order than one that never stopped.
        Of a model that is divided they are the mean already.
        """
        if self.ranks.alone or self.divided is not None:
            return
        # A matrix that no token reached here may have a gradient elsewhere, and all must send as much.
        found = [torch.zeros_like(one) if one.grad is None else one.grad for one in self.parameters]
        for one, mean in zip(self.parameters, self.ranks.average(found), strict=True):
            one.grad = mean

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the loss of one batch, a scalar; with a teacher, both parts in their proportion."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
            found = self.losses(tokens, self.teacher)
        loss = found.next_token.mean()
        if found.distillation is None:
            return loss
        share = self.options.teacher_weight
        return (1 - share) * loss + share * found.distillation

    def losses(self, tokens: Tensor, teacher: BodyAndHead | None = None) -> Losses:
        """Return what one batch costs; no more than a slice of its logits is ever held."""
        batch, dense = {"input_ids": tokens}, None
        output = self.parts.run(batch)
        if teacher is not None:
            with torch.no_grad():
                dense = teacher.run(batch)
        return losses(output, tokens, dense=dense, temperature=self.options.temperature)

    @torch.no_grad()
    def measure(self, held_out: Tensor, progress: Progress = silent) -> float:
        """Return the mean held-out loss, nats per token, with weights rounded to their stored dtypes.

        Args:
            held_out: Token ids, shape [windows, length].
            progress: Told "held-out loss", windows done, windows in all of this process.
        """
        # Equal shares, so that they can be gathered; the last ones begin again and are cut off.
        size = math.ceil(len(held_out) / self.ranks.count)
        start = size * self.ranks.number
        mine = held_out[torch.arange(start, start + size) % len(held_out)].to(self.device)
        found: list[Tensor] = []
        with self.layers.rounded(self.dtypes):
            progress("held-out loss", 0, size)
            for tokens in torch.split(mine, self.options.batch_size):
                found.append(self.losses(tokens).next_token)
                progress("held-out loss", sum(map(len, found)), size)
        if self.divided is not None:
            self.divided.reshard()  # Without a backward pass the outermost part would stay whole.
        return float(self.ranks.gather(torch.cat(found))[: len(held_out)].double().mean())

    def _begin(self, held_out: Tensor, progress: Progress) -> Recovery:
        """Return where training begins: where an interrupted run wrote its state, or at the start."""
        recovery = self.state.read(self.layers, self.optimizer) if self.state is not None else None
        steps = self.ranks.gather(torch.tensor([recovery.steps_resumed if recovery else 0])).tolist()
        if len(set(steps)) > 1:
            raise EnvironmentFailure(
                f"the processes of this run would go on after steps {steps}, expected the same one",
                hint="write the output to a disk that all machines of the run share",
            )
        if recovery is not None:
            log.info("going on after step %d", recovery.steps_resumed)
            return recovery
        start = self.measure(held_out, progress)
        stopped = "" if math.isfinite(start) else f"the held-out loss is {start} before the first step"
        return Recovery(start, start, stopped=stopped)

    def _share(self, order: Order, step: int) -> list[int]:
        """Return which windows this process looks at in a step: its part of what one alone would look at."""
        size = self.options.batch_size // self.ranks.count
        return order.slice(((step - 1) * self.ranks.count + self.ranks.number) * size, size)

    def _check(self, recovery: Recovery, check: HeldOutCheck) -> None:
        """Note a check, keep the factors when they are the best so far, and write the state down."""
        log.info("step %d: training loss %.4f, held-out loss %.4f", *check)
        if not math.isfinite(check.held_out_loss):
            recovery.stopped = f"the held-out loss is {check.held_out_loss} after step {check.step}"
            return
        recovery.history.append(check)
        if check.held_out_loss < recovery.best_loss:
            recovery.best_loss, recovery.best_step = check.held_out_loss, check.step
            recovery.factors = self.layers.factors()
        if self.state is not None:
            self.state.write(recovery, self.layers, self.optimizer, self.ranks)
