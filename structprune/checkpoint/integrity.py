"""Whether a folder of ours still is what was written, as far as it is loaded: asked wherever one is opened.

What a model is loaded from is compared: weights, index, configuration, tokenizer, processor, templates, code,
plans, an adapter, a packing, a reference to weights elsewhere. What shapes nothing may be edited freely:
documents (README.md and any other Markdown, licences, notices), and the recipe, the report and the plots
under `structprune/`; only `verify` compares every file. The blocks of a plan are compared by size here: when
they are read, they are held to hashes of their own.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from structprune.checkpoint.adapter import TENSOR_FILE
from structprune.checkpoint.manifest import MANIFEST, OURS, Manifest, changes_weights, compare, read_manifest
from structprune.errors import InputError
from structprune.models.opening import Opening
from structprune.storage.reader import StoredTensors
from structprune.storage.reference import REFERENCE
from structprune.storage.scan import combine
from structprune.storage.weight_files import PACKING

_DOCUMENT = re.compile(r".*\.md|(readme|licen[cs]e|notice|copying)[^/]*", re.IGNORECASE)
_AGAIN = "fetch the folder again, or run the command that wrote it again"


def intact_manifest(folder: Path, opening: Opening = Opening()) -> Manifest | None:
    """Return the manifest of a folder of ours whose files are those that were written; None for any other.

    Small files are compared by their bytes, weights by their size; `check_weights` does the rest.

    Args:
        folder: Any model folder.
        opening: Whether links may lead out of it.

    Raises:
        InputError: It was never completed, its manifest is damaged, a file that is loaded is missing or was
            changed, or one came later that changes which weights are loaded.
    """
    manifest = read_manifest(folder, allow_external_symlinks=opening.allow_external_symlinks)
    if manifest is None:
        if (folder / OURS).is_dir():
            raise InputError(
                f"{folder}: incomplete, it has {OURS}/ but no {MANIFEST}",
                hint="run the command that wrote it again",
            )
        return None
    on_purpose = f'put it back; or, changed on purpose, delete its entry under "files" in {folder / MANIFEST}'
    for name, written in manifest.files.items():
        if not _is_loaded(name):
            continue
        # What is read whole anyway is small; other tensors are hashed where their bytes pass by.
        sizes_only = name.endswith(".safetensors") and name != TENSOR_FILE
        if problem := compare(folder, name, written, opening.root(folder), sizes_only=sizes_only):
            raise InputError(
                f"{folder}: {problem}", hint=_AGAIN if name.endswith(".safetensors") else on_purpose
            )
    for path in folder.iterdir():
        if changes_weights(path.name, manifest):
            raise InputError(
                f"{path}: was added after the folder was written, and changes what is loaded",
                hint="move it to another folder",
            )
    return manifest


def check_weights(manifest: Manifest | None, reader: StoredTensors, found: Mapping[str, str]) -> None:
    """Compare the tensors of a folder with what was written.

    Args:
        manifest: Of the folder; without one, or with one of format 1, there is nothing to compare with.
        reader: The folder's tensors.
        found: Name -> sha256 of the bytes that there are.

    Raises:
        InputError: They differ; the message names file and tensor.
    """
    problems = changed_tensors(manifest.weights, manifest.tensors, reader, found) if manifest else []
    if problems:
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise InputError(f"{reader.folder}: {problems[0]}{more}", hint=_AGAIN)


def changed_tensors(
    weights: str | None, written: Mapping[str, str], reader: StoredTensors, found: Mapping[str, str]
) -> list[str]:
    """Return one line for each tensor that is not what was written, with its file.

    Args:
        weights: The hash of all weights that were written; None where it is not known.
        written: Name -> sha256 of the bytes that were written.
        reader: The tensors that there are.
        found: Name -> sha256 of the bytes that there are.
    """
    entries = {(name, info.dtype, info.shape): found[name] for name, info in reader.tensors.items()}
    if weights in (None, combine(entries)):
        return []
    problems = [f"tensor {name!r} is missing" for name in written if name not in found]
    for name, info in reader.tensors.items():
        if name not in written:
            problems.append(f"{info.file}: tensor {name!r} was added after the folder was written")
        elif found[name] != written[name]:
            problems.append(f"{info.file}: tensor {name!r} was changed after it was written")
    # The same bytes under another dtype or shape: the header of a file is at fault, and no tensor stands out.
    return problems or ["a tensor has another dtype or shape than was written"]


def _is_loaded(name: str) -> bool:
    if name.startswith(f"{OURS}/"):
        return name in (PACKING, REFERENCE) or name.startswith(f"{OURS}/plans/")
    return not _DOCUMENT.fullmatch(name)
