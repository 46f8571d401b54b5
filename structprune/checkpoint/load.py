"""Opens what structprune wrote, by the same act as pruning, and any plain model folder."""

import logging
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from structprune.checkpoint import accelerate as acceleration
from structprune.checkpoint.adapter import is_adapter
from structprune.checkpoint.integrity import check_weights, intact_manifest
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.manifest import MANIFEST
from structprune.checkpoint.running import carry_on
from structprune.checkpoint.source import open_adapted
from structprune.models.identity import names_of
from structprune.models.opening import Opening
from structprune.models.streamed import Model, build_model, open_reader
from structprune.models.tokenizer import open_tokenizer

logger = logging.getLogger(__name__)

Opened = tuple[Model, PreTrainedTokenizerBase | None]


def load(
    folder: str | Path, opening: Opening = Opening(), *, accelerate: str | None = None, check: bool = False
) -> Opened:
    """Open a folder that structprune wrote, or any model folder, and its tokenizer.

    Args:
        folder: A pruned or recovered model, a kept adapter (its base is opened too), or a plain model; its
            folder, its name on the hub, or a built-in one's.
        opening: How; an adapter and an accelerated model are always held in memory.
        accelerate: "2:4" runs linears with that pattern on sparse kernels where the device measures faster.
        check: Hash the weights too and compare them with the manifest, which reads every byte once more;
            without, only their sizes are compared. An adapter's base is always hashed.

    Returns:
        The model in eval mode, and its tokenizer or None.

    Raises:
        InputError: The folder is incomplete, damaged, changed or packed, or an adapter's base is gone or has
            changed.
        UsageError: `accelerate` is not known, or the model is to be streamed as well.
    """
    if accelerate is not None:
        acceleration.check(accelerate, opening)
        model, tokenizer = load(folder, replace(opening, stream=False), check=check)
        acceleration.accelerate(model)
        return model, tokenizer
    path = resolve(str(folder))
    if is_adapter(path):
        source = open_adapted(str(path), path, opening)
        return carry_on(source.model, source.folder), source.tokenizer
    return _open(path, opening, check=check)


def _open(path: Path, opening: Opening, *, check: bool) -> Opened:
    manifest = intact_manifest(path, opening)
    reader = open_reader(path, opening)
    model = build_model(reader, opening)
    if check:
        if manifest is None or manifest.weights is None:
            logger.warning("%s: no %s says what its weights were: only their form is checked", path, MANIFEST)
        check_weights(manifest, reader, reader.scan(names_of(model).ignored).hashes)
    return carry_on(model, path), open_tokenizer(path, opening)
