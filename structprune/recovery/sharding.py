"""A model of which every process holds a part: torch's `fully_shard` on each block, filled from the files.

A block is gathered before it runs and let go after it, forward and backward, and its gradients are averaged
on the way. Masks are divided with the weights: what is removed is a zero of the weight itself.

Source: FSDP, Zhao et al. 2023, https://arxiv.org/abs/2304.11277
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from structprune.models.streamed import StreamedModel
from structprune.plan.plan import Plan
from structprune.ranks import Ranks
from structprune.recovery.masks import mask_of, remove, zeros


class Shards:
    """The float32 weights of a model, in parts.

    Until `divide` has filled them they take no memory, so that layers can be put around them first.

    Args:
        model: Streamed, no weight of it in memory; it is used up.

    Attributes:
        module: The model's modules.
        zeros: How many weights of each trained tensor are zero, by parameter name.
        dtypes: What each trained tensor is stored in, by parameter name.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self.module: PreTrainedModel = model.skeleton
        self.zeros: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        nothing = torch.zeros((), device=model.device)
        stand_ins: dict[Tensor, nn.Parameter] = {}
        for module in self.module.modules():
            for name, parameter in module.named_parameters(recurse=False):
                blank = nothing.expand(parameter.shape)
                stand_ins.setdefault(parameter, nn.Parameter(blank, requires_grad=False))
                setattr(module, name, stand_ins[parameter])
            for _, buffer in module.named_buffers(recurse=False):
                buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data
        # By every name; what is filled leaves it, so that the whole of it can go.
        self._hollow: dict[str, Tensor] = dict(self.module.state_dict(keep_vars=True))

    def divide(self, trained: Collection[str] = (), plans: Sequence[Plan] = ()) -> None:
        """Read block after block and keep a part of each; no more than one is ever whole.

        Args:
            trained: Parameters that are masked.
            plans: What was decided on them.

        Raises:
            InputError: A tensor cannot be read.
        """
        mesh = init_device_mesh(self._model.device.type, (Ranks.here().count,))
        for prefix in self._model.blocks:
            self._fill([name for name in self._hollow if name.startswith(f"{prefix}.")], trained, plans)
            fully_shard(self.module.get_submodule(prefix), mesh=mesh)
        self._fill(list(self._hollow), trained, plans)
        fully_shard(self.module, mesh=mesh)

    @torch.no_grad()
    def _fill(self, wanted: Collection[str], trained: Collection[str], plans: Sequence[Plan]) -> None:
        names = self._model.names
        for name, stored in names.load(wanted, self._model.reader.read):
            value = stored.to(self._model.dtype_of(name, stored))
            if name in trained:
                remove(name, value, mask_of(name, value, names, plans))
                self.zeros[name], self.dtypes[name] = zeros(value), value.dtype
            if value.is_floating_point():
                value = value.float()
            # Into the very object that is there: layers may have been put around it since.
            self._hollow[name].data = value.to(self._model.device).contiguous()
        for name in wanted:
            del self._hollow[name]


def whole(value: Tensor) -> Tensor:
    """Return a tensor in one piece; every process of a divided one comes here, and has it afterwards."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be divided; nothing travels.

    Args:
        target: Changed in place.
        value: The same shape; all processes have the same.
    """
    if isinstance(target, DTensor):
        local = value.to(target.device)
        value = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
