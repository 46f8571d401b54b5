"""What a model is, from its files and a skeleton without weights."""

from dataclasses import asdict
from typing import Any

from structprune.calibration.data import positions
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.running import running_methods
from structprune.checkpoint.source import open_outline
from structprune.errors import MethodError, UsageError
from structprune.models.arch import arch_of, blocks, linears
from structprune.models.cost import count, weight_bytes
from structprune.models.identity import architecture_of
from structprune.models.opening import Opening
from structprune.models.streamed import StreamedModel
from structprune.models.tokenizer import open_tokenizer
from structprune.proof.prior import prior_of
from structprune.pruners.catalogue import find, names
from structprune.pruners.pruner import Pruner
from structprune.recipe.fields import build
from structprune.storage.reader import CheckpointReader

# Patterns that kernels or papers know; a model is told which of them fit its widths.
PATTERNS = ((1, 4), (2, 4), (3, 4), (4, 8))


def inspect(model: str, opening: Opening = Opening(), *, revision: str | None = None) -> dict[str, Any]:
    """Say what a model is, what it costs, and what can be pruned in it; every check of its files runs.

    Args:
        model: "demo", a folder, a hub name.
        opening: How it is opened; no weight is held.
        revision: Branch, tag or commit of a hub model.
    """
    folder = resolve(model, revision=revision)
    opened, scan = open_outline(folder, opening)
    arch = arch_of(opened.skeleton)
    found = [linear for prefix, block in blocks(opened, arch) for linear in linears(prefix, block, arch)]
    assert isinstance(opened.reader, CheckpointReader)
    stored = {part for linear in found for part in opened.names.stored_of[linear.name]}
    zeros = sum(scan.zeros[name] for name in stored)
    weights = sum(linear.weight.numel() for linear in found)
    prior = prior_of(opened, opened.reader, scan.zeros, opening)
    cost = count(opened, zeros=zeros, prunable=weights, bytes_on_disk=weight_bytes(folder))
    widths = {linear.weight.shape[1] for linear in found}
    tokenizer = open_tokenizer(folder, opening)
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
        "pruned": str(prior) if prior.pruned else None,
        "found": prior.as_json(),
        "while_running": running_methods(folder),
        "weights_in": str(opened.reader.weights_folder) if opened.reader.refers else None,
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
        "methods": [abilities(name, opened) for name in names()],
        "architecture": architecture_of(opened),
        "weights": scan.weights,
    }


def abilities(name: str, model: StreamedModel) -> dict[str, Any]:
    """Return what a method can do with a model, asked of its forecast: nothing is computed.

    Args:
        name: The method.
        model: Its skeleton.

    Returns:
        "name", "family", "needs_data", "reads" (of the data: "text" or "images"), "reason" (why it cannot
        prune this model, or any; None where it can), "unit", "range" (what can be asked for, in words; None
        where that is a share that leaves), "fractions" (whether it takes one), "whole" ("units", at "most"
        how many "of" how many leave, where they are few and leave whole; else None) and "patterns" (N:M that
        fit every matrix).
    """
    found: dict[str, Any] = {"name": name, "family": names()[name], "needs_data": False, "reads": "text"}
    found |= {"reason": None, "unit": None, "range": None, "fractions": False, "whole": None, "patterns": []}
    try:
        pruner = build(find(name), {})
        found |= {"needs_data": pruner.looks_at_data, "reads": pruner.reads}
        whole = pruner.whole_units(model)
        if whole is not None and whole.most:  # the share that is one of them, which no default need be
            pruner = pruner.with_goal(1 / whole.of)
        unit = pruner.forecast(model).unit
    except (MethodError, UsageError) as error:
        return found | {"reason": error.message}
    if reach := pruner.reach(model):
        return found | {"unit": unit, "range": reach}
    patterns = [text for kept, of in PATTERNS if _reaches(pruner, text := f"{kept}:{of}", model)]
    fractions = whole is not None or _reaches(pruner, 0.5, model)
    told = asdict(whole) if whole else None
    return found | {"unit": unit, "fractions": fractions, "whole": told, "patterns": patterns}


def _reaches(pruner: Pruner, goal: float | str, model: StreamedModel) -> bool:
    try:
        pruner.with_goal(goal).forecast(model)
    except UsageError:
        return False
    return True
