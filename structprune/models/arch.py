"""Where the blocks, projections, experts and routers of a model family are: a table, one row per family.

A family that is not in the table still works for the weight pruners: every linear inside the repeated block
list is found, and a warning says so. Deliberate exclusions, for every family: a MoE router, and the gate of a
shared expert (one output row, a router in all but name); both steer tokens and hold next to no weights.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from structprune.errors import InputError

logger = logging.getLogger(__name__)


class HasSkeleton(Protocol):
    """A model whose module tree is kept beside it, as a streamed model does."""

    skeleton: PreTrainedModel


@dataclass(frozen=True)
class Arch:
    """Names of the parts of one family; all but `blocks` are paths inside one block, "" where it has none.

    Attributes:
        model_types: Values of `model_type` in config.json that this row describes.
        blocks: Path of the block list, seen from the causal language model (or conditional generation) class.
        attention: The attention module.
        mlp: The feed-forward or mixture-of-experts module; "" where its linears sit directly in the block.
        q: Query projection; with `k` and `v` empty where `qkv` is fused.
        k: Key projection.
        v: Value projection.
        qkv: Fused projection. Phi-3 and GPT-2 stack all queries, then keys, then values; GPT-NeoX goes head
            by head: query, key and value of one head before the next head.
        qkv_by_head: That is so.
        o: Attention output projection.
        gate: Gate projection of a gated feed-forward; "" where there is none.
        up: First projection of the feed-forward.
        gate_up: Fused gate and up, gate rows first.
        down: Second projection of the feed-forward.
        mlp_norm: Norm whose output the feed-forward reads, in blocks that add attention, then feed-forward to
            the states; "" in others.
        experts: Module that holds all experts as 3-D parameters.
        expert_gate_up: Its parameter of shape [experts, 2 x width, hidden], gate rows first.
        expert_down: Its parameter of shape [experts, hidden, width].
        shared_expert: Expert that every token passes.
        routers: Modules that choose or weigh experts; never pruned.
        fallback: The family is not in the table and only `blocks` is known.
    """

    model_types: tuple[str, ...]
    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    qkv_by_head: bool = False
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = ""
    down: str = "mlp.down_proj"
    mlp_norm: str = ""
    experts: str = ""
    expert_gate_up: str = "gate_up_proj"
    expert_down: str = "down_proj"
    shared_expert: str = ""
    routers: tuple[str, ...] = ()
    fallback: bool = False

    def paths(self) -> dict[str, str]:
        """Return where the parts are whose modules have sizes of their own, for `shapes.fit_sizes`."""
        names = ("attention", "q", "k", "v", "qkv", "o", "mlp", "gate", "up", "gate_up", "down", "experts")
        return {name: getattr(self, name) for name in names} | {"router": (*self.routers, "")[0]}


GATED = ("llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text")

TABLE: tuple[Arch, ...] = (
    Arch(GATED, mlp_norm="post_attention_layernorm"),
    Arch(("gemma2", "gemma3_text")),
    Arch(("phi3",), q="", k="", v="", qkv="self_attn.qkv_proj", gate="", up="", gate_up="mlp.gate_up_proj"),
    Arch(
        ("opt",), blocks="model.decoder.layers", o="self_attn.out_proj", mlp="", gate="", up="fc1", down="fc2"
    ),
    Arch(
        ("gpt2",),
        blocks="transformer.h",
        attention="attn",
        q="",
        k="",
        v="",
        qkv="attn.c_attn",
        o="attn.c_proj",
        gate="",
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    Arch(
        ("gpt_neox",),
        blocks="gpt_neox.layers",
        attention="attention",
        q="",
        k="",
        v="",
        qkv="attention.query_key_value",
        qkv_by_head=True,
        o="attention.dense",
        gate="",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    Arch(("mixtral",), gate="", up="", down="", experts="mlp.experts", routers=("mlp.gate",)),
    # The plain gate, up and down of the Qwen MoEs exist only in their dense blocks (`mlp_only_layers`).
    Arch(
        ("qwen2_moe",),
        experts="mlp.experts",
        shared_expert="mlp.shared_expert",
        routers=("mlp.gate", "mlp.shared_expert_gate"),
    ),
    Arch(("qwen3_moe",), experts="mlp.experts", routers=("mlp.gate",)),
)

# Vision-language models: where their language model stands. Its row is that of its own model type.
LANGUAGE_MODELS: dict[str, str] = dict.fromkeys(
    ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl"), "model.language_model"
)

# What a linear router is called in families outside the table.
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


Reads = Literal["", "heads", "channels"]


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a block, seen as [out, in] however the model keeps it.

    Attributes:
        name: Key of the parameter in the model's state dict.
        label: Unique name of this matrix, without ".weight"; an expert's carries its index in brackets.
        module: The module whose input feeds the matrix; for an expert, the module of all experts.
        parameter: Name of the parameter inside `module`.
        expert: Index of the expert, or None.
        transposed: The parameter is kept as [in, out].
        reads: Which units its inputs are: "heads" of the attention, "channels" of the feed-forward.
    """

    name: str
    label: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False
    reads: Reads = ""

    @property
    def weight(self) -> Tensor:
        """The live weight, shape [out, in]: a view, so writing to it changes the model."""
        return self.view(self.whole)

    @property
    def matrix(self) -> str:
        """Return the parameter's name, an expert's with its index in brackets."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    @property
    def whole(self) -> Tensor:
        """The live parameter as the model keeps it; of an expert, the one that holds all experts."""
        return self.module.get_parameter(self.parameter).detach()

    def view(self, whole: Tensor) -> Tensor:
        """Return this matrix's [out, in] view of a tensor laid out like the whole parameter."""
        own = whole if self.expert is None else whole[self.expert]
        return own.T if self.transposed else own


def known_types() -> list[str]:
    """Return every model type that the table describes, sorted."""
    return sorted([*(kind for row in TABLE for kind in row.model_types), *LANGUAGE_MODELS])


def arch_of(model: PreTrainedModel | HasSkeleton) -> Arch:
    """Return the row of a model's family; for an unknown type fall back to its longest block list, warning.

    Raises:
        InputError: The type is unknown and no repeated blocks with linears are found in the model.
    """
    root = model if isinstance(model, PreTrainedModel) else model.skeleton
    config = root.config
    if row := row_of(config):
        return row
    path = _longest_block_list(root)
    if path is None:
        raise InputError(
            f"model type {config.model_type!r} is not known and no repeated blocks were found in it",
            hint=f"known types: {', '.join(known_types())}",
        )
    logger.warning(
        "model type %r is not known: pruning every linear inside the repeated blocks %r",
        config.model_type,
        path,
    )
    return Arch(
        (config.model_type,),
        blocks=path,
        attention="",
        mlp="",
        q="",
        k="",
        v="",
        o="",
        gate="",
        up="",
        down="",
        fallback=True,
    )


def blocks(model: PreTrainedModel | HasSkeleton, arch: Arch | None = None) -> list[tuple[str, nn.Module]]:
    """Return every decoder block with its path, first to last, as ("model.layers.0", module).

    Raises:
        InputError: The model type is unknown and no repeated blocks are found.
    """
    root = model if isinstance(model, PreTrainedModel) else model.skeleton
    path = (arch or arch_of(root)).blocks
    return [(f"{path}.{index}", block) for index, block in enumerate(root.get_submodule(path).children())]


def block_prefixes(model: PreTrainedModel | HasSkeleton, arch: Arch | None = None) -> list[str]:
    """Return the path of every decoder block, first to last."""
    return [prefix for prefix, _ in blocks(model, arch)]


def linears(prefix: str, block: nn.Module, arch: Arch) -> list[Linear]:
    """Return the weight matrices of a block in module order, each expert's own; no routers, no norms.

    Args:
        prefix: Path of the block in the model, which starts every name and label.
        block: One decoder block.
        arch: The family's row.
    """
    found: list[Linear] = []
    for path, module in block.named_modules():
        if _is_router(path, module, arch):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            label, turned = f"{prefix}.{path}", isinstance(module, Conv1D)
            reads: Reads = "heads" if path == arch.o else "channels" if path == arch.down else ""
            found.append(Linear(f"{label}.weight", label, module, transposed=turned, reads=reads))
        elif path and path == arch.experts:
            found.extend(_experts(f"{prefix}.{path}", module, arch))
    return found


def all_linears(model: PreTrainedModel | HasSkeleton) -> list[list[Linear]]:
    """Return the weight matrices of every decoder block, first block to last."""
    arch = arch_of(model)
    return [linears(prefix, block, arch) for prefix, block in blocks(model, arch)]


def _experts(prefix: str, module: nn.Module, arch: Arch) -> Iterator[Linear]:
    names = (arch.expert_gate_up, arch.expert_down)
    for expert in range(module.get_parameter(names[0]).shape[0]):
        for name in names:
            whole = f"{prefix}.{name}"
            yield Linear(whole, f"{whole}[{expert}]", module, parameter=name, expert=expert)


def _is_router(path: str, module: nn.Module, arch: Arch) -> bool:
    if not arch.fallback:
        return path in arch.routers
    named = path.rpartition(".")[2] in ROUTER_NAMES
    return named or (isinstance(module, nn.Linear) and module.out_features == 1)


def row_of(config: PreTrainedConfig) -> Arch | None:
    """Return the row of a configuration's family, None for one that the table lacks."""
    text = config.get_text_config()
    row = next((row for row in TABLE if text.model_type in row.model_types), None)
    if row is None or text is config:
        return row
    language_model = LANGUAGE_MODELS.get(config.model_type)
    if language_model is None:
        return None
    # "model.layers" of a causal LM is "layers" of the bare language model inside a VLM.
    inner = row.blocks.partition(".")[2]
    return replace(row, model_types=(config.model_type,), blocks=f"{language_model}.{inner}")


def _longest_block_list(model: PreTrainedModel) -> str | None:
    text_only = model.config.get_text_config() is model.config
    decoder = None if text_only else model.get_decoder()  # type: ignore[no-untyped-call]  # not annotated there
    best: tuple[int, str] | None = None
    for path, module in (decoder or model).named_modules():
        members = list(module.children()) if isinstance(module, nn.ModuleList) else []
        same = len({type(member) for member in members}) == 1
        if same and any(isinstance(part, nn.Linear | Conv1D) for part in members[0].modules()):
            # Strictly longer only: of two equal lists the first is kept.
            best = best if best and best[0] >= len(members) else (len(members), path)
    if best is None:
        return None
    outside = "" if decoder is None else next(name for name, part in model.named_modules() if part is decoder)
    return f"{outside}.{best[1]}" if outside else best[1]
