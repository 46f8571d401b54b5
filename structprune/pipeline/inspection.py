"""What a model is and what a run would do to it, from its files and a skeleton without weights."""

from pathlib import Path
from typing import Any

from structprune.calibration.data import positions, window_length
from structprune.checkpoint.opened import RESIDENT_COPIES
from structprune.checkpoint.source import resolve
from structprune.cost import count, weight_bytes
from structprune.machine import available_memory
from structprune.models.arch import arch_of, blocks, linears
from structprune.models.identity import architecture_of
from structprune.models.streamed import StreamedModel, open_model
from structprune.models.tokenizer import open_tokenizer
from structprune.pruner import achievable
from structprune.recipe import Recipe
from structprune.storage.output import check_output

# Patterns that kernels or papers know; a model is told which of them fit its widths.
PATTERNS = ((1, 4), (2, 4), (3, 4), (4, 8))
# What Python, torch and transformers take before any weight is read; measured on Linux, CPU build.
RUNTIME_BYTES = 450_000_000


def inspect(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Say what a model is, what it costs, and what can be pruned in it; every check of its files runs.

    Args:
        model: "demo", a folder, a hub name.
        revision: Of a model on the hub.
        trust_remote_code: Let code in the folder run.
    """
    folder = resolve(model, revision=revision)
    opened = _skeleton(folder, trust_remote_code)
    arch = arch_of(opened.skeleton)
    found = [linear for prefix, block in blocks(opened, arch) for linear in linears(prefix, block, arch)]
    scan = opened.reader.scan(opened.names.ignored)
    stored = {part for linear in found for part in opened.names.stored_of[linear.name]}
    zeros = sum(scan.zeros[name] for name in stored)
    weights = sum(linear.weight.numel() for linear in found)
    cost = count(opened, zeros=zeros, prunable=weights, bytes_on_disk=weight_bytes(folder))
    widths = {linear.weight.shape[1] for linear in found}
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    return {
        "model": model,
        "folder": str(folder),
        "model_type": opened.config.model_type,
        "class": type(opened.skeleton).__name__,
        "known_family": not arch.fallback,
        "blocks": len(blocks(opened, arch)),
        "linears": len(found),
        "experts": sum(linear.expert is not None for linear in found) // 2,
        "parameters": cost.parameters,
        "prunable": weights,
        "sparsity": cost.sparsity,
        "constant_matrices": list(scan.constant),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "bytes": cost.bytes_on_disk,
        "files": len(opened.reader.shards),
        "flops_per_token": cost.flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "length": cost.length,
        "max_positions": positions(opened.config),
        "tied_embeddings": bool(opened.names.aliases),
        "vocabulary": len(tokenizer) if tokenizer is not None else None,
        "patterns": [f"{kept}:{of}" for kept, of in PATTERNS if not any(width % of for width in widths)],
        "architecture": architecture_of(opened),
        "weights": scan.weights,
    }


def dry_run(
    recipe: Recipe, *, stream: bool | None = None, overwrite: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Say what a run would do and need, after every check that needs no computation; nothing is written.

    Args:
        recipe: The run.
        stream: As for `prune`.
        overwrite: As for `prune`.
        trust_remote_code: As for `prune`.
    """
    folder = resolve(recipe.model, revision=recipe.revision)
    size = weight_bytes(folder)
    check_output(folder, recipe.output, overwrite=overwrite, needed_bytes=size)
    opened = _skeleton(folder, trust_remote_code)
    for pruner in recipe.prune:
        pruner.check(opened)
    streamed = stream if stream is not None else opened.reader.nbytes * RESIDENT_COPIES > available_memory()
    length = window_length(recipe.calibration.length, positions(opened.config))
    dense = sum(p.numel() for p in opened.skeleton.parameters())
    added = sum(pruner.added_parameters(opened) for pruner in recipe.prune)
    return {
        "recipe": recipe.text(),
        "stages": [
            {"method": pruner.method(), "asked": pruner.asked, "achievable": achievable([pruner], opened)}
            for pruner in recipe.prune
        ],
        "parameters": {"dense": dense, "pruned": dense + added},
        # Zeros stay in the dense files, so that every loader opens them: they take the room they took.
        "bytes": {"dense": size, "pruned": size + added * opened.dtype.itemsize},
        "streamed": streamed,
        "memory_bytes": _memory(opened, recipe, length, streamed),
        "disk_bytes": size + opened.reader.nbytes // 16,
        "loads_in": ["transformers with trust_remote_code" if added else "transformers", "structprune"],
        "note": "zeros make neither the files smaller nor dense kernels faster",
    }


def _skeleton(folder: Path, trust_remote_code: bool) -> StreamedModel:
    opened = open_model(folder, stream=True, trust_remote_code=trust_remote_code)
    assert isinstance(opened, StreamedModel)
    return opened


def _memory(opened: StreamedModel, recipe: Recipe, length: int, streamed: bool) -> int:
    """Return the peak that a run is expected to need: runtime, weights held at once, activations."""
    item = opened.dtype.itemsize
    largest = max(info.nbytes for info in opened.reader.tensors.values())
    one = [sum(p.numel() for p in block.parameters()) * item for _, block in blocks(opened)]
    held = max(3 * max(one), 2 * largest) if streamed else int(opened.reader.nbytes * RESIDENT_COPIES)
    hidden: int = opened.config.get_text_config().hidden_size
    activations = recipe.calibration.samples * length * hidden * item
    needs_data = any(pruner.looks_at_data for pruner in recipe.prune)
    looked_at = max(pruner.remembered_bytes(opened) for pruner in recipe.prune)
    return RUNTIME_BYTES + held + (2 * activations + looked_at if needs_data else 0)
