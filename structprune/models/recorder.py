"""What the modules of a block read while it runs, without padding: the hooks of the walk."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from structprune.models.arch import Linear
from structprune.models.experts import recording_experts

# Told the position of the batch, each linear and its real tokens' inputs, shape [tokens, in].
Observer = Callable[[int, Linear, Tensor], None]
# Told the position of the batch, each expert's index, what it makes of its real tokens [tokens, hidden], and
# their weights [tokens].
RoutingObserver = Callable[[int, int, Tensor, Tensor], None]


class Enough(Exception):
    """Everything that was to be observed in a block has been; the rest of its forward is not needed."""


@contextmanager
def reading(block: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Note what modules of a block read, by path, for the length of a `with`."""
    read: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path in paths:
            module = block.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(partial(_note, read, path)).remove)
        yield read


def _note(read: dict[str, Tensor], path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    read[path] = inputs[0]


def without_padding(states: Tensor, real: Tensor | None) -> Tensor:
    """Return the states of real tokens, shape [tokens, features]."""
    flat = states.reshape(-1, states.shape[-1])
    return flat if real is None else flat[real]


class Recorder:
    """Installs the hooks of one block and passes on what they see, without padding."""

    def __init__(self, observer: Observer, observed: list[Linear], routed: RoutingObserver | None) -> None:
        self._observer = observer
        self._routing = routed
        self._observed = {linear.label for linear in observed}
        self._position = 0
        self._real: Tensor | None = None
        self._stop = False
        self._seen: list[int] = []  # the order in which modules are reached, learnt in the first batch
        self._last: tuple[Tensor, Tensor] | None = None

    def begin(self, position: int, real: Tensor | None, *, stop: bool) -> None:
        """Start the batch at a position; its real tokens are `real` (bool, [batch * tokens]; None = all)."""
        self._position = position
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
            self._observer(self._position, linear, self._without_padding(inputs[0]))
            self._reached(number)

        return hook

    def _expert(self, number: int) -> Callable[[Linear | None, Tensor, Tensor], None]:
        def observe(linear: Linear | None, inputs: Tensor, rows: Tensor) -> None:
            if linear is None:
                self._reached(number)
                return
            if linear.label in self._observed:
                real = inputs if self._real is None else inputs[self._real[rows]]
                self._observer(self._position, linear, real)

        return observe

    def _routed(self, expert: int, outputs: Tensor, weights: Tensor, rows: Tensor) -> None:
        assert self._routing is not None
        real = slice(None) if self._real is None else self._real[rows]
        self._routing(self._position, expert, outputs[real], weights[real])

    def _without_padding(self, inputs: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not inputs:
            self._last = inputs, without_padding(inputs, self._real)
        return self._last[1]

    def _reached(self, number: int) -> None:
        if not self._stop:
            self._seen.append(number)
        elif number == self._seen[-1]:
            raise Enough
