"""Block by block over a model, in memory or straight from disk, and the only place of calibration hooks.

The blocks' real arguments (masks, rotary tables, sliding windows) are captured by running the model once
with recording blocks: the model builds them itself, nothing is rebuilt here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.models.arch import Linear, arch_of, blocks, linears
from structprune.models.experts import recording_experts
from structprune.models.identity import skeleton
from structprune.models.streamed import Batch, Model, StreamedModel

# Told the label of each linear and its real tokens' inputs, shape [tokens, in].
Observer = Callable[[Linear, Tensor], None]
# Told a block's input and output of one batch, shape [batch, tokens, hidden], and which tokens are real,
# bool, shape [batch * tokens]; None = all.
Watcher = Callable[[Tensor, Tensor, Tensor | None], None]
# Told each expert's index, what it makes of its real tokens [tokens, hidden], and their weights [tokens].
RoutingObserver = Callable[[int, Tensor, Tensor], None]


@dataclass
class Call:
    """Everything but the hidden states that one block was called with, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Enough(Exception):
    """Everything that was to be observed in a block has been; the rest of its forward is not needed."""


class Block:
    """One decoder block of a walk, its parameters materialised while it is the walk's current one.

    Attributes:
        index: Position among the blocks, from 0.
        prefix: Module path, such as "model.layers.0".
        module: The block.
        linears: Its linears, in module order.
    """

    def __init__(
        self, index: int, prefix: str, module: nn.Module, found: list[Linear], walk: "Walk | None" = None
    ) -> None:
        self.index = index
        self.prefix = prefix
        self.module = module
        self.linears = found
        self._walk = walk
        self._watcher: Watcher | None = None

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Show `watcher` what the block makes of each batch that advances in a `with`."""
        self._watcher = watcher
        try:
            yield
        finally:
            self._watcher = None

    @torch.no_grad()
    def advance(self) -> None:
        """Make this block's outputs, under its present weights, the inputs of the next block."""
        assert self._walk is not None
        for position, call in enumerate(self._walk.calls[self.index]):
            self._pass_on(position, self.run(self._walk.hidden[position], call))

    def _pass_on(self, position: int, output: Tensor) -> None:
        assert self._walk is not None
        if self._watcher is not None:
            self._watcher(self._walk.hidden[position], output, self._walk.real[position])
        self._walk.hidden[position] = output

    @torch.no_grad()
    def observe(
        self,
        observer: Observer,
        observed: list[Linear],
        *,
        advance: bool = False,
        routed: RoutingObserver | None = None,
    ) -> None:
        """Run the calibration data through the block and show `observer` what each linear reads.

        Padded tokens are never shown.

        Args:
            observer: Called once per linear and batch; linears that read the same tensor see the same object.
            observed: The linears of this block to observe.
            advance: Also make the outputs the inputs of the next block; without it the forward stops
                after the last linear was reached, before its product is computed.
            routed: Told of each expert of a mixture of which a linear is observed.
        """
        assert self._walk is not None
        hidden = self._walk.hidden
        recorder = _Recorder(observer, observed, routed)
        with ExitStack() as hooks:
            recorder.install(self.linears, hooks)
            for position, call in enumerate(self._walk.calls[self.index]):
                recorder.begin(self._walk.real[position], stop=not advance and position > 0)
                try:
                    output = self.run(hidden[position], call)
                except _Enough:
                    continue
                if advance:
                    self._pass_on(position, output)

    def run(self, hidden: Tensor, call: Call) -> Tensor:
        """Return the block's output states for one batch, shape [batch, tokens, hidden]."""
        output = self.module(hidden, *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


class _Recorder:
    """Installs the hooks of one block and passes on what they see, without padding."""

    def __init__(self, observer: Observer, observed: list[Linear], routed: RoutingObserver | None) -> None:
        self._observer = observer
        self._routing = routed
        self._observed = {linear.label for linear in observed}
        self._real: Tensor | None = None
        self._stop = False
        self._seen: list[int] = []  # the order in which modules are reached, learnt in the first batch
        self._last: tuple[Tensor, Tensor] | None = None

    def begin(self, real: Tensor | None, *, stop: bool) -> None:
        """Start a batch whose real tokens are `real` (bool, shape [batch * tokens]; None = all)."""
        self._real = real
        self._stop = stop
        self._last = None

    def install(self, found: list[Linear], hooks: ExitStack) -> None:
        """Hook every module of a block that feeds an observed linear, until `hooks` closes."""
        by_module: dict[nn.Module, list[Linear]] = {}
        for linear in found:
            by_module.setdefault(linear.module, []).append(linear)
        for number, (module, served) in enumerate(by_module.items()):
            if not any(linear.label in self._observed for linear in served):
                continue
            if served[0].expert is None:
                hooks.callback(module.register_forward_pre_hook(self._hook(number, served[0])).remove)
            else:
                routed = None if self._routing is None else self._routed
                hooks.enter_context(recording_experts(module, served, self._expert(number), routed=routed))

    def _hook(self, number: int, linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._observer(linear, self._without_padding(inputs[0]))
            self._reached(number)

        return hook

    def _expert(self, number: int) -> Callable[[Linear | None, Tensor, Tensor], None]:
        def observe(linear: Linear | None, inputs: Tensor, rows: Tensor) -> None:
            if linear is None:
                self._reached(number)
                return
            if linear.label in self._observed:
                self._observer(linear, inputs if self._real is None else inputs[self._real[rows]])

        return observe

    def _routed(self, expert: int, outputs: Tensor, weights: Tensor, rows: Tensor) -> None:
        assert self._routing is not None
        real = slice(None) if self._real is None else self._real[rows]
        self._routing(expert, outputs[real], weights[real])

    def _without_padding(self, inputs: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not inputs:
            flat = inputs.reshape(-1, inputs.shape[-1])
            self._last = inputs, flat if self._real is None else flat[self._real]
        return self._last[1]

    def _reached(self, number: int) -> None:
        if not self._stop:
            self._seen.append(number)
        elif number == self._seen[-1]:
            raise _Enough


class Walk:
    """The forward walk over a model's blocks with some batches.

    Args:
        model: In memory, or streamed: then one block is resident at a time.
        batches: Token ids and, where sequences are padded, an attention mask.
    """

    def __init__(self, model: Model, batches: Sequence[Batch]) -> None:
        self.model = model
        self.real = [_real_tokens(batch) for batch in batches]
        self.hidden: list[Tensor] = []
        self.calls = capture(model, batches, self.hidden.append)

    def __iter__(self) -> Iterator[Block]:
        """Yield each block in order; it must have advanced before the next one is asked for."""
        arch = arch_of(skeleton(self.model))
        for index, (prefix, module) in enumerate(blocks(self.model, arch)):
            with resident(self.model, prefix):
                yield Block(index, prefix, module, linears(prefix, module, arch), self)
            self.calls[index] = []


def walk_weights(model: Model, finished: int) -> Iterator[Block]:
    """Yield every block that is not decided yet, its parameters in memory, without any data.

    Args:
        model: In memory or streamed.
        finished: How many blocks are decided.
    """
    arch = arch_of(skeleton(model))
    for index, (prefix, module) in enumerate(blocks(model)):
        if index >= finished:
            with resident(model, prefix):
                yield Block(index, prefix, module, linears(prefix, module, arch))


@contextmanager
def resident(model: Model, prefix: str) -> Iterator[None]:
    """Hold one block's parameters in memory for the length of a `with`, the applied plans carried out."""
    if isinstance(model, StreamedModel):
        with model.resident(prefix):
            yield
    else:
        yield


def _real_tokens(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.reshape(-1).bool()


@torch.no_grad()
def capture(model: Model, batches: Sequence[Batch], keep: Callable[[Tensor], None]) -> list[list[Call]]:
    """Run everything before the blocks and record what each block would be called with.

    Args:
        model: In memory or streamed.
        batches: Run one after the other.
        keep: Told the first block's hidden states of each batch.

    Returns:
        Per block one `Call` per batch.
    """
    body = skeleton(model).base_model
    found = blocks(model)
    calls: list[list[Call]] = [[] for _ in found]

    def recorder(index: int) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                keep(states)
            kept = {
                name: value
                for name, value in kwargs.items()
                if name != "hidden_states" and "past_key" not in name
            }
            previous = calls[index][-1] if calls[index] else None
            calls[index].append(
                Call(
                    tuple(_shared(value, previous and previous.args[i]) for i, value in enumerate(args[1:])),
                    {
                        name: _shared(value, previous and previous.kwargs.get(name))
                        for name, value in kept.items()
                    },
                )
            )
            return states

        return record

    with outside(model, "body"), ExitStack() as stack:
        for index, (_, module) in enumerate(found):
            stack.enter_context(replaced_forward(module, recorder(index)))
        for batch in batches:
            body(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False)
    return calls


def _shared(value: Any, previous: Any) -> Any:
    """Return `previous` where it equals `value`: the masks and rotary tables of all batches mostly do."""
    if isinstance(value, tuple) and isinstance(previous, tuple) and len(value) == len(previous):
        return tuple(_shared(one, other) for one, other in zip(value, previous, strict=True))
    same = isinstance(value, Tensor) and isinstance(previous, Tensor) and value.shape == previous.shape
    return previous if same and value.dtype == previous.dtype and torch.equal(value, previous) else value


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand in for a module's own for the length of a `with`."""
    before = module.__dict__.get("forward")
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(module, "forward")
        else:
            object.__setattr__(module, "forward", before)


@contextmanager
def outside(model: Model, part: str) -> Iterator[None]:
    """Hold what is not in the blocks: the "body" without the head, or the "tail" without embeddings."""
    if isinstance(model, StreamedModel):
        with model.outside(head=part == "tail", embeddings=part == "body"):
            yield
    else:
        yield
