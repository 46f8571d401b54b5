"""Tensors of safetensors files: plain positional reads into fresh memory, and small files as a whole.

No memory mapping: mapped pages count as memory of the process for as long as the mapping lives.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from structprune.errors import EnvironmentFailure, InputError, StructpruneError
from structprune.storage.durable import DurableFile
from structprune.storage.header import DTYPE_NAMES, Header, TensorInfo, read_header, stamp_of
from structprune.storage.safe_open import open_regular, read_at

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor that is to be written."""


def read_tensor(path: Path, info: TensorInfo, header: Header, root: Path | None = None) -> Tensor:
    """Return one tensor of a file, in its stored dtype and in fresh memory.

    Raises:
        InputError: The file changed since its header was read, or a boolean is neither 0 nor 1.
        EnvironmentFailure: The memory does not suffice, or the disk reports an error.
    """
    try:
        flat = torch.empty(info.nbytes, dtype=torch.uint8)
    except RuntimeError:
        raise EnvironmentFailure(
            f"{path}: no memory for tensor {info.name!r} of {info.nbytes} bytes", hint="close other programs"
        ) from None
    with open_regular(path, root) as descriptor:
        if stamp_of(descriptor) != header.stamp:
            raise InputError(f"{path}: the file was changed while it was being read", hint="start again")
        read_at(descriptor, flat.numpy().data, info.start, path)
    if info.dtype == torch.bool and info.nbytes and int(flat.max()) > 1:
        raise InputError(
            f"{path}: tensor {info.name!r} is boolean but holds the byte {int(flat.max())}",
            hint="the file is damaged; fetch it again",
        )
    return flat.view(info.dtype).view(info.shape)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a small safetensors file, in the order of the file.

    Raises:
        InputError: The file is missing or damaged; see `read_header` and `read_tensor`.
    """
    header = read_header(path)
    return {name: read_tensor(path, info, header) for name, info in header.tensors.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a small safetensors file atomically, sorted by name: the same tensors give the same bytes.

    Returns:
        The sha256 of the file.

    Raises:
        EnvironmentFailure: The disk is full or the folder may not be written.
    """
    names = sorted(tensors)
    entries = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
    with DurableFile(path) as file:
        file.write(encode_header(entries, dict(sorted((metadata or {}).items()))))
        for name in names:
            file.write(bytes_of(tensors[name], name))
    return file.sha256


def encode_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file that holds the given tensors one after the other.

    The bytes are those that the safetensors library writes for the same order.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in entries:
        start, end = end, end + nbytes_of(dtype, shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # The format aligns the data to 8 bytes with spaces, so that it can be mapped.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes_of(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Return the number of bytes of a tensor."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def bytes_of(tensor: Tensor, name: str) -> memoryview:
    """Return the bytes of a tensor in row-major order; a copy is made only where it is not laid out so.

    Raises:
        StructpruneError: The tensor is on the meta device and has no data.
    """
    if tensor.is_meta:
        raise StructpruneError(
            f"tensor {name!r} has no data: it is on the meta device",
            hint="open the model with its weights before writing it",
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def hash_of(tensor: Tensor, name: str) -> str:
    """Return the sha256 of the bytes of a tensor; errors are those of `bytes_of`."""
    return hashlib.sha256(bytes_of(tensor, name)).hexdigest()
