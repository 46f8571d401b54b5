"""What a first look at a model leaves for the second: one small durable file per block, gone at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from structprune.storage.scratch import scratch_folder
from structprune.storage.tensor_file import read_tensors, save_tensors


class Notebook:
    """Tensors by block; what an interrupted run noted is still there for the run that goes on.

    Args:
        folder: Where the files lie; None for a temporary folder.
        topic: What is noted: the beginning of the files' names.
    """

    def __init__(self, folder: Path | None, topic: str) -> None:
        self._own = scratch_folder("notes") if folder is None else None
        self._folder = Path(self._own.name) if self._own else Path(str(folder))
        self._topic = topic

    def has(self, block: int) -> bool:
        """Tell whether block `block` was noted."""
        return self._file(block).is_file()

    def write(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Note the tensors of a block."""
        self._folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._file(block), {name: tensor.cpu() for name, tensor in tensors.items()}, {})

    def read(self, block: int) -> dict[str, Tensor]:
        """Return what was noted of a block; nothing where nothing was."""
        return read_tensors(self._file(block)) if self.has(block) else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove every file; after an error only those that nobody would find again."""
        if self._own is not None:
            self._own.cleanup()
        elif kind is None:
            for file in self._folder.glob(f"{self._topic}-*.safetensors"):
                file.unlink()

    def _file(self, block: int) -> Path:
        return self._folder / f"{self._topic}-{block:04d}.safetensors"


@dataclass(frozen=True)
class Look:
    """A look at all the data before anything is decided.

    Attributes:
        notes: What was seen, by its number; an interrupted run goes on after the last.
        told: Told (done, total).
    """

    notes: Notebook
    told: Callable[[int, int], None]
