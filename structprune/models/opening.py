"""How a model folder is opened: a value that travels whole from the command line to whatever opens one."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from structprune.errors import UsageError
from structprune.machine import available_memory

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

    Raises:
        UsageError: `dtype` or `device` is not known.
    """

    dtype: str = "auto"
    device: str = "auto"
    stream: bool | None = None
    trust_remote_code: bool = False
    allow_external_symlinks: bool = False

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not known", hint=f"one of: auto, {', '.join(DTYPES)}")
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError:
            raise UsageError(
                f"device {self.device!r} is not known", hint="one of: auto, cpu, cuda, cuda:N, mps"
            ) from None

    def streams(self, nbytes: int) -> bool:
        """Tell whether a model of so many bytes is held one block at a time."""
        if self.stream is not None:
            return self.stream
        return nbytes * RESIDENT_COPIES > available_memory()

    def root(self, folder: Path) -> Path | None:
        """Return the folder that its links may not lead out of; None where they may lead anywhere."""
        return None if self.allow_external_symlinks else folder

    def resolve(self, folder: Path, nbytes: int) -> "Opening":
        """Return the opening of one model, with its device and whether it is streamed decided.

        Args:
            folder: The model folder, to say what was chosen.
            nbytes: Bytes of its weights.
        """
        stream = self.streams(nbytes)
        if self.stream is None:
            logger.info("%s is %s", folder, "streamed block by block" if stream else "held in memory")
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        return replace(self, stream=stream, device=accelerator if self.device == "auto" else self.device)
