"""What a folder really holds, measured from its files, and whether that is what was asked for.

A second code path: it neither selects nor edits, and believes no figure that the pruning run wrote down; it
holds the files to the promises. Each check is a row with a name, a verdict and one line of what was found.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from structprune.checkpoint.manifest import MANIFEST, read_manifest
from structprune.checkpoint.packed import SOURCE, changed_files, is_packed
from structprune.checkpoint.packed_reader import PackedReader
from structprune.checkpoint.plans import plans_of
from structprune.errors import InputError, counted
from structprune.models.cost import weight_bytes
from structprune.models.identity import architecture_of
from structprune.models.opening import Opening
from structprune.models.streamed import Model, StreamedModel, build_model, open_reader
from structprune.progress import Progress, silent, step
from structprune.proof import against, counts, reloading
from structprune.proof.held import Held, measure_files
from structprune.proof.running import check_running
from structprune.proof.stage import Stage, read_stages
from structprune.proof.trace import trace
from structprune.proof.verification import Verification
from structprune.proof.written import WrittenTensors, check_files
from structprune.storage.reader import StoredTensors
from structprune.storage.tensor_file import Entry

PLANS = "structprune/plans"


def verify(
    folder: Path,
    source: Path | None = None,
    *,
    opening: Opening = Opening(),
    reload: bool = True,
    written: Mapping[Entry, str] | None = None,
    revalued: Collection[str] = (),
    reference: Model | None = None,
    progress: Progress = silent,
) -> Verification:
    """Measure a folder and check it: its plans, its source, its hashes, and what a fresh process makes of it.

    Args:
        folder: A folder that structprune wrote, packed or not, or any other model folder, which is then only
            measured.
        source: What it was made from: what was not removed must be equal to it bit for bit.
        opening: How the folder is opened, here and in the fresh process; always on the CPU, in the dtype of
            its files.
        reload: Open the folder in a fresh process and compare logits.
        written: sha256 of every tensor as a run wrote it, before there is a manifest; None compares every
            file and every tensor with the manifest.
        revalued: Stored tensors whose kept weights were changed on purpose, beside those that the plans name.
        reference: A model whose logits the folder must give, such as the one just pruned; only on the CPU.
        progress: Told after every tensor, and of the fresh process.

    Raises:
        InputError: The folder is none of ours and cannot be read, or the source cannot be read.
        EnvironmentFailure: A file may not be read, or the disk fails.
    """
    result = Verification()
    packed, links = is_packed(folder), opening.allow_external_symlinks
    # What a packed folder keeps of the dense one: its manifest and its plans.
    record = folder / SOURCE if packed else folder
    ours = packed or (folder / MANIFEST).exists() or (folder / PLANS).exists()
    before = None if source is None else open_reader(source, opening)
    # What is recovered was pruned before: its source has lost already what the first stages remove.
    carried = [] if source is None else [plan.id for plan in plans_of(source)]
    manifest = check_files(result, folder, ours=ours, links=links) if written is None else None
    try:
        if packed:
            manifest = read_manifest(record, allow_external_symlinks=links)
        model = _open(result, folder, opening, progress)
        plans = sorted((record / PLANS).glob("*/plan.json"))
        stages = read_stages((path.parent for path in plans), carried)
    except InputError as error:
        if not ours:
            raise
        result.row("files", [str(error)], "")
        return result
    reader = model.reader
    tensors, files = counted(len(reader.tensors), "tensor"), counted(len(reader.shards), "file")
    result.row("files", [], f"{tensors} in {files} as config.json says")
    known = WrittenTensors.of_manifest(manifest) if written is None else WrittenTensors.of_run(written)
    held = _measure(result, model, stages, before, known, progress)
    _check_weights(result, held, opening.allow_nonfinite)
    trained = {*(manifest.facts.get("revalued", ()) if manifest else ()), *revalued}
    _check_values(result, held, trained)
    if before is not None:
        since = [stage for stage in stages if not stage.in_source]
        against.check_source(result, reader, before, held.found, since, trained)
        against.check_side_files(result, folder, before.folder, since)
    reloading.check_modelling(result, reader)
    if packed:
        how = f"`structprune export {folder} DENSE --to dense` gives a folder that can be"
        result.row("reload", [], f"no runtime opens packed weights; {how}")
    elif reload:
        with step(progress, "reload in a fresh process"):
            reloading.check_reload(result, model, reader, opening, reference)
            running = [stage for stage in stages if stage.runs]
            if running:
                as_stored = replace(opening, dtype=str(model.dtype).removeprefix("torch."))
                check_running(result, folder, model.config, running, as_stored, reference)
    return result


def _open(result: Verification, folder: Path, opening: Opening, progress: Progress) -> StreamedModel:
    """Return the model of a folder, none of it in memory; of a packed one add a row on what it unpacks to."""
    reader: StoredTensors
    if is_packed(folder):
        reader = PackedReader(folder, opening.root(folder))
        problems = changed_files(folder, reader.packing, reader.root, progress)
        count = len(reader.packing.files)
        result.row("unpacked", problems, f"{count} files unpack to the bytes that were packed")
    else:
        reader = open_reader(folder, opening)
    model = build_model(reader, replace(opening, dtype="auto", stream=True, device="cpu"))
    assert isinstance(model, StreamedModel)
    return model


def _measure(
    result: Verification,
    model: StreamedModel,
    stages: list[Stage],
    source: StoredTensors | None,
    known: WrittenTensors,
    progress: Progress,
) -> Held:
    """Measure what the files hold, once it is known which plans fit them; add a row on their bytes."""
    traced, misled = trace(stages, source.shapes if source else None, model.reader.shapes)
    _check_plans(result, model, stages, misled)
    held = measure_files(model, stages, source, progress, traced, hashed=known.weights is not None)
    known.check(result, model.reader, held.hashes)
    _summarise(result, model, held)
    return held


def _check_plans(
    result: Verification, model: StreamedModel, stages: list[Stage], misled: Sequence[str]
) -> None:
    """Check that masks and promises fit the files; a mask that does not is left out of what follows."""
    problems: list[str] = []
    shapes, gone = model.reader.shapes, set().union(*(stage.gone for stage in stages))
    for number, stage in enumerate(stages):
        later = stages[number + 1 :]
        reshaped = {name for one in later for name in one.reshaped}
        misfit = {
            name
            for name in stage.masked
            if name not in reshaped | gone | stage.left and shapes.get(name) != stage.mask_shape(name)
        }
        for name in sorted(misfit)[:1]:
            found = list(shapes[name]) if name in shapes else "no such tensor"
            mask = list(stage.mask_shape(name))
            problems.append(f"{stage.name}: {name}: mask of shape {mask}, in the files {found}")
        stage.masked = {name: block for name, block in stage.masked.items() if name not in misfit}
        # The hash is of the architecture before the stage: the files' own only if nothing restructured since.
        same = not any(one.restructures for one in stages[number:])
        if same and stage.plan.architecture != architecture_of(model):
            problems.append(f"{stage.name}: made for another architecture than the one in the files")
        if missing := sorted(stage.prunable - shapes.keys() - gone - stage.left):
            problems.append(f"{stage.name}: {missing[0]}: named by the plan, not in the files")
        problems += [f"{stage.name}: {problem}" for problem in counts.check_shapes(stage, shapes, later)]
        problems += [f"{stage.name}: {problem}" for problem in counts.check_lists(stage, shapes)]
    if stages:
        problems += misled
        named = ", ".join(stage.name for stage in stages)
        masks = sum(len(stage.masked) for stage in stages)
        fitting = f"{masks} masks" if masks else "names and shapes"
        result.row("plans", problems, f"{named}: {fitting} fit the files")


def _summarise(result: Verification, model: StreamedModel, held: Held) -> None:
    reader, names, found = model.reader, model.names, held.found
    real = {name for name, _ in model.skeleton.named_parameters(remove_duplicate=False)}
    # Buffers are no parameters, and a tied tensor that is stored twice is one.
    counted = [name for name in found if name not in names.duplicates and names.module_of.get(name) in real]
    result.parameters = sum(found[name].size for name in counted)
    result.nonzero = result.parameters - sum(found[name].zeros for name in counted)
    result.bytes = weight_bytes(reader.folder)
    chosen = set().union(*(stage.prunable for stage in held.stages)) if held.stages else set(held.where)
    chosen &= found.keys()
    size = sum(found[name].size for name in chosen)
    zeros = sum(found[name].zeros for name in chosen)
    result.sparsity = zeros / size if size else 0.0
    patterns = set().union(*(stage.patterns for stage in held.stages))
    result.pattern = counts.pattern([found[name] for name in chosen], patterns) if chosen else "dense"
    result.blocks = counts.per_block(found, held.where)
    for stage, removed in zip(held.stages, held.removed, strict=True):
        of = stage.plan.promises.of if stage.plan.promises else 0
        result.stages[stage.name] = None if removed is None else removed / of if of else 0.0


def _check_weights(result: Verification, held: Held, allow_nonfinite: bool) -> None:
    broken = [
        f"{name}: {one.not_finite} NaN or infinite values"
        for name, one in held.found.items()
        if one.not_finite
    ]
    if broken and allow_nonfinite:
        result.row(
            "finite", [], f"allowed: NaN or infinity in {len(broken)} of {counted(len(held.found), 'tensor')}"
        )
    else:
        result.row("finite", broken, f"no NaN and no infinity in {counted(len(held.found), 'tensor')}")
    if not held.stages:
        return
    revived = [
        f"{name}: {one.revived} removed weights are not zero"
        for name, one in held.found.items()
        if one.revived
    ]
    removed = sum(int(one.removed.sum()) for rows in held.rows for one in rows.values())
    all_zero = f"all {removed:,} removed weights are zero in the files"
    result.row("masks", revived, all_zero if removed else "no weight was to become zero")
    problems, said = [], []
    for number, (stage, rows) in enumerate(zip(held.stages, held.rows, strict=True)):
        cut = {name for later in held.stages[number + 1 :] for name in later.reshaped}
        whole = {name: one for name, one in held.found.items() if name not in cut}
        wrong, right = counts.check(stage, rows, whole, held.removed[number])
        problems += [f"{stage.name}: {problem}" for problem in wrong]
        said.append(f"{stage.name}: {right}")
    result.row("count", problems, "; ".join(said))


def _check_values(result: Verification, held: Held, trained: Collection[str]) -> None:
    gone = set().union(*({*stage.gone, *stage.left} for stage in held.stages))
    decided = {name for stage in held.stages for name in stage.written} - gone
    # What was trained afterwards is told by the manifest or by whoever trained it; the source row counts it.
    compared = {
        name
        for name in decided - set(trained)
        if name not in held.found or held.found[name].foreign is not None
    }
    if decided:
        problems = [
            f"{name}: its values are not those that the plan decided on"
            for name in sorted(compared)
            if name not in held.found or held.found[name].foreign
        ]
        # All of them may have been trained, or given new values by a later stage.
        said = f"{counted(len(compared), 'tensor')} with the new values of their plans"
        result.row("values", problems, said if compared else "all that were decided have changed since")
