"""The training loop: step after step, a look at the held-out windows now and then, the best one kept."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parametrize
from transformers import PreTrainedModel

from structprune.errors import EnvironmentFailure
from structprune.models.outputs import BodyAndHead
from structprune.progress import Progress
from structprune.recipe.options import RecoverOptions
from structprune.recovery.masked_lora import MaskedLayers
from structprune.recovery.objective import Losses, learning_rate, losses
from structprune.recovery.outcome import HeldOutCheck, Recovery
from structprune.recovery.processes import Processes
from structprune.recovery.state import TrainingState
from structprune.recovery.windows import Order

log = logging.getLogger(__name__)


class Loop:
    """The training of one model.

    Args:
        model: With the layers in it; moved to the device of its process.
        layers: What trains.
        dtypes: What each trained parameter will be stored in, by name.
        options: How to train.
        teacher: The dense model, or None; moved to the device.
        processes: Those that train together.
        state: Where the training is written down at every check, and where an earlier one may lie.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: MaskedLayers,
        dtypes: Mapping[str, torch.dtype],
        options: RecoverOptions,
        teacher: PreTrainedModel | None,
        processes: Processes,
        state: TrainingState | None,
    ) -> None:
        model.to(processes.device)
        self.layers, self.dtypes, self.options = layers, dtypes, options
        self.processes, self.state = processes, state
        self.parameters = [*layers.named_parameters().values()]
        # No weight decay: it would pull the change back to zero, and the held-out check already guards it.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.learning_rate, weight_decay=0.0)
        self.parts = BodyAndHead(model)
        self.teacher: BodyAndHead | None = None
        if teacher is not None:
            self.teacher = BodyAndHead(teacher.to(processes.device).eval())

    def run(self, training: Tensor, held_out: Tensor, progress: Progress | None) -> Recovery:
        """Train to the end, or until a loss is not a number; keep the best.

        Args:
            training: Token ids to train on, shape [windows, length].
            held_out: Token ids to judge by, shape [windows, length].
            progress: Told "recover", steps done, steps in all.
        """
        options = self.options
        order = Order(len(training), options.seed)
        recovery = self._begin(held_out)
        taken: list[float] = []
        for step in range(recovery.steps_resumed + 1, options.steps + 1):
            if recovery.stopped:
                break
            taken.append(self.step(training[self._share(order, step)], step))
            if not math.isfinite(taken[-1]):
                recovery.stopped = f"the loss or its gradient is not finite at step {step}"
                continue
            if progress is not None:
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
        loss = self.loss(tokens.to(self.processes.device))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        self.processes.average(self.parameters)
        norm = clip_grad_norm_(self.parameters, options.clip)
        mean = self.processes.gather(loss.detach()[None]).mean().item()
        if not math.isfinite(mean) or not math.isfinite(norm):
            return math.nan
        self.optimizer.step()
        return mean

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
            output = self.parts.run(batch)
        if teacher is not None:
            with torch.no_grad():
                dense = teacher.run(batch)
        return losses(output, tokens, dense=dense, temperature=self.options.temperature)

    @torch.no_grad()
    def measure(self, held_out: Tensor) -> float:
        """Return the mean held-out loss, nats per token, with weights rounded to their stored dtypes."""
        # Equal shares, so that they can be gathered; the last ones begin again and are cut off.
        size = math.ceil(len(held_out) / self.processes.count)
        start = size * self.processes.number
        mine = held_out[torch.arange(start, start + size) % len(held_out)].to(self.processes.device)
        with self.layers.rounded(self.dtypes):
            found = [self.losses(tokens).next_token for tokens in torch.split(mine, self.options.batch_size)]
        return float(self.processes.gather(torch.cat(found))[: len(held_out)].double().mean())

    def _begin(self, held_out: Tensor) -> Recovery:
        """Return where training begins: where an interrupted run wrote its state, or at the start."""
        recovery = self.state.read(self.layers, self.optimizer) if self.state is not None else None
        steps = self.processes.gather(torch.tensor([recovery.steps_resumed if recovery else 0])).tolist()
        if len(set(steps)) > 1:
            raise EnvironmentFailure(
                f"the processes of this run would go on after steps {steps}, expected the same one",
                hint="write the output to a disk that all machines of the run share",
            )
        if recovery is not None:
            log.info("going on after step %d", recovery.steps_resumed)
            return recovery
        start = self.measure(held_out)
        stopped = "" if math.isfinite(start) else f"the held-out loss is {start} before the first step"
        return Recovery(start, start, stopped=stopped)

    def _share(self, order: Order, step: int) -> list[int]:
        """Return which windows this process looks at in a step; all processes together go on in the order."""
        size, processes = self.options.batch_size, self.processes
        return order.slice(((step - 1) * processes.count + processes.number) * size, size)

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
        if self.state is not None and self.processes.writes:
            self.state.write(recovery, self.layers, self.optimizer)
