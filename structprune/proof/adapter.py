"""What a kept adapter is: its files, the model that it was trained on, and what merging the two leaves."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from structprune.checkpoint.adapter import read_adapter
from structprune.checkpoint.manifest import MANIFEST
from structprune.checkpoint.source import Source, open_adapted
from structprune.errors import InputError
from structprune.models.cost import weight_bytes
from structprune.models.opening import Opening
from structprune.models.streamed import build_model
from structprune.progress import Progress, silent
from structprune.proof.reload_streamed import loader
from structprune.proof.verification import Verification
from structprune.proof.verify import verify
from structprune.proof.written import check_files


def verify_adapter(
    folder: Path,
    source: Path | None = None,
    *,
    opening: Opening = Opening(),
    progress: Progress = silent,
) -> Verification:
    """Check a kept adapter, measure its base, and merge the two in memory.

    The figures are those of the merged model: merging changes no zero, and that is one of the rows.

    Args:
        folder: What `structprune recover` wrote with its adapter kept.
        source: What its base was made from.
        opening: How the models are opened; always on the CPU, in memory and in the dtype of the files.
        progress: Told after every tensor of the base.

    Raises:
        InputError: An adapter of another kind, or the source cannot be read.
    """
    ours = (folder / MANIFEST).exists()
    result = Verification()
    check_files(result, folder, ours=ours, links=opening.allow_external_symlinks)
    try:
        adapter = read_adapter(folder)
    except InputError as error:
        if not ours:
            raise
        result.row("adapter", [str(error)], "")
        return result
    ranks = sorted({factors.rank for factors in adapter.factors.values()})
    count = f"changes of {len(adapter.factors)} tensors, rank {' and '.join(map(str, ranks))}, all finite"
    result.row("adapter", [], count)
    try:
        merged = open_adapted(str(folder), folder, replace(opening, dtype="auto", device="cpu", stream=False))
    except InputError as error:
        result.row("base", [str(error)], "")
        return result
    base = verify(Path(adapter.base), source, opening=opening, reload=False, progress=progress)
    broken = [f"{adapter.base}: {check.name}: {check.detail}" for check in base.failed]
    result.row("base", broken, f"{adapter.base} is as it was written, and what the adapter was trained on")
    _check_merged(result, merged, sorted(adapter.factors))
    result.sparsity, result.pattern, result.blocks = base.sparsity, base.pattern, base.blocks
    result.parameters, result.nonzero, result.stages = base.parameters, base.nonzero, base.stages
    result.bytes = weight_bytes(folder)
    result.loads_in = [loader(), *(["peft"] if adapter.plain else [])]
    return result


def _check_merged(result: Verification, merged: Source, changed: list[str]) -> None:
    """Add rows on the tensors that the adapter changes: the same zeros as before, and numbers all."""
    before = build_model(merged.reader, merged.opening)
    assert isinstance(merged.model, nn.Module)
    assert isinstance(before, nn.Module)
    zeros, moved, broken = 0, [], []
    for name in changed:
        one, other = before.get_parameter(name), merged.model.get_parameter(name)
        zeros += int((one == 0).sum())
        if differing := int(((one == 0) != (other == 0)).sum()):
            moved.append(f"{name}: {differing} weights are zero in one of base and merged model only")
        if not bool(other.isfinite().all()):
            broken.append(f"{name}: NaN or infinite values once it is merged")
    result.row("masks", moved, f"all {zeros:,} zeros of the changed tensors are zero once it is merged")
    result.row("finite", broken, f"no NaN and no infinity in {len(changed)} merged tensors")
