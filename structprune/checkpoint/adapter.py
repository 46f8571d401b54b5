"""Low-rank changes of a pruned model that revive no weight: merged here, kept on disk, read back.

The mask is the base weight itself: a change touches a weight only where the weight is not zero. Training,
merging and loading share this arithmetic, so that none can disagree with another about a single weight.

The folder carries a `peft_type` that PEFT does not know, and tensor names that it would not match. That is on
purpose: PEFT would add the change to every weight, also to the removed ones, and say nothing. Where every
changed tensor belongs to a linear layer and holds no zero, as after a cut of whole units, nothing can be
revived: the folder is then PEFT's own, with the base's hash in the notes of its tensor file.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from structprune.errors import InputError
from structprune.storage.header import read_header
from structprune.storage.strict_json import read_json
from structprune.storage.tensor_file import read_tensors, save_tensors

BROKEN = "the adapter is not whole: copy it again"

PEFT_TYPE = "STRUCTPRUNE_MASKED_LORA"
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
# Two numbers and a rank for each tensor: a few hundred bytes each, so this is room for 100 000 tensors.
CONFIG_LIMIT = 32 * 1024 * 1024


@dataclass(frozen=True)
class LowRankChange:
    """The low-rank change of one tensor, in the layout of its parameter.

    Args:
        left: Shape [..., rows, rank]; fused experts have their own factors, [experts, rows, rank].
        right: Shape [..., rank, columns].
        scaling: What their product is multiplied with.
    """

    left: Tensor
    right: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Return how many directions the change has."""
        return self.right.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor that these factors change."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    def delta(self) -> Tensor:
        """Return the unmasked change, shape [..., rows, columns]."""
        return (self.left @ self.right) * self.scaling


@dataclass(frozen=True)
class Adapter:
    """What `recover` learned, apart from the model that it was learned on.

    Args:
        factors: By module tensor name, such as "model.layers.0.mlp.down_proj.weight".
        base: The folder of the pruned model.
        base_weights: The sha256 of its weights; the adapter fits no other ones.
        masks: Where the masks came from: the folder's plans, or its weights that are not zero.
        plain: Whether PEFT may add it, too: see `can_be_plain`.
    """

    factors: Mapping[str, LowRankChange]
    base: str
    base_weights: str
    masks: Literal["plans", "nonzero"]
    plain: bool = False


class AdapterConfig(BaseModel):
    """`adapter_config.json` of a kept adapter; the first two names are those that PEFT reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    peft_type: Literal["STRUCTPRUNE_MASKED_LORA"] = "STRUCTPRUNE_MASKED_LORA"
    base_model_name_or_path: str
    base_weights: str
    masks: Literal["plans", "nonzero"]
    format: Literal[1] = 1
    scaling: dict[str, float]


class PlainConfig(BaseModel):
    """`adapter_config.json` of a kept adapter that is PEFT's own; all names are those that PEFT reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    base_model_name_or_path: str
    target_modules: list[str]
    r: int = Field(ge=1)
    lora_alpha: int | float
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]]
    alpha_pattern: dict[str, int | float]
    inference_mode: Literal[True] = True

    def scaling(self, module: str) -> float:
        """Return what the change of a module is multiplied with."""
        pattern = re.escape(module)
        return self.alpha_pattern.get(pattern, self.lora_alpha) / self.rank_pattern.get(pattern, self.r)


def can_be_plain(model: nn.Module, zeros: Mapping[str, int]) -> bool:
    """Tell whether plain LoRA says the same of some tensors: weights of linear layers without a zero.

    Args:
        model: Its parameters may be on the meta device.
        zeros: How many weights are zero of each tensor that a change touches, by parameter name.
    """
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in zeros]
    return not any(zeros.values()) and all(isinstance(module, nn.Linear) for module in modules)


def add_masked(weight: Tensor, delta: Tensor) -> Tensor:
    """Return the weight plus its change, and exactly zero wherever the weight is zero.

    Args:
        weight: Any shape, the frozen weight with its zeros.
        delta: The same shape, in float32.
    """
    return torch.where(weight != 0, weight + delta, 0.0)


def round_kept(merged: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the merged weight as it is stored: no weight revived, and none lost either.

    A kept weight that meets exactly zero, or underflows in the stored dtype, becomes the smallest normal
    number instead: no logit could show it, and the count of zeros stays what the plan made it.

    Args:
        merged: What `add_masked` returned.
        weight: The weight before, the same shape; its zeros are the removed weights.
        dtype: The dtype that is stored.
    """
    stored = merged.to(dtype)
    lost = (weight != 0) & (stored == 0)
    if bool(lost.any()):
        stored[lost] = torch.full_like(stored[lost], torch.finfo(dtype).tiny).copysign(weight[lost].to(dtype))
    return stored


def merge(weight: Tensor, factors: LowRankChange) -> Tensor:
    """Return a weight with its change added in float32, rounded to the weight's own dtype.

    Args:
        weight: The pruned weight, in the parameter's layout.
        factors: Its change; the shapes agree.
    """
    source = weight.float()
    delta = LowRankChange(factors.left.to(source), factors.right.to(source), factors.scaling).delta()
    return round_kept(add_masked(source, delta), source, weight.dtype)


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Add an adapter to a pruned model in memory; needs no PEFT and no training.

    Args:
        model: The model that the adapter was trained on, with its masks applied.
        adapter: What to add.

    Raises:
        InputError: The model has no such tensor, or one of another shape; the model is then as it was.
    """
    parameters = dict(model.named_parameters())
    for name, factors in adapter.factors.items():
        if name not in parameters:
            raise InputError(
                f"the adapter changes {name}, which {type(model).__name__} does not have",
                hint=f"the adapter was trained on {adapter.base}",
            )
        if tuple(parameters[name].shape) != factors.shape:
            found, expected = list(factors.shape), list(parameters[name].shape)
            raise InputError(
                f"the adapter's change of {name} has shape {found}, the model's tensor {expected}",
                hint=f"the adapter was trained on {adapter.base}",
            )
    for name, factors in adapter.factors.items():
        parameters[name].copy_(merge(parameters[name], factors))


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter of any kind, ours or PEFT's, and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").exists()


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter into an existing folder, in float32, the tensors first.

    Args:
        folder: Where `adapter_model.safetensors` and `adapter_config.json` go.
        adapter: What to write.
    """
    tensors = {}
    for name, factors in adapter.factors.items():
        left, right = _sides(name, plain=adapter.plain)
        tensors[left] = factors.left.detach().float().cpu().contiguous()
        tensors[right] = factors.right.detach().float().cpu().contiguous()
    notes = {"format": "pt"}
    config: BaseModel
    if adapter.plain:
        config = _plain_config(adapter)
        notes |= {"base_weights": adapter.base_weights, "masks": adapter.masks}
    else:
        config = AdapterConfig(
            base_model_name_or_path=adapter.base,
            base_weights=adapter.base_weights,
            masks=adapter.masks,
            scaling={name: adapter.factors[name].scaling for name in sorted(adapter.factors)},
        )
    save_tensors(folder / TENSOR_FILE, tensors, notes)
    (folder / CONFIG_FILE).write_text(json.dumps(config.model_dump(), indent=2) + "\n", encoding="utf-8")


def _sides(name: str, *, plain: bool) -> tuple[str, str]:
    """Return what the two factors of a tensor are called in the file."""
    module = f"base_model.model.{name.removesuffix('.weight')}"
    sides = (f"{module}.lora_B.weight", f"{module}.lora_A.weight")
    return sides if plain else (f"{name}.left", f"{name}.right")


def _plain_config(adapter: Adapter) -> PlainConfig:
    modules = {name.removesuffix(".weight"): adapter.factors[name] for name in sorted(adapter.factors)}
    # Whoever makes room for a rank beforehand looks at `r`.
    largest = max(modules.values(), key=lambda factors: factors.rank)
    alphas = {re.escape(name): _alpha(one) for name, one in modules.items()}
    alpha = _alpha(largest)
    return PlainConfig(
        base_model_name_or_path=adapter.base,
        target_modules=list(modules),
        r=largest.rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(name): one.rank for name, one in modules.items() if one.rank != largest.rank},
        alpha_pattern={name: one for name, one in alphas.items() if one != alpha},
    )


def _alpha(factors: LowRankChange) -> int | float:
    alpha = factors.scaling * factors.rank
    return int(alpha) if alpha.is_integer() else alpha


def read_adapter(folder: Path) -> Adapter:
    """Read a kept adapter and check that it is whole.

    Args:
        folder: What `save_adapter` wrote into.

    Raises:
        InputError: Another kind of adapter, a damaged file, missing or surplus tensors, or a number that is
            not finite; the message names the file and the tensor.
    """
    path = folder / CONFIG_FILE
    raw = read_json(path, limit_bytes=CONFIG_LIMIT)
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    notes = read_header(folder / TENSOR_FILE).metadata if kind == "LORA" else {}
    plain = notes.keys() >= {"base_weights", "masks"}
    if kind != PEFT_TYPE and not plain:
        raise InputError(
            f"{path}: an adapter of type {kind!r}, expected {PEFT_TYPE!r}",
            hint="merge it into its base model with the library that made it",
        )
    try:
        if plain:
            return _plain_adapter(folder, PlainConfig.model_validate(raw), notes)
        config = AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {key}: {first['msg']}", hint=BROKEN) from error
    factors = _pair(folder / TENSOR_FILE, config.scaling, plain=False)
    return Adapter(factors, config.base_model_name_or_path, config.base_weights, config.masks)


def _plain_adapter(folder: Path, config: PlainConfig, notes: Mapping[str, Any]) -> Adapter:
    scaling = {f"{module}.weight": config.scaling(module) for module in config.target_modules}
    factors = _pair(folder / TENSOR_FILE, scaling, plain=True)
    masks: Literal["plans", "nonzero"] = "plans" if notes["masks"] == "plans" else "nonzero"
    return Adapter(factors, config.base_model_name_or_path, notes["base_weights"], masks, plain=True)


def _pair(path: Path, scaling: Mapping[str, float], *, plain: bool) -> dict[str, LowRankChange]:
    """Read the two factors of every tensor that has a scaling, and nothing besides them."""
    tensors = read_tensors(path)
    wanted = {side for name in scaling for side in _sides(name, plain=plain)}
    for name in sorted(wanted ^ tensors.keys()):
        problem = "missing" if name in wanted else f"not announced in {CONFIG_FILE}"
        raise InputError(f"{path}: tensor {name} is {problem}", hint=BROKEN)
    pairs = {}
    for name, factor in scaling.items():
        left, right = (tensors[side] for side in _sides(name, plain=plain))
        if left.ndim < 2 or left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-2]:
            raise InputError(
                f"{path}: {name}: factors {list(left.shape)} and {list(right.shape)} do not multiply",
                hint=BROKEN,
            )
        if not (math.isfinite(factor) and bool(left.isfinite().all()) and bool(right.isfinite().all())):
            raise InputError(f"{path}: {name} holds numbers that are not finite", hint=BROKEN)
        pairs[name] = LowRankChange(left, right, factor)
    return pairs
