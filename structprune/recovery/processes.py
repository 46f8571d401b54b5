"""The processes that train one model together, when a launcher such as `accelerate launch` started several.

Every process holds the whole model and takes the same steps; they share a step's windows and the mean of the
gradients, nothing else. The sum is our own, over all gradients in one fixed order: PyTorch's wrapper sorts
them anew after its first step, and a run that resumes would add them up in another order than one that never
stopped.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Processes:
    """All processes of this run, seen from one of them; a run that nobody launched is one process.

    Args:
        device: "auto" for the accelerator there is, or "cpu".

    Attributes:
        device: Where this process computes.
        count: How many there are.
        number: Which one this is, from 0.
        writes: Whether it is the one that writes.
    """

    def __init__(self, device: str = "auto") -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=device == "cpu")
        self.device: Any = self._state.device  # a torch.device, which transformers' types do not take
        self.count = int(self._state.num_processes)
        self.number = int(self._state.process_index)
        self.writes = bool(self._state.is_main_process)

    def wait(self) -> None:
        """Return once every process has come here."""
        self._state.wait_for_everyone()

    def gather(self, values: Tensor) -> Tensor:
        """Return what all processes give, one after the other; of one process what it gave.

        Args:
            values: Shape [values], the same in all processes.
        """
        from accelerate.utils import gather

        gathered: Tensor = gather(values.to(self.device))
        return gathered

    def average(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each gradient by its mean over all processes."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        # A matrix that no token reached here may have a gradient elsewhere, and all must send as much.
        found = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        means = reduce(torch.cat([gradient.flatten() for gradient in found]), "mean")
        sizes = [one.numel() for one in parameters]
        for one, mean in zip(parameters, means.split(sizes), strict=True):
            one.grad = mean.view_as(one)
