"""A small world to recover in: tokens that follow from one another, a model that has learned them."""

import copy
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.progress import Progress, silent
from structprune.ranks import Ranks
from structprune.recipe.options import RecoverOptions
from structprune.recovery.masks import nonzero_masks
from structprune.recovery.outcome import Recovery
from structprune.recovery.state import TrainingState
from structprune.recovery.training import train
from tests.tiny import TEXT_IDS, tiny

LENGTH = 24


def walks(count: int, seed: int) -> Tensor:
    """Windows in which every token follows from the one before, shape [count, LENGTH]."""
    successor = torch.randperm(len(TEXT_IDS), generator=torch.Generator().manual_seed(7))
    steps = [torch.randint(len(TEXT_IDS), (count,), generator=torch.Generator().manual_seed(seed))]
    while len(steps) < LENGTH:
        steps.append(successor[steps[-1]])
    return torch.stack(steps, dim=1) + TEXT_IDS.start


def held_out_loss(model: PreTrainedModel) -> float:
    windows = walks(32, seed=10_000)
    with torch.no_grad():
        return float(model(input_ids=windows, labels=windows).loss)


@torch.no_grad()
def prune(model: PreTrainedModel, sparsity: float) -> dict[str, Tensor]:
    """Remove the smallest weights of every row of every linear of the blocks; return the masks."""
    masks = nonzero_masks(model)
    for name in masks:
        weight = model.get_parameter(name)
        lowest = weight.abs().argsort(dim=-1)[..., : int(weight.shape[-1] * sparsity)]
        masks[name] = torch.ones_like(weight, dtype=torch.bool).scatter_(-1, lowest, False)
        weight.mul_(masks[name])
    return masks


def options(**changes: object) -> RecoverOptions:
    usual: dict[str, object] = {
        "data": "demo",
        "steps": 30,
        "rank": 8,
        "learning_rate": 5e-3,
        "check_every": 10,
        "batch_size": 8,
    }
    return RecoverOptions(**usual | changes)


def recover(
    model: PreTrainedModel,
    masks: dict[str, Tensor],
    *,
    teacher: PreTrainedModel | None = None,
    state: TrainingState | None = None,
    progress: Progress = silent,
    **changes: object,
) -> Recovery:
    return train(
        model,
        masks,
        walks(96, seed=20_000),
        options(**changes),
        teacher=teacher,
        ranks=Ranks.here(),
        state=state,
        progress=progress,
    )


@cache
def trained() -> PreTrainedModel:
    """A tiny Llama that has really learned which token follows which; nobody may change it."""
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        windows = walks(16, seed=step)
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def pruned(
    dense: PreTrainedModel, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = copy.deepcopy(dense).to(dtype)
    return model, prune(model, 0.6)


def zero_places(model: PreTrainedModel, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach() == 0 for name in masks}


def assert_untouched(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    expected, _ = pruned(dense)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in expected.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
