"""How far a run is, told while it works; and how long each of its phases took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Told (stage, done, total).
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


@contextmanager
def step(progress: Progress, stage: str) -> Iterator[None]:
    """Tell that a stage begins which cannot be counted, and at the end of the `with` that it is done."""
    progress(stage, 0, 1)
    yield
    progress(stage, 1, 1)


class Clock:
    """Seconds per phase of a run."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of a `with` block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Return the seconds since the clock was made."""
        return time.perf_counter() - self._start
