"""A model folder, opened for a run: files checked, weights hashed, streamed where memory is short."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from structprune.errors import InputError
from structprune.models.identity import names_of, skeleton
from structprune.models.opening import Opening
from structprune.models.remembered import remembered
from structprune.models.streamed import Model, build_model, open_reader
from structprune.models.tokenizer import check_vocabulary, open_tokenizer
from structprune.storage.reader import CheckpointReader
from structprune.storage.scan import Scan


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
        opening: How it was opened; whether it is streamed, and its device, are decided.
        prior: What it had lost before the run, for the report; None where nobody asked.
    """

    name: str
    reader: CheckpointReader
    model: Model
    tokenizer: PreTrainedTokenizerBase | None
    scan: Scan
    parameters: int
    opening: Opening
    prior: Mapping[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """Return the model folder."""
        return self.reader.folder

    def reopen_model(self) -> Model:
        """Return the model as its files hold it, a second time."""
        return build_model(self.reader, self.opening)

    def checked_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            InputError: The folder has none, or it knows more tokens than the model.
        """
        if self.tokenizer is None:
            raise InputError(
                f"{self.folder}: there is no tokenizer, and this run reads text",
                hint="give the folder of its tokenizer with --tokenizer, or use a method that needs no data",
            )
        check_vocabulary(self.tokenizer, self.model)
        return self.tokenizer


def open_source(name: str, folder: Path, opening: Opening) -> Source:
    """Open a model folder after every check of its files.

    Args:
        name: What the user called it.
        folder: Where it is.
        opening: How.
    """
    reader = open_reader(folder, opening)
    opening = opening.resolve(folder, reader.nbytes)
    model = build_model(reader, opening)
    scan = reader.scan(names_of(model).ignored)
    remembered(model).zeros = scan.zeros
    return Source(
        name,
        reader,
        model,
        open_tokenizer(folder, opening),
        scan,
        sum(parameter.numel() for parameter in skeleton(model).parameters()),
        opening,
    )
