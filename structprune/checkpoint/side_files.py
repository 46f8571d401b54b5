"""The files of a model folder beside the weights: configuration, tokenizer, template, processor, licence."""

import re
from collections.abc import Iterable
from pathlib import Path

from structprune.checkpoint.manifest import MANIFEST, OURS
from structprune.models.opening import Opening
from structprune.storage.durable import DurableFile, blame
from structprune.storage.reference import read_reference
from structprune.storage.safe_open import CHUNK_BYTES, open_regular, read_at

# Weights in any format (the new folder gets its own), archives, and pictures of the old model card.
_LEFT_BEHIND = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|nemo|distcp|pkl|gguf|onnx|onnx_data|npz|npy|h5|msgpack|tflite|mlmodel"
    r"|safetensors\.index\.json|bin\.index\.json|h5\.index\.json|msgpack\.index\.json"
    r"|zip|tar|gz|xz|zst|7z|png|jpg|jpeg|gif|svg|webp|mp4|pdf|log|tmp|lock)"
    # A card describes the model that was read; the new one gets its own.
    r"|readme(\.md|\.txt|\.rst)?"
    r"|trainer_state\.json",
    re.IGNORECASE,
)

# What stands beside weights and configuration because of the tokenizer alone.
_OF_TOKENIZER = re.compile(
    r"token.*|vocab.*|merges\.txt|added_tokens\.json|special_tokens_map\.json|chat_template.*"
    r"|.*\.(model|jinja)|tekken\.json",
    re.IGNORECASE,
)

# The one folder that transformers keeps beside the files: chat templates other than the default.
_FOLDERS = ("additional_chat_templates",)


def side_files(source: Path) -> list[str]:
    """Return the names of the files that belong to a model besides its weights, sorted."""
    names = [
        path.name
        for path in source.iterdir()
        if not path.is_dir()
        and not path.name.startswith(".")
        and path.name not in (MANIFEST, OURS)
        and not _LEFT_BEHIND.fullmatch(path.name)
    ]
    for folder in _FOLDERS:
        if (source / folder).is_dir():
            names += [
                f"{folder}/{path.name}" for path in (source / folder).iterdir() if path.suffix == ".jinja"
            ]
    return sorted(names)


def check_side_files(source: Path, opening: Opening) -> None:
    """Check that every file that will be copied beside the weights can be read, before there is work to lose.

    Args:
        source: A model folder.
        opening: How it is opened, and which other folder its tokenizer comes from.

    Raises:
        InputError: A file is not a regular one, or a link leads out of its folder.
        EnvironmentFailure: A file cannot be read.
    """
    paths = [(source / name, source) for name in side_files(source)]
    if opening.tokenizer is not None and (other := Path(opening.tokenizer).expanduser()).is_dir():
        paths += [(other / name, other) for name in side_files(other) if _OF_TOKENIZER.fullmatch(name)]
    for path, folder in paths:
        with open_regular(path, opening.root(folder)):
            pass


def copied_names(source: Path, tokenizer: str | Path | None = None) -> list[str]:
    """Return the names that a result can have from its source: of weights and of the files beside them.

    Args:
        source: The model's folder.
        tokenizer: Another folder, with the tokenizer.
    """
    others = side_files(Path(tokenizer).expanduser()) if tokenizer is not None else []
    reference = read_reference(source)
    weights = reference.files if reference else [path.name for path in source.glob("*.safetensors")]
    return [*side_files(source), *weights, *others]


def copy_side_files(source: Path, dest: Path, *, allow_external_symlinks: bool = False) -> dict[str, str]:
    """Copy the files beside the weights byte for byte; links become files.

    Left behind: weights and pickles of any format, README (the result gets a card of its own), hidden files,
    archives, pictures, and what structprune wrote (`structprune/`, `structprune.json`).

    Args:
        source: A model folder.
        dest: An existing folder; files of the same name are replaced.
        allow_external_symlinks: Accept links that lead out of `source`.

    Returns:
        Name of each copied file, relative to `dest` -> sha256.

    Raises:
        InputError: A file is not a regular one, or a link leads out of the folder.
        EnvironmentFailure: A file cannot be read or written.
    """
    return _copy_all(side_files(source), source, dest, None if allow_external_symlinks else source)


def copy_tokenizer(source: Path, dest: Path, *, allow_external_symlinks: bool = False) -> dict[str, str]:
    """Copy the files of a tokenizer into a folder that has none; else as `copy_side_files` does."""
    names = [name for name in side_files(source) if _OF_TOKENIZER.fullmatch(name)]
    return _copy_all(names, source, dest, None if allow_external_symlinks else source)


def _copy_all(names: Iterable[str], source: Path, dest: Path, root: Path | None) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for name in names:
        with blame(dest / name):
            (dest / name).parent.mkdir(exist_ok=True)
        hashes[name] = _copy(source / name, dest / name, root)
    return hashes


def _copy(source: Path, target: Path, root: Path | None) -> str:
    with open_regular(source, root) as descriptor, DurableFile(target) as output:
        size = source.stat().st_size
        buffer = bytearray(min(size, CHUNK_BYTES))
        for start in range(0, size, CHUNK_BYTES):
            chunk = memoryview(buffer)[: min(CHUNK_BYTES, size - start)]
            read_at(descriptor, chunk, start, source)
            output.write(chunk)
    return output.sha256
