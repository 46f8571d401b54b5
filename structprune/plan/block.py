"""One block's decisions on disk: a safetensors file whose digest says what was decided, wherever it is kept.

New values and parts are as large as the weights. In a finished folder they are not kept twice: the block
has the saved tensor's name and hash instead, and the same digest.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.plan.key import WRITTEN, Key, check_key
from structprune.storage.header import read_header
from structprune.storage.tensor_file import read_tensors, save_tensors

# Reads a tensor of the saved model by the name that a plan knows it by; None where it left later.
Read = Callable[[str], Tensor | None]


def canonical(value: object) -> str:
    """Return `value` as JSON with one spelling, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into bits, little end first, shape [ceil(elements / 8)], uint8."""
    flat = mask.detach().cpu().reshape(-1).numpy()
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack`: the first elements of the bits as a bool tensor of `shape`."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).view(shape)


class PlanBlock(Mapping[Key, Tensor]):
    """The decisions about one block, by key: masks packed to bits, other tensors as they are.

    Args:
        packed: Tensors as stored, by key; None when they are to be read from `path`.
        shapes: Shape by key, of the tensor that the key stands for.
        facts: What was measured while deciding.
        hashes: sha256 of what each key stands for, by key.
        path: Where the block lies on disk, or None when it is only in memory.
        referred: Keys whose tensors are those of the saved model.

    Attributes:
        read: Reads the saved model's tensors; None where nobody said where it is.
    """

    def __init__(
        self,
        packed: dict[Key, Tensor] | None,
        shapes: dict[Key, tuple[int, ...]],
        facts: dict[str, Any],
        hashes: dict[Key, str],
        path: Path | None,
        referred: frozenset[Key] = frozenset(),
    ) -> None:
        self._packed = packed
        self.shapes = shapes
        self.facts = facts
        self.hashes = hashes
        self.path = path
        self.referred = referred
        self.read: Read | None = None

    @classmethod
    def make(cls, tensors: Mapping[Key, Tensor], facts: Mapping[str, Any], path: Path | None) -> "PlanBlock":
        """Pack `tensors`; with a `path` write them there and keep none in memory."""
        shapes = {check_key(key): tuple(tensors[key].shape) for key in sorted(tensors, key=str)}
        packed = {
            key: (pack(tensors[key]) if key.edit == "mask" else tensors[key].detach().cpu()) for key in shapes
        }
        hashes = {key: content_hash(key, packed[key], shapes[key]) for key in shapes}
        block = cls(packed, shapes, dict(facts), hashes, None)
        return block if path is None else block.save(path)

    @classmethod
    def load(cls, path: Path) -> "PlanBlock":
        """Read a block file and check what it holds against its hashes."""
        if not path.is_file():
            raise InputError(f"{path}: missing", hint="the plan folder is incomplete; prune again")
        stored, metadata = read_tensors(path), read_header(path).metadata
        try:
            shapes = {Key.parse(key): tuple(shape) for key, shape in json.loads(metadata["shapes"]).items()}
            facts = json.loads(metadata["facts"])
            hashes = {Key.parse(key): digest for key, digest in json.loads(metadata["hashes"]).items()}
            referred = frozenset(map(Key.parse, json.loads(metadata["referred"])))
        except (KeyError, ValueError, AttributeError, TypeError):
            raise InputError(f"{path}: not a block of a plan", hint="prune again") from None
        block = cls(None, shapes, facts, hashes, path, referred)
        here = shapes.keys() - referred
        known = {str(key) for key in here} == stored.keys() and shapes.keys() == hashes.keys()
        if not known or any(content_hash(key, stored[str(key)], shapes[key]) != hashes[key] for key in here):
            raise InputError(
                f"{path}: its content does not match its digest", hint="the file was changed; prune again"
            )
        return block

    @property
    def digest(self) -> str:
        """Return the hash of keys, shapes and bytes, wherever the bytes are kept."""
        return hashlib.sha256(canonical(_by_text(self.hashes)).encode()).hexdigest()

    def save(self, path: Path, referred: frozenset[Key] | None = None) -> "PlanBlock":
        """Write the block to a file and return it as it stands there.

        Args:
            path: The file; replaced in one step when it exists.
            referred: Keys that are left to the saved model; those that are so already unless given.
        """
        left = self.referred if referred is None else self.referred | referred
        whole = self._tensors()
        metadata = {
            "shapes": canonical(_by_text(self.shapes)),
            "facts": canonical(self.facts),
            "hashes": canonical(_by_text(self.hashes)),
            "referred": canonical(sorted(map(str, left))),
        }
        save_tensors(path, {str(key): value for key, value in whole.items() if key not in left}, metadata)
        return PlanBlock(None, self.shapes, self.facts, self.hashes, path, left)

    def refer(self, read: Read) -> None:
        """Rewrite the block's file without the tensors that the saved model holds bit for bit.

        Args:
            read: Reads a tensor of the saved model.
        """
        assert self.path is not None
        same = {
            key
            for key in self.shapes.keys() - self.referred
            if key.edit in WRITTEN and self._is(key, read(key.name))
        }
        if same:
            self.referred = self.save(self.path, frozenset(same)).referred
            self.release()

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the keys."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self.shapes)

    def __contains__(self, key: object) -> bool:
        """Tell whether there is a decision of this key; nothing is read or unpacked."""
        return check_key(key) in self.shapes

    def __getitem__(self, key: Key) -> Tensor:
        """Return the tensor of `key`; a mask as bool in its shape.

        Raises:
            InputError: The tensor is that of a saved model that is not there or has changed.
        """
        if check_key(key) not in self.shapes:
            raise KeyError(key)
        if key in self.referred:
            return self._referred(key)
        tensor = self._tensors()[key]
        return unpack(tensor, self.shapes[key]) if key.edit == "mask" else tensor

    def release(self) -> None:
        """Forget tensors that can be read again."""
        if self.path is not None:
            self._packed = None

    def _tensors(self) -> dict[Key, Tensor]:
        if self._packed is None:
            assert self.path is not None
            self._packed = {Key.parse(key): value for key, value in read_tensors(self.path).items()}
        return self._packed

    def _referred(self, key: Key) -> Tensor:
        if self.read is None:
            raise InputError(
                f"{self.path}: {key.name} is kept in the weights of the pruned model only",
                hint="give the whole folder that `structprune prune` wrote",
            )
        value = self.read(key.name)
        if value is None or not self._is(key, value):
            raise InputError(
                f"{key.name}: the weights were changed after the plan was made",
                hint="give the folder that `structprune prune` wrote, before any training",
            )
        return value

    def _is(self, key: Key, value: Tensor | None) -> bool:
        """Tell whether a tensor of the saved model is what was decided, bit for bit."""
        return value is not None and content_hash(key, value, self.shapes[key]) == self.hashes[key]


def content_hash(key: Key, packed: Tensor, shape: tuple[int, ...]) -> str:
    """Return the sha256 of a decision: its key, shape, dtype and bytes (of a mask, the packed ones)."""
    tensor = packed.contiguous()
    state = hashlib.sha256(canonical([str(key), list(shape), str(tensor.dtype)]).encode())
    state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _by_text(values: Mapping[Key, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}
