"""What a dense model said of an exam, kept for the other models of a sweep that are compared with it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from structprune.calibration.data import hash_of
from structprune.models.outputs import Output, head_of, outputs
from structprune.models.spill import Spilled
from structprune.models.streamed import Batch, Model
from structprune.storage.scratch import scratch_folder

T = TypeVar("T")


class Memory:
    """What one dense model said of one exam: asked once, then read back.

    Opened by `with` it keeps the last hidden states of every batch in a temporary folder, of which the logits
    are made again. Used without, it keeps nothing.
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._said: dict[str, tuple[Spilled, type[Any], int]] = {}
        self._known: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._folder = scratch_folder("dense")
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = None
        self._said.clear()
        self._known.clear()

    def outputs(self, dense: Model, batches: Sequence[Batch]) -> Iterator[Output]:
        """Yield what `models.outputs.outputs` yields of the dense model."""
        if self._folder is None:
            yield from outputs(dense, batches)
            return
        key = f"{hash_of(torch.cat([batch['input_ids'] for batch in batches]))}-{dense.dtype}"
        if key in self._said:
            states, body, vocabulary = self._said[key]
            with head_of(dense, body) as head:
                for index in range(len(states)):
                    yield Output(states[index], head, vocabulary, body)
            return
        states = Spilled(Path(self._folder.name) / key)
        for output in outputs(dense, batches):
            states.append(output.states)
            yield output
        self._said[key] = states, output.body, output.vocabulary

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """Return what `compute` returns, or returned when it was first asked for `what`."""
        if self._folder is None:
            return compute()
        if what not in self._known:
            self._known[what] = compute()
        found: T = self._known[what]
        return found
