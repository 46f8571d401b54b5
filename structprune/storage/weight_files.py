"""Which files of a folder hold the model's weights: the index against the folder, or why there are none."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune.errors import EnvironmentFailure, InputError, counted
from structprune.storage.reference import REFERENCE, check_reference, read_reference
from structprune.storage.strict_json import read_json

INDEX_HINT = "the index is damaged; fetch the model again"

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Its weights have other names and forms; `structprune export --to dense` turns them back.
PACKING = "structprune/packing.json"
# The largest public index (92 thousand tensors) has 9 MB.
MAX_INDEX_BYTES = 64_000_000

_NUMBERED = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".nemo", ".distcp", ".pkl")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        folder: Where they are: the model's folder, or another that it refers to.
        files: Their names, sorted.
        weight_map: Tensor -> file as the index has it; None where there is no index.
        index_metadata: The `metadata` of the index; None where there is no index.
    """

    folder: Path
    files: tuple[str, ...]
    weight_map: dict[str, str] | None
    index_metadata: dict[str, Any] | None


def find_weights(folder: Path, root: Path | None) -> WeightFiles:
    """Find the weight files of a model folder.

    Args:
        folder: The model folder.
        root: Passed on to `safe_open.check_link`: the folder, or None where links may lead anywhere.

    Raises:
        InputError: An adapter, another format, pickles only, an index that is damaged or names a path,
            missing or left-over shards; or files of another folder that are gone or were changed.
    """
    names = _list(folder)
    if (folder / PACKING).exists():
        raise InputError(
            f"{folder}: its weights are packed to be stored, no runtime reads them",
            hint=f"unpack it first: `structprune export {folder} DENSE --to dense`",
        )
    if "adapter_config.json" in names:
        raise InputError(
            f"{folder / 'adapter_config.json'}: this is an adapter, not a whole model",
            hint="`structprune recover` without --keep-adapter writes a whole model; an adapter of PEFT is "
            "merged with its merge_and_unload",
        )
    numbered = sorted(name for name in names if _NUMBERED.fullmatch(name))
    if (reference := read_reference(folder, root)) is not None:
        check_reference(folder, reference)
        files = WeightFiles(reference.base, tuple(sorted(reference.files)), None, None)
        left_over = [name for name in [*numbered, SINGLE, INDEX] if name in names]
        reason = f"beside {REFERENCE}, which says that they are elsewhere"
    elif INDEX in names:
        files = _read_index(folder, root)
        left_over = [name for name in [*numbered, SINGLE] if name in names and name not in files.files]
        reason = f"not named in {INDEX}"
    elif SINGLE in names:
        files = WeightFiles(folder, (SINGLE,), None, None)
        left_over, reason = numbered, f"beside {SINGLE} and without an index"
    else:
        raise _no_weights(folder, names)
    if left_over:
        raise InputError(
            f"{folder}: weight files {reason}: {', '.join(left_over)}",
            hint="two checkpoints are mixed here; remove the files of the other one",
        )
    return files


def compare_with_index(
    found: Mapping[str, tuple[str, ...]], weights: WeightFiles, folder: Path, *, strict: bool = True
) -> None:
    """Check that no tensor is in two files, and that index and files name the same tensors.

    Args:
        found: File -> names of the tensors in it.
        weights: What the index says.
        folder: The model folder, for messages.
        strict: Refuse tensors that the index does not name; else they are warned of.

    Raises:
        InputError: They differ; the message names up to five tensors.
    """
    home: dict[str, str] = {}
    for file, names in found.items():
        for name in names:
            if name in home:
                raise InputError(
                    f"{folder}: tensor {name!r} is in two files, {home[name]} and {file}",
                    hint="one of them belongs to another checkpoint; fetch the model again",
                )
            home[name] = file
    if weights.weight_map is None:
        return
    index = folder / INDEX
    absent = [f"{name!r} ({file})" for name, file in weights.weight_map.items() if home.get(name) != file]
    if absent:
        count = counted(len(absent), "tensor")
        raise InputError(
            f"{index}: {count} not in the file named for them: {', '.join(absent[:5])}",
            hint="index and shards belong to different checkpoints; fetch the model again",
        )
    extra = [f"{name!r} ({file})" for name, file in home.items() if name not in weights.weight_map]
    if not extra:
        return
    said = f"{counted(len(extra), 'tensor')} in a shard but not in the index: {', '.join(extra[:5])}"
    if strict:
        raise InputError(
            f"{index}: {said}", hint="index and shards belong to different checkpoints; fetch the model again"
        )
    logger.warning("%s: %s", index, said)


def _list(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        raise InputError(f"{folder}: no such folder", hint="check the path of the model") from None
    except NotADirectoryError:
        kind = _foreign_format({folder.name})
        raise InputError(
            f"{folder}: is a file{f' in {kind} format' if kind else ''}, expected a model folder",
            hint="give the folder that holds config.json and model.safetensors",
        ) from None
    except OSError as error:
        raise EnvironmentFailure(
            f"{folder}: cannot be read: {error.strerror}", hint="check the permissions"
        ) from None


def _read_index(folder: Path, root: Path | None) -> WeightFiles:
    path = folder / INDEX
    index = read_json(path, limit_bytes=MAX_INDEX_BYTES, root=root)
    if (
        not isinstance(index, dict)
        or not isinstance(index.get("weight_map"), dict)
        or not index["weight_map"]
    ):
        raise InputError(
            f"{path}: must hold an object with a weight_map that names the file of every tensor",
            hint=INDEX_HINT,
        )
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: metadata must be an object, found {str(metadata)[:80]!r}", hint=INDEX_HINT)
    weight_map: dict[str, str] = index["weight_map"]
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise InputError(
                f"{path}: tensor {name!r} is said to be in {str(file)[:80]!r}: "
                "a shard name must be a plain file name that ends in .safetensors",
                hint="do not trust this model",
            )
    files = sorted(set(weight_map.values()))
    # A link whose target is gone (a cache that was cleaned) counts as missing too.
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        count = counted(len(files), "file")
        raise InputError(
            f"{folder}: {len(missing)} of {count} in {INDEX} missing: {', '.join(missing)}",
            hint="the download is incomplete; fetch the model again",
        )
    return WeightFiles(folder, tuple(files), weight_map, metadata)


def _is_plain(file: str) -> bool:
    return (
        file.endswith(".safetensors")
        and file.isprintable()
        and not file.startswith(".")
        and not any(separator in file for separator in "/\\:")
        and len(file.encode()) <= 255
    )


def _no_weights(folder: Path, names: set[str]) -> InputError:
    others = sorted(name for name in names if name.endswith(".safetensors"))
    numbered = [name for name in others if _NUMBERED.fullmatch(name)]
    if numbered:
        return InputError(
            f"{folder}: {len(numbered)} shards ({numbered[0]}, ...) but no {INDEX}",
            hint="the download is incomplete; fetch the model again",
        )
    if others:
        return InputError(
            f"{folder}: neither {SINGLE} nor {INDEX}; found {', '.join(others[:5])}",
            hint=f"rename the file to {SINGLE} if it holds the whole model",
        )
    if kind := _foreign_format(names):
        return InputError(
            f"{folder}: this is a model in {kind} format, expected safetensors",
            hint="use the original Hugging Face folder that it was converted from",
        )
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return InputError(
            f"{folder}: pickled weights only ({', '.join(pickles[:5])}): pickles run code and are never read",
            hint="convert the model in a sandbox: save_pretrained writes safetensors",
        )
    return InputError(
        f"{folder}: no weights: neither {SINGLE} nor {INDEX}",
        hint="check the path; is the download complete?",
    )


def _foreign_format(names: set[str]) -> str:
    for ending, kind in (
        (".gguf", "GGUF"),
        (".onnx", "ONNX"),
        (".npz", "MLX"),
        (".h5", "Keras"),
        (".msgpack", "Flax"),
    ):
        if any(name.endswith(ending) for name in names):
            return kind
    return "ONNX" if "onnx" in names else ""
