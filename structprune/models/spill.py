"""A list of tensors that lives in a folder, for activations of many batches of which one is needed at a time.

Plain writes and positional reads, no memory mapping: mapped pages count as memory of the process.
"""

from pathlib import Path

import torch
from torch import Tensor

from structprune.storage.durable import blame
from structprune.storage.safe_open import open_regular, read_at
from structprune.storage.tensor_file import bytes_of, nbytes_of


class Spilled:
    """Tensors in the files of a folder, one each; whoever reads one gets a fresh copy on its old device.

    Args:
        folder: Created here, removed by whoever owns its parent. It holds as many bytes as the tensors.

    Raises:
        EnvironmentFailure: The folder cannot be created, or its disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: list[tuple[torch.dtype, torch.Size, torch.device]] = []
        with blame(folder):
            folder.mkdir(parents=True)

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, tensor: Tensor) -> None:
        """Write a tensor behind the last one."""
        self._write(len(self._kept), tensor)
        self._kept.append((tensor.dtype, tensor.shape, tensor.device))

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        """Write a tensor in the place of another."""
        self._write(index, tensor)
        self._kept[index] = (tensor.dtype, tensor.shape, tensor.device)

    def __getitem__(self, index: int) -> Tensor:
        """Read a tensor.

        Raises:
            InputError: Its file was removed or cut.
            EnvironmentFailure: The disk reports an error.
        """
        dtype, shape, device = self._kept[index]
        flat = torch.empty(nbytes_of(dtype, shape), dtype=torch.uint8)
        path = self._path(index)
        with open_regular(path) as descriptor:
            read_at(descriptor, flat.numpy().data, 0, path)
        return flat.view(dtype).view(shape).to(device)

    def remove(self) -> None:
        """Give the disk space back; nothing can be read afterwards."""
        with blame(self._folder):
            for index in range(len(self._kept)):
                self._path(index).unlink()
            self._folder.rmdir()
        self._kept.clear()

    def _write(self, index: int, tensor: Tensor) -> None:
        path = self._path(index)
        # Not flushed to the disk: after a power cut there is nobody left to read it.
        with blame(path), path.open("wb") as file:
            file.write(bytes_of(tensor, path.name))

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.bin"
