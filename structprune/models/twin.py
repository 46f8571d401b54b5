"""A model's modules and configuration without its weights."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules of a model with every parameter and buffer on the meta device; no weight is copied."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    twin: PreTrainedModel = copy.deepcopy(model, memo)
    return twin
