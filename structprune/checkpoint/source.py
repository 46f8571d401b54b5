"""A model folder, opened for a run: files checked, weights hashed, streamed where memory is short."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from structprune.checkpoint.adapter import Adapter, is_adapter, merge_adapter, read_adapter
from structprune.checkpoint.integrity import check_weights, intact_manifest
from structprune.checkpoint.running import carry_on
from structprune.errors import InputError
from structprune.models.identity import names_of, skeleton
from structprune.models.opening import Opening
from structprune.models.processor import processor
from structprune.models.remembered import remembered
from structprune.models.streamed import Model, StreamedModel, build_model, open_reader, open_skeleton
from structprune.models.tokenizer import check_vocabulary, open_tokenizer
from structprune.ranks import Ranks
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
        adapter: What is merged into the model and is not in its files.
        measured: Whether it is to be run as its user would, with what works while a model runs.
    """

    name: str
    reader: CheckpointReader
    model: Model
    tokenizer: PreTrainedTokenizerBase | None
    scan: Scan
    parameters: int
    opening: Opening
    prior: Mapping[str, Any] | None = None
    adapter: Adapter | None = None
    measured: bool = False

    @property
    def folder(self) -> Path:
        """Return the model folder."""
        return self.reader.folder

    @property
    def resident(self) -> PreTrainedModel:
        """Return the model of a source that was not opened to be streamed."""
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def reopen_model(self) -> Model:
        """Return the model as its files hold it, a second time."""
        model = build_model(self.reader, self.opening)
        if self.adapter is not None:
            merge_adapter(model, self.adapter)  # type: ignore[arg-type]  # never streamed, so it is a module
        return carry_on(model, self.folder) if self.measured else model

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

    def processor(self) -> ProcessorMixin:
        """Return what makes batches of images and text; errors are those of `models.processor`."""
        return processor(self.folder, self.opening)


def open_source(name: str, folder: Path, opening: Opening, ranks: Ranks = Ranks()) -> Source:
    """Open a model folder after every check of its files.

    Args:
        name: What the user called it.
        folder: Where it is.
        opening: How.
        ranks: Processes that all open it, and share the reading for the checks.

    Raises:
        InputError: The folder is damaged, or is one of ours and no longer holds what was written.
    """
    manifest = intact_manifest(folder, opening)
    reader = open_reader(folder, opening)
    opening = opening.resolve(folder, reader.nbytes)
    model = build_model(reader, opening)
    scan = reader.scan(names_of(model).ignored, ranks)
    remembered(model).zeros = scan.zeros
    check_weights(manifest, reader, scan.hashes)
    return Source(
        name,
        reader,
        model,
        open_tokenizer(folder, opening),
        scan,
        sum(parameter.numel() for parameter in skeleton(model).parameters()),
        opening,
    )


def open_outline(folder: Path, opening: Opening) -> tuple[StreamedModel, Scan]:
    """Open a model folder after every check of its files, but hold no weight of it.

    Args:
        folder: Where it is.
        opening: How.

    Raises:
        InputError: The folder is damaged, or is one of ours and no longer holds what was written.
    """
    manifest = intact_manifest(folder, opening)
    model = open_skeleton(folder, opening)
    assert isinstance(model.reader, CheckpointReader)
    scan = model.reader.scan(model.names.ignored)
    remembered(model).zeros = scan.zeros
    check_weights(manifest, model.reader, scan.hashes)
    return model, scan


def open_adapted(name: str, folder: Path, opening: Opening) -> Source:
    """Open the model that a kept adapter was trained on, with the adapter merged.

    Args:
        name: What the user called it.
        folder: The adapter's folder.
        opening: How; the model is held in memory.

    Raises:
        InputError: The adapter is damaged or not ours, its base is gone or has changed, or it is to be
            streamed.
    """
    intact_manifest(folder, opening)
    adapter = read_adapter(folder)
    base = Path(adapter.base)
    if not base.is_dir():
        raise InputError(f"{folder}: its base model {base} is not there", hint="put the pruned model back")
    if opening.stream:
        raise InputError(f"{folder}: an adapter is added in memory", hint="open it without streaming")
    source = open_source(name, base, replace(opening, stream=False))
    if source.scan.weights != adapter.base_weights:
        raise InputError(
            f"{folder}: trained on weights {adapter.base_weights[:12]}, "
            f"{base} now holds {source.scan.weights[:12]}",
            hint="put back the pruned model that the adapter was trained on",
        )
    merge_adapter(source.model, adapter)  # type: ignore[arg-type]  # not streamed, so it is a module
    return replace(source, adapter=adapter)


def open_measured(name: str, folder: Path, opening: Opening) -> Source:
    """Open what can be run, with what works while it runs: a model folder, or a kept adapter with its base.

    Raises:
        UsageError: It is to be streamed, and a plan works while the model runs.
    """
    source = (open_adapted if is_adapter(folder) else open_source)(name, folder, opening)
    carry_on(source.model, source.folder)
    return replace(source, measured=True)
