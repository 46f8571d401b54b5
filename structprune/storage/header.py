"""The header of a safetensors file, read strictly: names, dtypes, shapes and byte ranges, checked before use.

Source: https://github.com/huggingface/safetensors (the format). Stricter than its reader in three ways:
a duplicate name is refused (there the last one wins), and so are headers over 32 MB and unknown fields.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from structprune.errors import InputError
from structprune.storage.safe_open import open_regular, read_at
from structprune.storage.strict_json import parse_json

DAMAGED = "the header is damaged; fetch the file again"
CUT_OFF = "the download was interrupted; fetch it again"

# A tensor takes about 100 bytes: room for 300 thousand in one file, and no header can exhaust the memory.
MAX_HEADER_BYTES = 32_000_000
MAX_NAMES = 1_000_000
# PyTorch's own limit on the number of dimensions of a tensor it can loop over.
MAX_DIMENSIONS = 64

DTYPES = MappingProxyType(
    {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
        "C64": torch.complex64,
        "BOOL": torch.bool,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "U8": torch.uint8,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
    }
)
"""Names of the format -> dtypes of PyTorch."""

DTYPE_NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
"""Dtypes of PyTorch -> names of the format."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: where its bytes are and what they mean.

    Attributes:
        file: Name of the file inside its folder.
        start: First byte of the tensor, counted from the start of the file.
        end: One past its last byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Return the number of bytes that the tensor takes in the file and in memory."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        tensors: Name -> place and meaning, in the order of their bytes.
        metadata: The file's own notes (`__metadata__`), in their order; empty where there are none.
        stamp: Size, modification time and inode, to notice a file that changes between two reads.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    stamp: tuple[int, int, int]


def read_header(path: Path, root: Path | None = None) -> Header:
    """Read and check the header of a safetensors file; the tensors themselves are not read.

    Raises:
        InputError: The file is cut off, too long, not safetensors, or its header contradicts itself.
    """
    with open_regular(path, root) as descriptor:
        stamp = stamp_of(descriptor)
        size = stamp[0]
        if size == 0:
            raise InputError(f"{path}: the file is empty", hint=CUT_OFF)
        if size < 8:
            raise InputError(
                f"{path}: {size} bytes, a safetensors file has at least 8", hint="fetch it again"
            )
        prefix = bytearray(8)
        read_at(descriptor, memoryview(prefix), 0, path)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise InputError(
                f"{path}: header of {length} bytes, at most {MAX_HEADER_BYTES} are read",
                hint="not a safetensors file, or damaged; fetch it again",
            )
        if 8 + length > size:
            raise InputError(
                f"{path}: {size} bytes, but the header alone needs {8 + length}",
                hint=CUT_OFF,
            )
        raw = bytearray(length)
        read_at(descriptor, memoryview(raw), 8, path)
    if raw[:1] != b"{":
        raise InputError(
            f"{path}: the header does not start with '{{'", hint="not a safetensors file, or damaged"
        )
    entries = parse_json(bytes(raw), f"{path} (header)")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > MAX_NAMES:
        raise InputError(f"{path}: {len(entries)} tensors, at most {MAX_NAMES} are read", hint=DAMAGED)
    tensors = [_tensor(name, entry, path, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_ranges(tensors, path, 8 + length, size)
    return Header({info.name: info for info in tensors}, metadata, stamp)


def stamp_of(descriptor: int) -> tuple[int, int, int]:
    """Return size, modification time and inode of an open file."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(
            f"{path}: __metadata__ must be an object of texts, found {str(value)[:80]!r}", hint=DAMAGED
        )
    return value


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    if not name or not name.isprintable():
        raise InputError(
            f"{path}: the tensor name {name!r} is empty or holds unprintable characters", hint=DAMAGED
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{path}: tensor {name!r} must have exactly dtype, shape and data_offsets", hint=DAMAGED
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise InputError(
            f"{path}: tensor {name!r} has the unknown dtype {str(entry['dtype'])[:40]!r}",
            hint="supported: " + ", ".join(DTYPES),
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise InputError(
            f"{path}: tensor {name!r} has the shape {str(shape)[:80]}, which is not a list of sizes",
            hint=DAMAGED,
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(
            f"{path}: tensor {name!r} has the data_offsets {str(offsets)[:80]}, expected [start, end]",
            hint=DAMAGED,
        )
    # Sizes besides a zero must fit as well: PyTorch multiplies them for the strides.
    if prod(size for size in shape if size) * dtype.itemsize >= 2**63:
        raise InputError(
            f"{path}: tensor {name!r} of shape {str(shape)[:80]} is larger than any memory", hint=DAMAGED
        )
    needed, given = prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise InputError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {entry['dtype']} takes {needed} bytes, "
            f"but its data_offsets {offsets} hold {given}",
            hint=DAMAGED,
        )
    return TensorInfo(name, dtype, tuple(shape), path.name, data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(value: Any) -> bool:
    # `type`, not `isinstance`: JSON's true and false are integers to Python.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_ranges(tensors: list[TensorInfo], path: Path, data_start: int, size: int) -> None:
    end = data_start
    for info in tensors:
        if info.start != end:
            problem = "overlaps the one before it" if info.start < end else "leaves a hole before it"
            raise InputError(
                f"{path}: tensor {info.name!r} {problem}: starts at byte {info.start}, expected {end}",
                hint=DAMAGED,
            )
        end = info.end
    if size < end:
        raise InputError(
            f"{path}: {size} bytes, expected {end}: the file is cut off",
            hint=CUT_OFF,
        )
    if size > end:
        last = f" after tensor {tensors[-1].name!r}" if tensors else ""
        raise InputError(
            f"{path}: {size} bytes, expected {end}: bytes without a meaning{last}",
            hint="the file is damaged; fetch it again",
        )
