"""What a model costs, counted and never assumed: parameters, zeros, FLOPs per token, KV bytes, bytes on disk.

FLOPs and KV bytes come from one forward of a twin of the model on the meta device, where nothing is computed
or allocated: FLOPs are two per multiply-add of every matrix product that runs, KV bytes the size of the cache
that fills. So they hold for any architecture, and for a model whose shapes were changed. What is not counted
multiplies no matrices: embedding look-ups, norms, softmax.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from structprune.models.arch import HasSkeleton, block_prefixes
from structprune.models.identity import names_of, skeleton, stored_layout
from structprune.models.shapes import cache_of
from structprune.models.streamed import Model
from structprune.models.tensor_edit import Layout
from structprune.models.twin import twin_of
from structprune.storage.reference import read_reference
from structprune.storage.tensor_file import encode_header, nbytes_of

logger = logging.getLogger(__name__)

# Longer contexts are rarer than they are possible: attention would then dominate the figure.
DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Args:
        parameters: All parameters, tied ones once, zeros included.
        zeros: Zeros in the prunable set.
        prunable: Weights in the prunable set.
        flops_per_token: Two per multiply-add, mean over a forward of `length` tokens without padding; None
            when the model cannot run on the meta device.
        kv_bytes_per_token: Bytes of the key-value cache after `length` tokens, divided by them; or None.
        bytes_on_disk: Bytes of the weight files.
        length: Tokens of the forward that was counted.
    """

    parameters: int
    zeros: int
    prunable: int
    flops_per_token: float | None
    kv_bytes_per_token: float | None
    bytes_on_disk: int
    length: int

    @property
    def sparsity(self) -> float:
        """Return zeros / prunable set; 0 when nothing is prunable."""
        return self.zeros / self.prunable if self.prunable else 0.0


@dataclass(frozen=True)
class StoredBytes:
    """Where the bytes of a model's tensors are.

    Attributes:
        blocks: Of each decoder block.
        body: Outside the blocks, without the head: embeddings, norms, a vision tower.
        head: Of the head; 0 where it is tied to the embeddings.
    """

    blocks: tuple[int, ...]
    body: int
    head: int

    @property
    def walk(self) -> int:
        """Return what one walk over the blocks reads."""
        return self.body + sum(self.blocks)

    @property
    def all(self) -> int:
        """Return what all tensors take."""
        return self.walk + self.head


def count(
    model: PreTrainedModel | HasSkeleton,
    *,
    zeros: int = 0,
    prunable: int = 0,
    bytes_on_disk: int = 0,
    length: int | None = None,
) -> Cost:
    """Count what a model costs, without touching its weights.

    The attention counted is the full length x length product that runs without a fused kernel; a kernel that
    skips the masked half does less. Of a mixture of experts, each token's chosen experts are counted. A block
    with a sliding window keeps no more than its window, so its cache per token falls with the length.

    Args:
        model: Resident, or streamed: its parameters may lie on the meta device.
        zeros: Zeros in the prunable set, as the strict reader counted them.
        prunable: Weights in the prunable set.
        bytes_on_disk: As `weight_bytes` gives them.
        length: Tokens; by default min(2048, what the model was made for).
    """
    length = length or default_length(model)
    flops, cache = _per_token(_module(model), length)
    return Cost(
        parameters=parameters_of(_module(model)),
        zeros=zeros,
        prunable=prunable,
        flops_per_token=flops,
        kv_bytes_per_token=cache,
        bytes_on_disk=bytes_on_disk,
        length=length,
    )


def stored_bytes(model: Model) -> StoredBytes:
    """Return where the bytes of a model's tensors are, in the dtypes of its files.

    Args:
        model: In memory, streamed, or a twin without weights.
    """
    names, root = names_of(model), skeleton(model)
    sizes = {
        name: nbytes_of(dtype, shape)
        for entries in stored_layout(model).values()
        for name, dtype, shape in entries
    }
    prefixes = block_prefixes(root)
    places: dict[str, int] = dict.fromkeys([*prefixes, "body", "head"], 0)
    inside = f"{root.base_model_prefix}."
    seen: set[str] = set()
    for name, parts in names.stored_of.items():
        outside = "body" if name.startswith(inside) else "head"
        place = next((one for one in prefixes if name.startswith(f"{one}.")), outside)
        places[place] += sum(sizes[part] for part in parts if part not in seen)
        seen.update(parts)
    return StoredBytes(tuple(places[one] for one in prefixes), places["body"], places["head"])


def body_flops(model: Model, length: int) -> float | None:
    """Return the FLOPs per token of all but the head, at `length` tokens a sequence; None as for `count`."""
    return _per_token(skeleton(model), length, whole=False)[0]


def default_length(model: PreTrainedModel | HasSkeleton) -> int:
    """Return min(2048, the most positions the text model was made for)."""
    positions = getattr(_module(model).config.get_text_config(), "max_position_embeddings", None)
    return min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of the weight files of a model folder, or of those that it refers to."""
    reference = read_reference(folder)
    return reference.nbytes if reference else sum(file.stat().st_size for file in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder, or those that it refers to."""
    reference = read_reference(folder)
    return (
        [reference.base / name for name in reference.files] if reference else [*folder.glob("*.safetensors")]
    )


def parameters_of(model: PreTrainedModel) -> int:
    """Return how many parameters a model has, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def file_bytes(layout: Layout, metadata: Mapping[str, Mapping[str, str]]) -> int:
    """Return the bytes of the weight files that would hold these tensors.

    Args:
        layout: File -> name, dtype and shape of its tensors.
        metadata: File -> its own notes.
    """
    return sum(
        len(encode_header(entries, metadata.get(file) or {"format": "pt"}))
        + sum(nbytes_of(dtype, shape) for _, dtype, shape in entries)
        for file, entries in layout.items()
    )


def cache_bytes(cache: object) -> int:
    """Return the bytes of the keys and values that a cache of transformers holds."""
    layers = getattr(cache, "layers", [])
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _module(model: PreTrainedModel | HasSkeleton) -> PreTrainedModel:
    return model if isinstance(model, PreTrainedModel) else model.skeleton


def _per_token(
    model: PreTrainedModel, length: int, *, whole: bool = True
) -> tuple[float | None, float | None]:
    """Return FLOPs and cache bytes per token, or None and a warning where they cannot be counted."""
    try:
        flops, cache = _forward(model, length, whole=whole)
    except (RuntimeError, ValueError) as error:
        # A forward that looks into values cannot run there; a class may refuse the plain attention.
        reason = str(error).partition("\n")[0]
        logger.warning("FLOPs and KV bytes of %s cannot be counted: %s", type(model).__name__, reason)
        return None, None
    return flops / length, cache / length


def _forward(model: PreTrainedModel, length: int, *, whole: bool) -> tuple[int, int]:
    """Run `length` text tokens through a twin on the meta device; return FLOPs and bytes of the cache.

    Args:
        model: Its weights are not looked at.
        length: Tokens.
        whole: With the head.
    """
    twin = twin_of(model)
    # The meta device runs these and the counter knows them: fused attention is not counted everywhere, and
    # grouped expert products refuse float32 there.
    twin.set_attn_implementation("eager")
    twin.set_experts_implementation("batched_mm")
    twin.train(False)
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    # The mask keeps transformers from looking into the ids for padding and packed sequences.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = (twin if whole else twin.base_model)(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True
        )
    return counter.get_total_flops(), cache_bytes(cache_of(output))
