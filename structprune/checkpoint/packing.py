"""Sparse matrices without their zeros: 2:4 as values and indices, anything else as values and a bitmask.

Zero is a weight whose bits are all zero, +0.0; -0.0 is a value. So `unpack` gives back every bit.

2:4: of every four consecutive inputs of an output two are written, in their order, with their places. Where
fewer than two are not zero, the lowest other places of the group fill up and their value is an explicit zero.
One group's places take four bits, the first place in the low two: the metadata of NVIDIA's sparse kernels. A
byte holds two groups, the earlier one in its low half. In 16 bits that is 9/16 of the dense bytes.

Bitmask: the values that are not zero in stored order, and a bit for every weight, little end first.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from structprune.errors import InputError
from structprune.storage.header import DTYPES
from structprune.storage.tensor_file import Entry, encode_header, nbytes_of

Scheme = Literal["2:4", "bitmask"]
Bytes = NDArray[np.uint8]
FileName = Annotated[str, Field(pattern=r"^[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*\.safetensors$", max_length=255)]

_CODES = {"2:4": "indices", "bitmask": "bitmask"}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Form(BaseModel):
    """How one tensor is written: as it is, or as `<name>.values` beside `<name>.indices` or `<name>.bitmask`.

    Attributes:
        name: Its name in the dense files.
        dtype: Its dtype there, such as "BF16".
        shape: Its shape there.
        scheme: How it is packed; None for as it is.
        transposed: It is stored as [in, out].
        kept: Values that are written; of a bitmask only, a pattern has half of all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: str
    shape: tuple[Annotated[int, Field(strict=True, ge=0)], ...]
    scheme: Scheme | None = None
    transposed: Annotated[bool, Field(strict=True)] = False
    kept: Annotated[int, Field(strict=True, ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name}: unknown dtype {self.dtype[:40]!r}")
        if self.scheme == "2:4" and not divides(self.shape, self.transposed):
            raise ValueError(f"{self.name}: shape {list(self.shape)} has no groups of four inputs in pairs")
        if self.kept > math.prod(self.shape):
            raise ValueError(f"{self.name}: {self.kept} values in a tensor of shape {list(self.shape)}")
        return self

    @property
    def dense(self) -> Entry:
        """Return its name, dtype and shape in the dense file."""
        return self.name, DTYPES[self.dtype], self.shape

    @property
    def dense_nbytes(self) -> int:
        """Return the bytes that it takes in the dense file."""
        return nbytes_of(*self.dense[1:])

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes as written."""
        return sum(nbytes_of(dtype, shape) for _, dtype, shape in self.entries)

    @property
    def entries(self) -> list[Entry]:
        """Return name, dtype and shape of what is written for it, in order."""
        dtype = DTYPES[self.dtype]
        if self.scheme is None:
            return [(self.name, dtype, self.shape)]
        if self.scheme == "2:4":
            rows, width = matrix_shape(self.shape, self.transposed)
            shapes: list[tuple[int, ...]] = [(rows, width // 2), (rows, width // 8)]
        else:
            shapes = [(self.kept,), (-(-math.prod(self.shape) // 8),)]
        return [
            (f"{self.name}.values", dtype, shapes[0]),
            (f"{self.name}.{_CODES[self.scheme]}", torch.uint8, shapes[1]),
        ]

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return what is written for the tensor, by name as in `entries`.

        Raises:
            ValueError: It is not the tensor that was surveyed: the pattern or the count does not hold.
        """
        if self.scheme is None:
            return {self.name: tensor}
        if self.scheme == "2:4":
            bits = _matrix(tensor, self.transposed)
            kept = _COMPLETED[_nonzero(bits)]
            mask, codes = _unpack_bits(kept), _INDICES[kept]
        else:
            bits = _bits(tensor).reshape(-1)
            mask = bits != 0
            codes = np.packbits(mask, bitorder="little")
        parts = (torch.from_numpy(bits[mask]).view(tensor.dtype), torch.from_numpy(codes))
        result: dict[str, Tensor] = {}
        for (name, _, shape), part in zip(self.entries, parts, strict=True):
            if part.numel() != math.prod(shape):
                raise ValueError(f"{self.name}: does not hold {self.scheme} as it did")
            result[name] = part.view(shape)
        return result

    def unpack(self, parts: Mapping[str, Tensor], where: str) -> Tensor:
        """Return the tensor in its dense layout, bit by bit as it was packed.

        Args:
            parts: What `pack` returned, of the dtypes and shapes of `entries`.
            where: Names the file in messages.

        Raises:
            InputError: Indices that are out of order, or another number of bits than of values.
        """
        if self.scheme is None:
            return parts[self.name]
        (named, dtype, _), (coded, _, _) = self.entries
        values, codes = parts[named].view(_BITS[dtype.itemsize]).numpy(), parts[coded].numpy()
        if self.scheme == "2:4":
            kept = _KEPT[codes]
            if not kept.all():
                row = int(np.flatnonzero((kept == 0).any(axis=1))[0])
                raise InputError(
                    f"{where}: tensor {coded!r}: row {row}: the two indices of a group are not in order",
                    hint="the file is damaged; export it again",
                )
            mask = _unpack_bits(kept)
        else:
            mask = _unpack_bits(codes)
            size = math.prod(self.shape)
            if np.count_nonzero(mask) != len(values) or mask[size:].any():
                raise InputError(
                    f"{where}: tensor {coded!r}: {np.count_nonzero(mask)} bits are set for "
                    f"{len(values)} values",
                    hint="the file is damaged; export it again",
                )
            mask = mask[:size]
        dense = np.zeros(mask.shape, values.dtype)
        dense[mask] = values.reshape(-1)
        tensor = torch.from_numpy(dense).view(dtype)
        return (tensor.T.contiguous() if self.transposed and self.scheme == "2:4" else tensor).view(
            self.shape
        )


class PackedFile(BaseModel):
    """One weight file, packed and as it was.

    Attributes:
        packed: Its name in the packed folder.
        dense: Its name in the dense folder.
        metadata: Notes of the dense file (safetensors `__metadata__`).
        sha256: Of the dense file, as `write_dense` writes it.
        tensors: In the order of their bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    packed: FileName
    dense: FileName
    metadata: dict[str, str]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tensors: list[Form]

    @property
    def entries(self) -> list[Entry]:
        """Return name, dtype and shape of the tensors in the dense file."""
        return [form.dense for form in self.tensors]

    @property
    def header(self) -> bytes:
        """Return length and header of the dense file."""
        return encode_header(self.entries, self.metadata)


class Packing(BaseModel):
    """Content of packing.json.

    Attributes:
        format: Version of this layout.
        scheme: How the linears are packed.
        files: The weight files, sorted by their dense names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    scheme: Scheme
    files: list[PackedFile]

    @property
    def forms(self) -> list[Form]:
        """Return the forms of all tensors."""
        return [form for file in self.files for form in file.tensors]


def divides(shape: tuple[int, ...], transposed: bool) -> bool:
    """Tell whether a tensor's inputs are pairs of groups of four, so that every row's indices fill bytes."""
    return len(shape) > 1 and math.prod(shape) > 0 and matrix_shape(shape, transposed)[1] % 8 == 0


def holds(tensor: Tensor, transposed: bool) -> bool:
    """Tell whether at most two of every four consecutive inputs have bits other than +0.0.

    Args:
        tensor: Stored as [..., out, in], or [in, out] where `transposed`; `divides` is true of its shape.
        transposed: See there.
    """
    return bool(_COMPLETED[_nonzero(_matrix(tensor, transposed))].all())


def count(tensor: Tensor) -> int:
    """Return how many elements have bits other than +0.0."""
    return int(np.count_nonzero(_bits(tensor)))


def matrix_shape(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """Return (outputs, inputs) of a stored tensor; experts' outputs stand one expert after another."""
    width = shape[0] if transposed else shape[-1]
    return math.prod(shape) // width if width else 0, width


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's bits as integers: NumPy knows no bfloat16, and an integer tells -0.0 from +0.0."""
    found: NDArray[Any] = tensor.contiguous().view(_BITS[tensor.dtype.itemsize]).numpy()
    return found


def _matrix(tensor: Tensor, transposed: bool) -> NDArray[Any]:
    """Return the bits as [outputs, inputs]."""
    rows = tensor.T if transposed else tensor.reshape(-1, tensor.shape[-1])
    return _bits(rows)


def _nonzero(matrix: NDArray[Any]) -> Bytes:
    """Return which inputs are not zero, eight to a byte, shape [outputs, inputs / 8]."""
    return np.packbits(matrix != 0, axis=1, bitorder="little")


def _unpack_bits(packed: Bytes) -> NDArray[np.bool_]:
    return np.unpackbits(packed, axis=-1, bitorder="little").view(np.bool_)


def _tables() -> tuple[Bytes, Bytes, Bytes]:
    """Return three tables from byte to byte, two groups of four each.

    Returns:
        Which are not zero -> which are written; which are written -> indices; indices -> which are written.
        0 stands for what cannot be.
    """
    completed, indices, kept = (np.zeros(16, np.uint8) for _ in range(3))
    for pair in itertools.combinations(range(4), 2):
        mask, index = 1 << pair[0] | 1 << pair[1], pair[0] | pair[1] << 2
        indices[mask], kept[index] = index, mask
    for nonzero in range(16):
        places = sorted(range(4), key=lambda place: (~nonzero >> place & 1, place))
        if nonzero.bit_count() <= 2:
            completed[nonzero] = 1 << places[0] | 1 << places[1]
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    both = [
        np.where((half[low] > 0) & (half[high] > 0), half[low] | half[high] << 4, 0)
        for half in (completed, indices, kept)
    ]
    return both[0].astype(np.uint8), both[1].astype(np.uint8), both[2].astype(np.uint8)


_COMPLETED, _INDICES, _KEPT = _tables()
