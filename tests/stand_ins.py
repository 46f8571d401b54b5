"""Stand-ins for what no test can have: each is called in a child, before the command, and dies with it."""

import errno
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from structprune.pipeline import decision
from structprune.plan.plan import PlanWriter
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


def at_the_second_block(happens: Callable[[], object]) -> None:
    """Let something happen as soon as a block has been decided and another is about to be noted."""
    real = PlanWriter.write

    def write(self: PlanWriter, *args: Any) -> None:
        if self.finished == 1:
            happens()
        real(self, *args)

    PlanWriter.write = write  # type: ignore[method-assign]  # dies with the child


def killed_at_a_block() -> None:
    """The process is killed."""
    at_the_second_block(lambda: os.kill(os.getpid(), signal.SIGKILL))


def interrupted_at_a_block() -> None:
    """Somebody sends the process what Ctrl-C sends."""
    at_the_second_block(lambda: os.kill(os.getpid(), signal.SIGINT))


def terminated_at_a_block() -> None:
    """Somebody sends the process what a cluster's scheduler sends."""
    at_the_second_block(lambda: os.kill(os.getpid(), signal.SIGTERM))


def no_memory_at_a_block() -> None:
    """The process asks for more memory than any machine has."""
    at_the_second_block(lambda: torch.empty(1 << 60))


def full_disk_at_a_block() -> None:
    """The disk is full from now on."""

    def write(descriptor: int, _: Any) -> int:
        raise OSError(
            errno.ENOSPC, os.strerror(errno.ENOSPC), str(Path(f"/proc/self/fd/{descriptor}").readlink())
        )

    at_the_second_block(lambda: setattr(os, "write", write))


def bug_at_a_block() -> None:
    """Something fails that nobody has thought of."""
    at_the_second_block(lambda: {}["nobody"])


def own_scratch() -> None:
    """Temporary files lie where TMPDIR says, which a fork does not look at again."""
    tempfile.tempdir = os.environ["TMPDIR"]


def another_version() -> None:
    """The process has another torch."""
    real = decision.versions
    decision.versions = lambda: real() | {"torch": "1.0"}  # type: ignore[attr-defined]  # dies with the child


def two_threads() -> None:
    """The process may use two threads."""
    torch.set_num_threads(2)


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
