"""From a folder with zeros to a packed one that leaves them out, and back, bit by bit."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from structprune.checkpoint import packed, packing
from structprune.checkpoint.delivery import Delivery, deliver
from structprune.checkpoint.inputs import local_inputs
from structprune.checkpoint.integrity import check_weights, intact_manifest
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.manifest import MANIFEST, Manifest, list_files, read_manifest
from structprune.checkpoint.output import check_output
from structprune.checkpoint.packing import Form, Scheme
from structprune.checkpoint.partial import FINGERPRINT, PLANS
from structprune.checkpoint.side_files import copied_names, copy_side_files
from structprune.checkpoint.writing import Writing
from structprune.errors import InputError, UsageError
from structprune.models.cost import weight_bytes
from structprune.models.opening import Opening
from structprune.models.streamed import open_skeleton
from structprune.progress import Progress, silent
from structprune.proof.measure import Place, places
from structprune.storage.header import DTYPE_NAMES
from structprune.storage.reader import CheckpointReader
from structprune.storage.reference import read_reference
from structprune.storage.safe_open import hash_file
from structprune.storage.weight_files import PACKING

HINTS: Mapping[str, str] = {
    "2:4": "prune with --sparsity 2:4, or use --to bitmask for other zeros",
    "bitmask": "prune the model first; a bitmask saves bytes from one zero in 16 on",
}
CARD = """# Packed weights

`{name}` holds the weights of a pruned model without their zeros ({scheme}). No runtime loads it as it is;
this gives back the folder it was made from, bit by bit:

    structprune export {name} DENSE --to dense
"""


@dataclass(frozen=True)
class Survey:
    """What can be packed.

    Attributes:
        forms: Stored tensor -> how it is to be written.
        left: Tensor that stays as it is -> why.
    """

    forms: dict[str, Form]
    left: dict[str, str]


def export(
    model: str,
    output: str | Path,
    to: str,
    *,
    opening: Opening = Opening(),
    writing: Writing = Writing(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a model's folder packed, or a packed folder dense again, and return the report.

    Args:
        model: A folder; for `dense` one that this function packed.
        output: The folder to write.
        to: "2:4", "bitmask" or "dense".
        opening: How the model is opened; one tensor is held.
        writing: How the output is written; the proof needs no fresh process.
        progress: Told (stage, done, total).

    Raises:
        UsageError: `to` is none of the above.
        InputError: Nothing can be packed, the folder is packed already or not at all, or it is damaged.
        VerificationError: What was written does not unpack to the bytes that were read; nothing is published.
    """
    schemes: dict[str, Scheme] = {scheme: scheme for scheme in get_args(Scheme)}
    if to not in (*schemes, "dense"):
        raise UsageError(f"{to!r} is no way to store weights", hint="one of: 2:4, bitmask, dense")
    writing.refuse("link", "refer", because="an export writes every weight anew")
    folder = resolve(model)
    if reference := read_reference(folder):
        raise InputError(
            f"{folder}: holds no weights of its own, they are those of {reference.folder}",
            hint="export that folder",
        )
    final = check_output(
        local_inputs("the model", folder),
        Path(output),
        overwrite=writing.overwrite,
        needed_bytes=_needed(folder, to, opening),
    )
    fingerprint = {"export": to, "files": _stamps(folder)}
    start = time.perf_counter()
    if to == "dense":
        made = _unpack(folder, final, fingerprint, opening, writing, progress)
    else:
        made = _pack(folder, final, schemes[to], fingerprint, opening, writing, progress)
    return {"output": str(final), "to": to, **made, "seconds": time.perf_counter() - start}


def _pack(
    folder: Path,
    final: Path,
    scheme: Scheme,
    fingerprint: Mapping[str, Any],
    opening: Opening,
    writing: Writing,
    progress: Progress,
) -> dict[str, Any]:
    manifest = intact_manifest(folder, opening)
    opened = open_skeleton(folder, opening)
    reader = opened.reader
    assert isinstance(reader, CheckpointReader)
    files = copied_names(folder)
    survey = _survey(reader, places(opened), scheme, progress)
    chosen = [name for name, form in survey.forms.items() if form.scheme]
    if not chosen:
        what = "holds 2:4" if scheme == "2:4" else "has zeros enough to become smaller"
        raise InputError(f"{folder}: no linear of its decoder blocks {what}", hint=HINTS[scheme])
    with _whole(final, fingerprint, writing, files) as work:
        written, hashes, read = packed.write_packed(reader, work.folder, survey.forms, scheme, progress)
        check_weights(manifest, reader, read)
        _check_plans(folder, manifest, hashes)
        work.hashes |= hashes | _copy_beside(folder, work, opening)
        packed.prove(work.folder, written, progress)
        work.write_text("README.md", CARD.format(name=final.name, scheme=scheme))
        sizes = {"dense": weight_bytes(folder), "packed": weight_bytes(work.folder)}
        work.publish(stages=[], facts={"packed": scheme})
    respelled = packed.respelled(reader, written)
    return {
        "bytes": sizes,
        "linears": {
            "packed": len(chosen),
            "dense_bytes": sum(reader.tensors[name].nbytes for name in chosen),
            "packed_bytes": sum(survey.forms[name].nbytes for name in chosen),
        },
        "packed": chosen,
        "left": [{"name": name, "reason": reason} for name, reason in survey.left.items()],
        # The tensors always come back bit by bit; a file's header may have been spelled in another way.
        "same_files": not respelled,
        "respelled": respelled,
    }


@contextmanager
def _whole(
    final: Path, fingerprint: Mapping[str, Any], writing: Writing, files: Sequence[str]
) -> Iterator[Delivery]:
    """Deliver a folder, and leave nothing of it when it fails: no later run goes on from half an export."""
    with deliver(final, fingerprint, writing, files=files) as work:
        try:
            yield work
        finally:
            work.drop()


def _survey(
    reader: CheckpointReader, where: Mapping[str, Place], scheme: Scheme, progress: Progress
) -> Survey:
    """Look at every linear and choose how each tensor is written; one is in memory at a time.

    Args:
        reader: The model's files.
        where: Which stored tensors are linears of decoder blocks.
        scheme: How linears are to be packed.
        progress: Told after every tensor.
    """
    forms: dict[str, Form] = {}
    left: dict[str, str] = {}
    for done, (name, info) in enumerate(reader.tensors.items(), start=1):
        place = where.get(name)
        plain = Form(name=name, dtype=DTYPE_NAMES[info.dtype], shape=info.shape)
        forms[name] = plain
        if place is None:
            left[name] = "no linear of a decoder block"
        elif scheme == "2:4" and not packing.divides(info.shape, place.transposed):
            left[name] = f"shape {list(info.shape)}: inputs not divisible by 8"
        elif scheme == "2:4":
            if packing.holds(reader.read(name), place.transposed):
                forms[name] = plain.model_copy(update={"scheme": scheme, "transposed": place.transposed})
            else:
                left[name] = "more than 2 weights in a group of 4 inputs"
        else:
            kept = packing.count(reader.read(name))
            packed = plain.model_copy(update={"scheme": scheme, "kept": kept})
            if packed.nbytes < info.nbytes:
                forms[name] = packed
            else:
                left[name] = f"{kept} of {math.prod(info.shape)} weights are not zero: no bytes saved"
        progress("survey", done, len(reader.tensors))
    return Survey(forms, left)


def _unpack(
    folder: Path,
    final: Path,
    fingerprint: Mapping[str, Any],
    opening: Opening,
    writing: Writing,
    progress: Progress,
) -> dict[str, Any]:
    if not packed.is_packed(folder):
        raise InputError(
            f"{folder}: is not packed, it has no {PACKING}",
            hint="a folder that `structprune export --to 2:4` or `--to bitmask` wrote is unpacked",
        )
    links, root = opening.allow_external_symlinks, opening.root(folder)
    manifest = read_manifest(folder, allow_external_symlinks=links)
    if manifest is None:
        raise InputError(f"{folder}: incomplete, it has no manifest", hint="export it again")
    written = packed.read_packing(folder, root)
    files = [*copied_names(folder), *(file.dense for file in written.files)]
    former = read_manifest(folder / packed.SOURCE, allow_external_symlinks=links)
    with _whole(final, fingerprint, writing, files) as work:
        work.note(*packed.write_dense(folder, work.folder, written, root, progress))
        work.hashes |= _copy_beside(folder, work, opening)
        _check_copies(folder, manifest, work.hashes, root)
        sizes = {"dense": weight_bytes(work.folder), "packed": weight_bytes(folder)}
        work.publish(stages=former.stages if former else [], facts=former.facts if former else {})
    return {"bytes": sizes, "files": [file.dense for file in written.files], "from": written.scheme}


def _copy_beside(folder: Path, work: Delivery, opening: Opening) -> dict[str, str]:
    return copy_side_files(folder, work.folder, allow_external_symlinks=opening.allow_external_symlinks)


def _check_plans(folder: Path, manifest: Manifest | None, copied: Mapping[str, str]) -> None:
    """Compare the plans that are packed with the manifest: nothing else of an export reads them.

    Raises:
        InputError: One was changed.
    """
    for name, file in manifest.files.items() if manifest else ():
        found = copied.get(f"{packed.SOURCE}/{name}", file.sha256)
        if name.startswith(f"{PLANS}/") and found != file.sha256:
            raise InputError(
                f"{folder / name}: was changed since it was written", hint="put it back, or prune again"
            )


def _check_copies(folder: Path, manifest: Manifest, copied: Mapping[str, str], root: Path | None) -> None:
    """Compare what was copied or read with the manifest; weights have hashes of their own in packing.json."""
    found = dict(copied)
    for name in (PACKING, f"{packed.SOURCE}/{MANIFEST}"):
        if (folder / name).exists():
            found[name] = hash_file(folder / name, root)
    for name, file in manifest.files.items():
        if name in (FINGERPRINT, "README.md") or (name.endswith(".safetensors") and "/" not in name):
            continue
        if file.sha256 not in (found.get(name), found.get(name.removeprefix(f"{packed.SOURCE}/"))):
            raise InputError(
                f"{folder / name}: missing, or changed since the folder was packed",
                hint="fetch it again; change the dense folder instead",
            )


def _needed(folder: Path, to: str, opening: Opening) -> int:
    """Return the most bytes that the result can take."""
    if to == "dense" and packed.is_packed(folder):
        return sum(form.dense_nbytes for form in packed.read_packing(folder, opening.root(folder)).forms)
    return weight_bytes(folder)


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Return size and time of every file: enough to know an interrupted export of the same folder."""
    found = ((name, (folder / name).lstat()) for name in list_files(folder))
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found}
