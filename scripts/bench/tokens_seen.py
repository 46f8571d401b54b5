"""What benches of token pruners see of a run: features kept from one run to the next, and where time goes."""

import copy
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from structprune.runtime.engine import Engine


class Remembered:
    """`get_image_features` of a model, computed once for each batch.

    Args:
        base: The model that computes them.

    Attributes:
        batch: Number of the batch that is asked now; None where nothing shall be kept.
        used: Whether what is kept is used.
    """

    def __init__(self, base: Any) -> None:
        self._method, self._kept = base.get_image_features, dict[int, list[Tensor]]()
        self.__signature__ = inspect.signature(self._method)
        self.batch: int | None = None
        self.used = True
        base.get_image_features = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns; of what is kept only the features."""
        if self.batch is None or not self.used:
            return self._method(*args, **kwargs)
        if self.batch not in self._kept:
            self._kept[self.batch] = [*self._method(*args, **kwargs).pooler_output]
        return BaseModelOutputWithPooling(pooler_output=[*self._kept[self.batch]])


class _Timed:
    """A chooser whose time is counted."""

    def __init__(self, chooser: Any, timer: "TimedChoosers") -> None:
        self._chooser, self._timer = chooser, timer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._chooser, name)
        if name not in ("watch", "choose", "merge"):
            return found

        def timed(*args: Any) -> Any:
            started = time.process_time()
            try:
                return found(*args)
            finally:
                self._timer.seconds += time.process_time() - started

        return timed


class TimedChoosers:
    """Counts the processor's seconds that an engine's choosers take, for the length of a `with`.

    Args:
        engine: Of one model.

    Attributes:
        seconds: So far.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._drops, self.seconds = engine, copy.copy(engine.drops), 0.0

    def __enter__(self) -> Self:
        """Begin."""
        timed: dict[int, Any] = {}
        for key, drops in self._drops.items():
            for one in drops:
                timed.setdefault(id(one.chooser), _Timed(one.chooser, self))
            self._engine.drops[key] = [replace(one, chooser=timed[id(one.chooser)]) for one in drops]
        return self

    def __exit__(self, *_: object) -> None:
        """Put back what was there."""
        self._engine.drops |= self._drops


@contextmanager
def in_language_model(model: Any) -> Iterator[list[float]]:
    """Count the processor's seconds of every forward of the language model, for the length of a `with`."""
    seconds: list[float] = []
    started = [0.0]

    def begin(*_: object) -> None:
        started[0] = time.process_time()

    def end(*_: object) -> None:
        seconds.append(time.process_time() - started[0])

    language = model.model.language_model
    hooks = [language.register_forward_pre_hook(begin, prepend=True), language.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
