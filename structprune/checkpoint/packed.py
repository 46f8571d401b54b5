"""Packed folders: a sparse model's files without its zeros, to store and to send; no runtime reads them.

They hold `packed-*.safetensors`, names that no loader looks for; the files beside the weights byte for byte;
`structprune/packing.json`; and under `structprune/source` what else belongs to the dense folder.
`write_dense` undoes `write_packed`: the same shards, and the same bytes wherever the source's own headers are
spelled as safetensors spells them.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from structprune.checkpoint.manifest import MANIFEST, OURS, list_files
from structprune.checkpoint.packing import Form, PackedFile, Packing, Scheme
from structprune.errors import InputError, VerificationError
from structprune.progress import Progress
from structprune.storage.durable import DurableFile, blame
from structprune.storage.header import DTYPE_NAMES, Header, read_header
from structprune.storage.reader import CheckpointReader
from structprune.storage.safe_open import CHUNK_BYTES, open_regular, read_at
from structprune.storage.strict_json import read_json
from structprune.storage.tensor_file import Entry, bytes_of, encode_header, read_tensor
from structprune.storage.weight_files import INDEX, PACKING
from structprune.storage.writer import ShardWriter

SOURCE = f"{OURS}/source"
"""Folder with what comes back beside the dense weights: index, card, manifest, recipe, plans."""

# An entry takes about 150 bytes: room for more tensors than an index may name.
MAX_PACKING_BYTES = 256_000_000
# `CheckpointReader` opens only files that say "pt", so it refuses one that somebody renamed.
FORMAT_NOTE = {"format": "structprune-packed"}

# Told (stage, done, total).


def is_packed(folder: Path) -> bool:
    """Tell whether a folder was written by `write_packed`."""
    return (folder / PACKING).exists()


def write_packed(
    reader: CheckpointReader, folder: Path, forms: Mapping[str, Form], scheme: Scheme, progress: Progress
) -> tuple[Packing, dict[str, str], dict[str, str]]:
    """Write the weights packed, shard by shard, then packing.json and what else belongs to the source.

    Args:
        reader: The source, never written to.
        folder: An existing folder.
        forms: How each tensor is written, by name.
        scheme: The scheme they were surveyed for.
        progress: Told after every tensor.

    Returns:
        What was written, the sha256 of each weight file by name, and of each tensor's bytes before.
    """
    files: list[PackedFile] = []
    hashes: dict[str, str] = {}
    read: dict[str, str] = {}
    done = 0
    for number, (dense, names) in enumerate(reader.shards.items(), start=1):
        packed = f"packed-{number:05d}-of-{len(reader.shards):05d}.safetensors"
        own = [forms[name] for name in names]
        # The note that `ShardWriter` gives a file that has none.
        notes = dict(reader.metadata[dense]) or {"format": "pt"}
        digest = hashlib.sha256(encode_header([form.dense for form in own], notes))
        layout = {packed: [entry for form in own for entry in form.entries]}
        # One writer per file: an index beside them would make other loaders look for a model here.
        with ShardWriter(folder, layout, {packed: FORMAT_NOTE}) as writer:
            for form in own:
                tensor = reader.read(form.name)
                raw = bytes_of(tensor, form.name)
                digest.update(raw)
                read[form.name] = hashlib.sha256(raw).hexdigest()
                for name, part in form.pack(tensor).items():
                    writer.write(name, part)
                done += 1
                progress("pack", done, len(reader.tensors))
        hashes |= writer.hashes
        files.append(
            PackedFile(packed=packed, dense=dense, metadata=notes, sha256=digest.hexdigest(), tensors=own)
        )
    result = Packing(scheme=scheme, files=files)
    (folder / OURS).mkdir(exist_ok=True)
    text = json.dumps({"format": result.format} | result.model_dump(exclude_defaults=True))
    with DurableFile(folder / PACKING) as output:
        output.write(f"{text}\n".encode())
    for name in _record(reader.folder):
        hashes[f"{SOURCE}/{name}"] = _copy(reader.folder / name, folder / SOURCE / name, reader.root)
    return result, hashes, read


def read_packing(folder: Path, root: Path | None) -> Packing:
    """Return a packed folder's packing.json, checked against the headers of its weight files.

    Args:
        folder: The folder.
        root: See `safe_open.check_link`.

    Raises:
        InputError: It is damaged, or a file or tensor is missing, left over, or of another dtype or shape.
    """
    path = folder / PACKING
    try:
        found = Packing.model_validate(read_json(path, limit_bytes=MAX_PACKING_BYTES, root=root))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {place}: {first['msg']}", hint="written by another version, or damaged: export it again"
        ) from None
    for names in (
        [form.name for form in found.forms],
        [file.dense for file in found.files],
        [file.packed for file in found.files],
    ):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: {twice!r} is named twice", hint="export it again")
    for file in found.files:
        header_of(folder, file, root)
    return found


def unpacked(folder: Path, file: PackedFile, root: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of one file in order, in their dense layout, one in memory at a time.

    Args:
        folder: The packed folder.
        file: The file.
        root: See `safe_open.check_link`.

    Raises:
        InputError: The file is damaged; the message names it and the tensor.
    """
    header = header_of(folder, file, root)
    path = folder / file.packed
    for form in file.tensors:
        parts = {name: read_tensor(path, header.tensors[name], header, root) for name, _, _ in form.entries}
        yield form.name, form.unpack(parts, str(path))


def prove(folder: Path, written: Packing, progress: Progress) -> None:
    """Unpack every tensor from the files and compare with the hashes of the dense files.

    Raises:
        VerificationError: A file does not give back the bytes that were packed.
    """
    if changed := changed_files(folder, written, folder, progress):
        raise VerificationError(
            f"{folder}: {changed[0]}", hint="nothing was published; check the disk and the memory"
        )


def changed_files(folder: Path, written: Packing, root: Path | None, progress: Progress) -> list[str]:
    """Unpack every tensor; return a line for each file that does not give the bytes of its dense one.

    Args:
        folder: The packed folder.
        written: The folder's packing.
        root: See `safe_open.check_link`.
        progress: Told after every tensor.
    """
    problems = []
    done = 0
    for file in written.files:
        digest = hashlib.sha256(file.header)
        for name, tensor in unpacked(folder, file, root):
            digest.update(bytes_of(tensor, name))
            done += 1
            progress("prove", done, len(written.forms))
        if digest.hexdigest() != file.sha256:
            problems.append(f"{file.packed}: unpacks to other bytes than {file.dense} held")
    return problems


def write_dense(
    folder: Path, dest: Path, written: Packing, root: Path | None, progress: Progress
) -> tuple[dict[str, str], dict[Entry, str]]:
    """Write the dense weights of a packed folder, and what else belonged to the folder it was made from.

    Args:
        folder: The packed folder.
        dest: An existing folder.
        written: The folder's packing.
        root: See `safe_open.check_link`.
        progress: Told after every tensor.

    Returns:
        The sha256 of each written file, by file name, and of the bytes of each written tensor.

    Raises:
        InputError: A packed file is damaged, or does not give the bytes that packing.json promises.
    """
    hashes: dict[str, str] = {}
    digests: dict[Entry, str] = {}
    if (folder / SOURCE).is_dir():
        for name in list_files(folder / SOURCE):
            hashes[name] = _copy(folder / SOURCE / name, dest / name, root)
    done = 0
    for file in written.files:
        layout = {file.dense: file.entries}
        with ShardWriter(dest, layout, {file.dense: file.metadata}) as writer:
            for name, tensor in unpacked(folder, file, root):
                writer.write(name, tensor)
                done += 1
                progress("unpack", done, len(written.forms))
        if writer.hashes[file.dense] != file.sha256:
            raise InputError(
                f"{folder / file.packed}: unpacks to other bytes than were packed",
                hint="the file was changed or damaged; fetch it again",
            )
        hashes |= writer.hashes
        digests |= writer.digests
    return hashes, digests


def respelled(reader: CheckpointReader, written: Packing) -> list[str]:
    """Return the dense files that come back with other bytes, as their own headers are spelled otherwise."""
    return [
        file.dense
        for file in written.files
        if not _starts_with(reader.folder / file.dense, file.header, reader.root)
    ]


def _record(folder: Path) -> list[str]:
    """Return what belongs to a dense folder besides weights and side files: index, card, what we wrote."""
    found = [name for name in (INDEX, MANIFEST) if (folder / name).exists()]
    found += sorted(path.name for path in folder.iterdir() if path.name.lower() in ("readme", "readme.md"))
    if (folder / OURS).is_dir():
        # A folder's fingerprint is that of the run that wrote it; the next one leaves its own.
        found += [f"{OURS}/{name}" for name in list_files(folder / OURS) if name != "fingerprint.json"]
    return found


def header_of(folder: Path, file: PackedFile, root: Path | None) -> Header:
    """Return the header of a packed file, which holds exactly the tensors that packing.json says."""
    path = folder / file.packed
    header = read_header(path, root)
    expected = [entry for form in file.tensors for entry in form.entries]
    found = {info.name: (info.dtype, info.shape) for info in header.tensors.values()}
    for name, dtype, shape in expected:
        if name not in found:
            raise InputError(f"{path}: tensor {name!r} of {PACKING} is missing", hint="export it again")
        if found[name] != (dtype, shape):
            seen = f"{DTYPE_NAMES[found[name][0]]} {list(found[name][1])}"
            raise InputError(
                f"{path}: tensor {name!r} is {seen}, {PACKING} says {DTYPE_NAMES[dtype]} {list(shape)}",
                hint="the folder is damaged; export it again",
            )
    if len(found) > len(expected):
        extra = next(name for name in found if name not in {name for name, _, _ in expected})
        raise InputError(f"{path}: tensor {extra!r} is not in {PACKING}", hint="export it again")
    return header


def _starts_with(path: Path, header: bytes, root: Path | None) -> bool:
    """Tell whether a file begins with these bytes."""
    with open_regular(path, root) as descriptor:
        found = bytearray(min(len(header), os.fstat(descriptor).st_size))
        read_at(descriptor, memoryview(found), 0, path)
    return bytes(found) == header


def _copy(source: Path, target: Path, root: Path | None) -> str:
    """Copy a file byte for byte and return its sha256."""
    with blame(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source, root) as descriptor, DurableFile(target) as output:
        while chunk := os.read(descriptor, CHUNK_BYTES):
            output.write(chunk)
    return output.sha256
