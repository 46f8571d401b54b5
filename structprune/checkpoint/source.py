"""A model folder, opened for a run: files checked, weights hashed, streamed where memory is short."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from structprune.errors import InputError
from structprune.machine import available_memory
from structprune.models.identity import names_of, skeleton
from structprune.models.streamed import Model, open_model
from structprune.models.tokenizer import check_vocabulary, open_tokenizer
from structprune.storage.reader import CheckpointReader
from structprune.storage.scan import Scan

logger = logging.getLogger(__name__)

# A resident run holds the dense and the pruned model while it compares them, and the activations.
RESIDENT_COPIES = 2.5


@dataclass
class Source:
    """A model folder that passed every check.

    Attributes:
        name: What the user called it.
        reader: Its files.
        model: The model, in memory or streamed; a run prunes it in place.
        tokenizer: Its tokenizer, or None where the folder has none.
        scan: Hash and zeros of its weights.
        parameters: How many it has before anything is pruned, tied ones once.
        streamed: Whether one block at a time is in memory.
        dtype: What it computes in; "auto" for the dtype of the files.
        device: Where it computes.
        trusted: Whether code in the folder may run.
    """

    name: str
    reader: CheckpointReader
    model: Model
    tokenizer: PreTrainedTokenizerBase | None
    scan: Scan
    parameters: int
    streamed: bool
    dtype: str
    device: str
    trusted: bool

    @property
    def folder(self) -> Path:
        """Return the model folder."""
        return self.reader.folder

    def again(self) -> Model:
        """Open the model as its files hold it a second time."""
        return open_model(
            self.folder,
            stream=self.streamed,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trusted,
        )

    def reading(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            InputError: The folder has none, or it knows more tokens than the model.
        """
        if self.tokenizer is None:
            raise InputError(
                f"{self.folder}: there is no tokenizer, and this run reads text",
                hint="copy the tokenizer's files into the folder, or use a method that needs no data",
            )
        check_vocabulary(self.tokenizer, self.model)
        return self.tokenizer


def open_source(
    name: str,
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Open a model folder after every check of its files.

    Args:
        name: What the user called it.
        folder: Where it is.
        dtype: "auto" for the dtype of the files.
        device: "auto" for the accelerator there is.
        stream: Hold one block in memory at a time; None chooses by the memory that is free.
        trust_remote_code: Let code in the folder run.
    """
    reader = CheckpointReader(folder)
    if stream is None:
        stream = reader.nbytes * RESIDENT_COPIES > available_memory()
        logger.info("%s is %s", folder, "streamed block by block" if stream else "held in memory")
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = open_model(folder, stream=stream, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    return Source(
        name,
        reader,
        model,
        tokenizer,
        reader.scan(names_of(model).ignored),
        sum(parameter.numel() for parameter in skeleton(model).parameters()),
        stream,
        dtype,
        place,
        trust_remote_code,
    )
