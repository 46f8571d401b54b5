"""One pass over the weights in the files: a hash independent of sharding, zeros, constants, NaN, infinity."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.errors import InputError, counted
from structprune.ranks import Ranks
from structprune.storage.header import DTYPE_NAMES, Header, TensorInfo, stamp_of
from structprune.storage.safe_open import CHUNK_BYTES, open_regular, read_at
from structprune.storage.tensor_file import Entry

logger = logging.getLogger(__name__)

# Integers of a float's width: their zero is the float +0.0, their smallest value is -0.0.
_SAME_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorScan:
    """What one pass over a tensor's bytes shows.

    Attributes:
        sha256: Hash of the bytes.
        zeros: Number of elements equal to zero, minus zero included.
        constant: All elements of a floating-point tensor with two or more dimensions are equal.
        nans: Number of elements that are not a number.
        infinities: Number of infinite elements, of either sign.
    """

    sha256: str
    zeros: int
    constant: bool
    nans: int
    infinities: int


@dataclass(frozen=True)
class Scan:
    """What one pass over all weights shows.

    Attributes:
        weights: Hash over name, dtype, shape and bytes of every tensor; the same for every sharding.
        tensors: Name -> what the pass showed of it, sorted by name.
    """

    weights: str
    tensors: dict[str, TensorScan]

    @property
    def hashes(self) -> dict[str, str]:
        """Return the hash of the bytes of each tensor."""
        return {name: found.sha256 for name, found in self.tensors.items()}

    @property
    def zeros(self) -> dict[str, int]:
        """Return the number of zeros per tensor."""
        return {name: found.zeros for name, found in self.tensors.items()}

    @property
    def constant(self) -> tuple[str, ...]:
        """Return the matrices whose elements are all equal (fresh norms and biases do not count)."""
        return tuple(name for name, found in self.tensors.items() if found.constant)


def scan_files(
    folder: Path,
    headers: Mapping[str, Header],
    root: Path | None,
    ignored: Callable[[str], bool],
    ranks: Ranks = Ranks(),
) -> Scan:
    """Read every tensor once, in the order of the files, through one small buffer.

    Args:
        folder: The model folder.
        headers: File -> its header.
        root: See `safe_open.check_link`.
        ignored: Tells which tensors the model does not use; they may hold infinity (old attention masks do).
        ranks: Processes that all scan now; those with the very same files each read some tensors of them.

    Raises:
        InputError: A tensor holds NaN or infinity (the message counts them), or a file changed meanwhile.
    """
    infos = {name: info for header in headers.values() for name, info in header.tensors.items()}
    # What another process reads from files of its own says nothing of these.
    here = {file: list(header.stamp) for file, header in headers.items()}
    peers = [number for number, (there, _) in enumerate(ranks.tell_each(here)) if there == here]
    costs = [info.end - info.start for info in infos.values()]
    shares = Ranks(peers.index(ranks.number), len(peers)).divide(costs)
    mine = {name for name, share in zip(infos, shares, strict=True) if peers[share] == ranks.number}

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        # One buffer of one chunk, reused: the bytes are still in the core's cache when they are hashed.
        buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        scanned: dict[str, Any] = {}
        for file, header in headers.items():
            path = folder / file
            with open_regular(path, root) as descriptor:
                if stamp_of(descriptor) != header.stamp:
                    raise InputError(
                        f"{path}: the file was changed while it was being read", hint="start again"
                    )
                for name in filter(mine.__contains__, header.tensors):
                    one = _scan_tensor(descriptor, path, header.tensors[name], buffer)
                    if not ignored(name):
                        _refuse_not_finite(one, path, name)
                    scanned[name] = astuple(one)
        return scanned, {}

    told = ranks.share(read)
    shared = [pair for number in peers for pair in told[number][0].items()]
    found = {name: TensorScan(*values) for name, values in sorted(shared)}
    hashes = {(name, infos[name].dtype, infos[name].shape): one.sha256 for name, one in found.items()}
    scan = Scan(combine(hashes), found)
    if scan.constant:
        names = ", ".join(scan.constant[:5])
        logger.warning("%s: %s of one value only: %s", folder, counted(len(scan.constant), "matrix"), names)
    return scan


def combine(hashes: Mapping[Entry, str]) -> str:
    """Return the hash of a whole model from the hashes of its tensors' bytes."""
    whole = hashlib.sha256()
    for (name, dtype, shape), digest in sorted(hashes.items(), key=lambda one: one[0][0]):
        # Names hold no NUL (the header is checked), so that no two models give the same text.
        whole.update(f"{name}\0{DTYPE_NAMES[dtype]}\0{list(shape)}\0{digest}\n".encode())
    return whole.hexdigest()


def _scan_tensor(descriptor: int, path: Path, info: TensorInfo, buffer: Tensor) -> TensorScan:
    digest = hashlib.sha256()
    zeros = nans = infinities = 0
    low, high = float("inf"), float("-inf")
    for start in range(info.start, info.end, CHUNK_BYTES):
        chunk = buffer[: min(CHUNK_BYTES, info.end - start)]
        raw = chunk.numpy().data
        read_at(descriptor, raw, start, path)
        digest.update(raw)
        values = chunk.view(info.dtype)
        zeros += _count_zeros(values)
        if not info.dtype.is_floating_point:
            continue
        # Both ends are NaN where one element is: one quick pass tells NaN, infinity and constancy.
        smallest, largest = (float(end) for end in torch.aminmax(values))
        if not (smallest > float("-inf") and largest < float("inf")):
            nans += int(values.isnan().sum())
            infinities += int(values.isinf().sum())
        low, high = min(low, smallest), max(high, largest)
    constant = low == high and len(info.shape) > 1
    return TensorScan(digest.hexdigest(), zeros, constant, nans, infinities)


def _refuse_not_finite(found: TensorScan, path: Path, name: str) -> None:
    if found.nans or found.infinities:
        raise InputError(
            f"{path}: tensor {name!r} holds {found.nans} NaN and {found.infinities} infinite values",
            hint="the model is damaged: fetch it again; --allow-nonfinite accepts it as it is",
        )


def _count_zeros(values: Tensor) -> int:
    width = _SAME_WIDTH.get(values.dtype.itemsize)
    if not values.dtype.is_floating_point or width is None:
        return values.numel() - int(torch.count_nonzero(values))
    # NumPy counts integers several times faster than PyTorch counts half-precision floats.
    integers = values.view(width).numpy()
    minus_zeros = np.count_nonzero(integers == np.iinfo(integers.dtype).min)
    return int(integers.size - np.count_nonzero(integers) + minus_zeros)
