"""Stand-ins for what no test can have: each is called in a child, before the command, and dies with it."""

import errno
import os
import time
from typing import Any

import torch

from structprune.storage.writer import ShardWriter


def tensor_without_data() -> None:
    """Every tensor that is to be written is on the meta device."""
    real = ShardWriter.write

    def write(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        real(self, name, tensor.to("meta"))

    ShardWriter.write = write  # type: ignore[method-assign]  # dies with the child


def read_only_disk() -> None:
    """Nobody may write: root, as whom tests often run, always may."""
    os.access = lambda path, mode, **_: not mode & os.W_OK  # type: ignore[assignment]  # the same


def full_quota() -> None:
    """The user's quota is used up by the first weights."""
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if len(data) > 1000:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(descriptor, data)

    os.write = write


def cuda_out_of_memory() -> None:
    """The first matrix product meets a full accelerator."""
    raise_in_forward(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def no_memory() -> None:
    """The first matrix product finds no memory."""
    raise_in_forward(MemoryError())


def raise_in_forward(error: BaseException) -> None:
    def forward(*_: object, **__: object) -> None:
        raise error

    torch.nn.functional.linear = forward  # type: ignore[assignment]  # dies with the child
    torch.nn.Linear.forward = forward  # type: ignore[assignment]  # the same


def clock_that_jumps() -> None:
    """Every look at the clock finds it an hour earlier or a day later than before."""
    looks = [0]
    real = time.time

    def jumping() -> float:
        looks[0] += 1
        return real() + (-3600 if looks[0] % 2 else 86_400) * looks[0]

    time.time = jumping


def run_that_lasts() -> None:
    """A run that has its lock and its folder, and then takes a while."""
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.02)
        real(descriptor)

    os.fsync = slow
