"""Block by block over a model, in memory or straight from disk, and the only place of calibration hooks.

The blocks' real arguments (masks, rotary tables, sliding windows) are captured by running the model once
with recording blocks: the model builds them itself, nothing is rebuilt here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.models.arch import Linear, arch_of, blocks, linears
from structprune.models.identity import skeleton
from structprune.models.rank_batches import RankBatches, rank_batches
from structprune.models.recorder import Enough, Observer, Recorder, RoutingObserver, reading, without_padding
from structprune.models.streamed import Batch, Model, StreamedModel

# Told a block's input and output of one batch, shape [batch, tokens, hidden], and which tokens are real,
# bool, shape [batch * tokens]; None = all.
Watcher = Callable[[Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Passed:
    """What the real tokens of one batch are at some points of a block, shape [tokens, features] each.

    Attributes:
        before: The block's input.
        after: Its output.
        read: What modules inside it read, by path.
    """

    before: Tensor
    after: Tensor
    read: Mapping[str, Tensor]


@dataclass
class Call:
    """Everything but the hidden states that one block was called with, for one batch.

    Attributes:
        args: Further arguments by place.
        kwargs: Arguments by name.
        added: What the model adds to the block's output before the next one, as Qwen3-VL does features of
            images; None where it adds nothing.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None = None


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

    @property
    def batches(self) -> RankBatches:
        """Return the batches that the walk runs here."""
        assert self._walk is not None
        return self._walk.batches

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
            observer: Called once per linear and batch of this process; linears that read the same tensor see
                the same object.
            observed: The linears of this block to observe.
            advance: Also make the outputs the inputs of the next block; without it the forward stops
                after the last linear was reached, before its product is computed.
            routed: Told of each expert of a mixture of which a linear is observed.
        """
        assert self._walk is not None
        hidden = self._walk.hidden
        recorder = Recorder(observer, observed, routed)
        with ExitStack() as hooks:
            recorder.install(self.linears, hooks)
            for position, call in enumerate(self._walk.calls[self.index]):
                recorder.begin(position, self._walk.real[position], stop=not advance and position > 0)
                try:
                    output = self.run(hidden[position], call)
                except Enough:
                    continue
                if advance:
                    self._pass_on(position, output)

    @torch.no_grad()
    def passes(self, paths: Sequence[str] = ()) -> Iterator[Passed]:
        """Run the calibration data through the block, which does not advance, and yield what is seen of it.

        Args:
            paths: Modules of the block whose inputs are to be seen.
        """
        assert self._walk is not None
        for position, call in enumerate(self._walk.calls[self.index]):
            hidden, real = self._walk.hidden[position], self._walk.real[position]
            with reading(self.module, paths) as read:
                after = self.run(hidden, call)
            inside = {path: without_padding(one, real) for path, one in read.items()}
            yield Passed(without_padding(hidden, real), without_padding(after, real), inside)

    def run(self, hidden: Tensor, call: Call) -> Tensor:
        """Return what comes of one batch after the block, shape [batch, tokens, hidden]."""
        output = self.module(hidden, *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states if call.added is None else states + call.added


class Walk:
    """The forward walk over a model's blocks with some batches.

    Args:
        model: In memory, or streamed: then one block is resident at a time.
        batches: Token ids and, where sequences are padded, an attention mask; of several processes each walks
            with its own.
    """

    def __init__(self, model: Model, batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = rank_batches(batches)
        self.real = [_real_tokens(batch) for batch in self.batches]
        self.hidden: list[Tensor] = []
        self.calls = capture(model, self.batches, self.hidden.append)

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
    returned: list[Tensor] = []

    def recorder(index: int) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                keep(states)
            elif states is not returned[-1] and bool(states.any()):
                calls[index - 1][-1].added = states
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
            # Nothing, so that the next block is called with what the model itself adds in between.
            returned[:] = [torch.zeros_like(states)]
            return returned[-1]

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
