"""How a model folder is opened: a value that travels whole from the command line to whatever opens one."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from structprune.errors import EnvironmentFailure, UsageError
from structprune.machine import available_memory, launch

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?", re.ASCII)

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A resident run holds the dense and the pruned model while it compares them, and the activations.
RESIDENT_COPIES = 2.5


@dataclass(frozen=True)
class Opening:
    """How to open a model.

    Args:
        dtype: What to compute in: float32, bfloat16, float16, or "auto" for the dtype of the files (the
            commonest, with a warning, where they mix several).
        device: Where the parameters are put; "auto" for the accelerator there is.
        stream: Hold one block in memory at a time; None chooses by the memory that is free.
        trust_remote_code: Run code that the folder brings along; never needed for what structprune wrote.
        allow_external_symlinks: Accept files that are links out of the folder (those of a Hugging Face cache
            always are).
        from_dense: Refuse to prune a model that is pruned already.
        strict: Refuse tensors that the index or config.json does not know; else they are passed over, with a
            warning. What is written is always read strictly.
        allow_nonfinite: Accept NaN and infinity in the weights, with a warning.
        tokenizer: A folder with the tokenizer, where the model's own has none or another is meant.

    Raises:
        UsageError: `dtype` or `device` is not known.
    """

    dtype: str = "auto"
    device: str = "auto"
    stream: bool | None = None
    trust_remote_code: bool = False
    allow_external_symlinks: bool = False
    from_dense: bool = False
    strict: bool = True
    allow_nonfinite: bool = False
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not known", hint=f"one of: auto, {', '.join(DTYPES)}")
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(
                f"device {self.device!r} is not known", hint="one of: auto, cpu, cuda, cuda:N, mps"
            )

    def streams(self, nbytes: int) -> bool:
        """Tell whether a model of so many bytes is held one block at a time."""
        if self.stream is not None:
            return self.stream
        # Every process of a launch holds a model of its own.
        return nbytes * RESIDENT_COPIES > available_memory() // launch().local_count

    def root(self, folder: Path) -> Path | None:
        """Return the folder that its links may not lead out of; None where they may lead anywhere."""
        return None if self.allow_external_symlinks else folder

    def resolve(self, folder: Path, nbytes: int) -> "Opening":
        """Return the opening of one model, with its device and whether it is streamed decided.

        Args:
            folder: The model folder, to say what was chosen.
            nbytes: Bytes of its weights.

        Raises:
            EnvironmentFailure: The device is not there.
            UsageError: It is named by its number, and several processes were launched.
        """
        stream = self.streams(nbytes)
        if self.stream is None:
            logger.info("%s is %s", folder, "streamed block by block" if stream else "held in memory")
        return replace(self, stream=stream, device=self.place())

    def place(self) -> str:
        """Return the device that parameters are put on; errors are those of `resolve`."""
        there = devices()
        place = launch()
        if place.count > 1 and ":" in self.device:
            raise UsageError(
                f"device {self.device}: {place.count} processes were launched, and each takes its own",
                hint="leave the device to auto, or say cuda or cpu",
            )
        own = f"cuda:{place.local_rank}" if place.count > 1 else "cuda"
        accelerator = own if "cuda" in there else "cpu"
        chosen = {"auto": accelerator, "cuda": own}.get(self.device, self.device)
        if chosen not in there:
            raise EnvironmentFailure(
                f"device {chosen!r} is not there: this machine has {', '.join(there)}", hint=_way_on(chosen)
            )
        return chosen


def devices() -> list[str]:
    """Return the devices that a model can be put on here; the processor comes first."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def _way_on(device: str) -> str:
    if device.startswith("cuda") and torch.version.cuda is None:
        return "the installed torch is built without CUDA: install one with it, or leave the device to auto"
    return "give one of these, or leave the device to auto"
