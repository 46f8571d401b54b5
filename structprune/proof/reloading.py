"""Whether a folder opens, here and in a process that shares nothing with this one, and gives the same logits.

The modelling file that a folder of ours carries is for plain transformers. It is compared with the one that
we would generate, and never run: a fresh process runs a copy of the folder with a generated file in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from structprune.checkpoint.modelling import modelling_file, patched_files
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.shipped import is_shipped, shipped_file
from structprune.models.streamed import Model, StreamedModel
from structprune.proof import fresh_process
from structprune.proof.image_probe import image_probe
from structprune.proof.reload_streamed import loader
from structprune.proof.verification import Verification
from structprune.runtime.attach import paused
from structprune.storage.reader import CheckpointReader, StoredTensors
from structprune.storage.scratch import scratch_folder


def check_modelling(result: Verification, reader: StoredTensors) -> None:
    """Add a row where a folder carries our modelling file: whether it is the one that we would write."""
    if not is_shipped(reader.config):
        return
    path = reader.folder / shipped_file(reader.config)
    if not path.is_file():
        problems = [f"{path.name}: missing, config.json names it"]
    elif path.read_bytes() != modelling_file(reader.config):
        # Whose text it is cannot be told from it: what an earlier version wrote looks like what anybody did.
        how = f"`structprune apply DENSE NEW --plan {reader.folder}`, or any run that starts from the folder"
        said = f"{path.name}: is not the file that this structprune writes; do not run it"
        problems = [f"{said}. If an earlier one wrote it: {how}, writes today's"]
    else:
        problems = []
    result.row("modelling file", problems, f"{path.name} is the one that structprune writes")


def check_reload(
    result: Verification,
    model: StreamedModel,
    reader: StoredTensors,
    opening: Opening,
    reference: Model | None,
) -> None:
    """Add rows: whether this run's model, the folder opened here and a fresh process agree on logits.

    Args:
        result: Gets the rows, and the loaders that really opened the folder.
        model: The folder's model, none of it in memory.
        reader: The folder.
        opening: Whether one block is held, and whether code of others that the folder brings along may run.
        reference: A model whose logits the folder must give; only on the CPU.
    """
    ids = fresh_process.probe(model.config)
    image = image_probe(model.config, ids[0])
    asked = [{"input_ids": ids}, *([] if image is None else [image])]
    stream = opening.streams(reader.nbytes)
    if stream:
        ours = [logits(model, batch) for batch in asked]
    else:
        with model.resident(""):
            ours = [logits(model.skeleton, batch) for batch in asked]
    result.loads_in.append(loader())
    # An accelerator rounds differently from the processor that the folder is run on here.
    if reference is not None and reference.device.type == "cpu":
        with paused(reference):  # what works while a model runs is no part of the files
            same, said = _compared([logits(reference, batch).cpu() for batch in asked], ours)
        result.row("logits", [] if same else [f"this run's model: {said}"], f"this run's model: {said}")
    dtype = str(model.dtype).removeprefix("torch.")
    # A streamed reload is our own, which runs no file of ours; no other opens weights that are elsewhere.
    own = stream or (isinstance(reader, CheckpointReader) and reader.refers)
    with nullcontext((reader.folder, False)) if own else _runnable(reader) as (folder, generated):
        trusted = opening.trust_remote_code or generated
        how = replace(opening, dtype=dtype, trust_remote_code=trusted)
        job = fresh_process.ReloadJob(folder, ids, how, image)
        (child,) = fresh_process.reload([job], how="streamed" if own else "plain")
    if child.logits is None:
        result.row("reload", [f"a fresh process could not open the folder: {child.error}"], "")
        return
    found = [child.logits, *([] if child.image_logits is None else [child.image_logits])]
    same, said = _compared(found, ours)
    # Both read this folder, so a damaged one gives the same logits, too.
    pair = f"this folder opened by structprune here and by {child.loader} in a fresh process"
    problems = [] if same else [f"{pair}: {said}"]
    problems += [f"{name}: {child.loader} does not find it" for name in child.missing]
    if child.same_with_cache is False:
        problems.append(f"{child.loader}: other tokens are generated with a cache than without")
    fine = f"{pair}: {said} on {ids.numel()} tokens"
    if image is not None:
        fine += f" and on a prompt of {image['input_ids'].numel()} with an image"
    cached = ", the same tokens with a cache" if child.same_with_cache else ""
    if result.row("reload", problems, fine + cached):
        result.loads_in.append(child.loader)


def _compared(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[bool, str]:
    """Tell whether the logits of every probe are those expected, and of the worst by how much they differ."""
    rows = [fresh_process.difference(one, other) for one, other in zip(found, expected, strict=True)]
    wrong = [f"{'with an image, ' * index}{said}" for index, (same, said) in enumerate(rows) if not same]
    return (False, wrong[0]) if wrong else rows[-1]


@contextmanager
def _runnable(reader: StoredTensors) -> Iterator[tuple[Path, bool]]:
    """Yield a folder whose code may run, and whether it has any: a copy with a file of our making."""
    if not is_shipped(reader.config):
        yield reader.folder, False
        return
    with scratch_folder("copy") as name:
        copy = Path(name)
        ours = patched_files(reader.folder / "config.json", {})
        for file in reader.folder.resolve().iterdir():
            if file.is_file() and file.suffix != ".py" and file.name not in ours:
                (copy / file.name).symlink_to(file)
        for name, content in ours.items():
            (copy / name).write_bytes(content)
        yield copy, True
