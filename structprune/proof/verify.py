"""What a folder really holds, measured from its files, and whether that is what was asked for.

A second code path: it neither selects nor edits, and believes no figure that the pruning run wrote down. Each
check is a row with a name, a verdict and one line that says what was found.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from structprune.checkpoint.manifest import MANIFEST, check_manifest, read_manifest
from structprune.checkpoint.side_files import side_files
from structprune.errors import InputError
from structprune.machine import give_back_memory
from structprune.models import factored
from structprune.models.identity import architecture_of
from structprune.models.outputs import logits
from structprune.models.streamed import Model, StreamedModel, open_model
from structprune.progress import Progress, silent
from structprune.proof import counts, fresh
from structprune.proof.measure import Measured, Place, Stage, measure, places
from structprune.proof.reload_streamed import loader
from structprune.proof.verification import Check, Verification
from structprune.storage.reader import CheckpointReader
from structprune.storage.stored_config import MAX_CONFIG_BYTES, plain
from structprune.storage.strict_json import read_json

__all__ = ["Check", "Verification", "verify"]

PLANS = "structprune/plans"


def verify(
    folder: Path,
    against: Path | None = None,
    *,
    reload: bool = True,
    stream: bool = False,
    hashes: bool = True,
    revalued: Collection[str] = (),
    reference: Model | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Verification:
    """Measure a folder and check it: its plans, its source, its hashes, and what a fresh process makes of it.

    Args:
        folder: A folder that structprune wrote, or any other model folder, which is then only measured.
        against: The source: what was not removed must be equal to it bit for bit.
        reload: Open the folder in a fresh process and compare logits.
        stream: Hold one block in memory, here and in the fresh process.
        hashes: Check every file against the manifest; without, the manifest may not exist yet.
        revalued: Stored tensors whose kept weights were changed on purpose, beside those that the plans name.
        reference: A model whose logits the folder must give, such as the one just pruned; only on the CPU.
        trust_remote_code: Run modelling code that the folder brings along.
        progress: Told after every tensor.

    Raises:
        InputError: The folder is none of ours and cannot be read, or the source cannot be read.
        EnvironmentFailure: A file may not be read, or the disk fails.
    """
    result = Verification()
    ours = (folder / MANIFEST).exists() or (folder / PLANS).exists()
    source = None if against is None else CheckpointReader(against)
    if hashes:
        _check_manifest(result, folder, ours)
    try:
        model = open_model(folder, stream=True, trust_remote_code=trust_remote_code)
        stages = [Stage(path.parent) for path in sorted((folder / PLANS).glob("*/plan.json"))]
    except InputError as error:
        if not ours:
            raise
        result.row("files", [str(error)], "")
        return result
    assert isinstance(model, StreamedModel)
    readable = (
        f"{len(model.reader.tensors)} tensors in {len(model.reader.shards)} files agree with config.json"
    )
    result.row("files", [], readable)
    _check_plans(result, model, stages)
    found, where = _measure(model, stages, source, progress)
    _summarise(result, model, found, where, stages)
    _check_weights(result, found, where, stages)
    manifest = read_manifest(folder) if ours else None
    trained = {*(manifest.facts.get("revalued", ()) if manifest else ()), *revalued}
    _check_values(result, found, stages, trained)
    if source is not None:
        exempt = trained.union(*(stage.revalued for stage in stages))
        parts = set().union(*(stage.parts for stage in stages))
        _check_source(result, model.reader, source, found, exempt, parts)
        _check_side_files(result, folder, source.folder)
    if reload:
        _check_reload(result, model, stream=stream, trusted=trust_remote_code, reference=reference)
    return result


def _check_manifest(result: Verification, folder: Path, ours: bool) -> None:
    if not ours:
        result.row("manifest", [], f"not written by structprune (no {MANIFEST}); measured only")
        return
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        result.row("manifest", [str(error)], "")
        return
    if manifest is None:
        result.row("manifest", [f"{folder}: no {MANIFEST}; the folder is incomplete"], "")
        return
    count = len(manifest.files)
    result.row("manifest", check_manifest(folder), f"{count} files have the size and sha256 of {MANIFEST}")


def _check_plans(result: Verification, model: StreamedModel, stages: list[Stage]) -> None:
    problems = []
    for stage in stages:
        shapes = model.reader.shapes
        wrong = next((name for name in stage.masked if shapes.get(name) != stage.shape(name)), None)
        if wrong is not None:
            found = list(shapes[wrong]) if wrong in shapes else "no such tensor"
            problems.append(
                f"{stage.name}: {wrong}: mask of shape {list(stage.shape(wrong))}, in the files {found}"
            )
            stage.masked = {
                name: block for name, block in stage.masked.items() if shapes.get(name) == stage.shape(name)
            }
        elif not stage.revalued and stage.plan.architecture != architecture_of(model):
            problems.append(f"{stage.name}: made for another architecture than the one in the files")
        elif missing := sorted(stage.prunable - shapes.keys()):
            problems.append(f"{stage.name}: {missing[0]}: named by the plan, not in the files")
    named = ", ".join(stage.name for stage in stages)
    if stages:
        result.row(
            "plans", problems, f"{named}: {sum(len(stage.masked) for stage in stages)} masks fit the files"
        )


def _measure(
    model: StreamedModel, stages: list[Stage], source: CheckpointReader | None, progress: Progress
) -> tuple[dict[str, Measured], dict[str, Place]]:
    """Measure every tensor in the order of the files; one is in memory, with its masks and its source."""
    reader = model.reader
    where = places(model, by_matrix=any(counts.by_matrix(stage) for stage in stages))
    asked = {stage.pattern[1] for stage in stages if stage.pattern}
    groups = {of: of in asked for of in {*counts.COMMON, *asked}}
    found: dict[str, Measured] = {}
    for name in (name for names in reader.shards.values() for name in names):
        tensor = reader.read(name)
        masks = [stage.mask(name) if name in stage.masked else None for stage in stages]
        known = source.tensors.get(name) if source else None
        same = known is not None and (known.shape, known.dtype) == (tuple(tensor.shape), tensor.dtype)
        before = source.read(name) if source is not None and same else None
        found[name] = measure(tensor, where.get(name), masks, before, groups)
        touching = [stage for stage in stages if name in stage.valued or name in stage.masked]
        if touching and name in touching[-1].valued:
            found[name].foreign = not touching[-1].holds(name, tensor)
        # Before the next one is read: the two largest are often neighbours in the file.
        del tensor, masks, before
        give_back_memory()
        progress("verify", len(found), len(reader.tensors))
    return found, where


def _summarise(
    result: Verification,
    model: StreamedModel,
    found: Mapping[str, Measured],
    where: Mapping[str, Place],
    stages: list[Stage],
) -> None:
    names = model.names
    real = {name for name, _ in model.skeleton.named_parameters(remove_duplicate=False)}
    counted = [name for name in found if name not in names.duplicates and names.module_of.get(name) in real]
    result.parameters = sum(found[name].size for name in counted)
    result.nonzero = result.parameters - sum(found[name].zeros for name in counted)
    result.bytes = sum((model.reader.folder / file).stat().st_size for file in model.reader.shards)
    chosen = set().union(*(stage.prunable for stage in stages)) if stages else set(where)
    chosen &= found.keys()
    size = sum(found[name].size for name in chosen)
    zeros = sum(found[name].zeros for name in chosen)
    result.sparsity = zeros / size if size else 0.0
    result.pattern = counts.pattern([found[name] for name in chosen], [stage.pattern for stage in stages])
    result.blocks = counts.per_block(found, where)


def _check_weights(
    result: Verification, found: Mapping[str, Measured], where: Mapping[str, Place], stages: list[Stage]
) -> None:
    broken = [
        f"{name}: {one.not_finite} NaN or infinite values" for name, one in found.items() if one.not_finite
    ]
    result.row("finite", broken, f"no NaN and no infinity in {len(found)} tensors")
    if not stages:
        return
    revived = [
        f"{name}: {one.revived} removed weights are not zero" for name, one in found.items() if one.revived
    ]
    removed = sum(int(rows.removed.sum()) for one in found.values() for rows in one.rows if rows)
    result.row("masks", revived, f"all {removed:,} removed weights are zero in the files")
    problems, said = [], []
    for number, stage in enumerate(stages):
        wrong, right = counts.check(stage, number, found, where)
        problems += [f"{stage.name}: {problem}" for problem in wrong]
        said.append(f"{stage.name}: {right}")
    result.row("count", problems, "; ".join(said))


def _check_values(
    result: Verification, found: Mapping[str, Measured], stages: list[Stage], trained: Collection[str]
) -> None:
    decided = {name for stage in stages for name in stage.valued}
    if decided:
        problems = [
            f"{name}: its values are not those that the plan decided on"
            for name in sorted(decided - set(trained))
            if name not in found or found[name].foreign
        ]
        fine = f"{len(decided - set(trained))} tensors hold the new values of their plans"
        result.row("values", problems, fine)


def _check_source(
    result: Verification,
    reader: CheckpointReader,
    source: CheckpointReader,
    found: Mapping[str, Measured],
    exempt: Collection[str],
    parts: Collection[str],
) -> None:
    new = [name for name in reader.tensors if name not in source.tensors]
    problems = [f"{name}: not in the source" for name in new if name not in parts]
    for name, info in source.tensors.items():
        other = reader.tensors.get(name)
        if factored.part_names(name)["left"] in parts:
            continue  # it became a product
        if other is None:
            problems.append(f"{name}: missing, the source has it")
        elif (other.shape, other.dtype) != (info.shape, info.dtype):
            seen, expected = f"{other.dtype} {list(other.shape)}", f"{info.dtype} {list(info.shape)}"
            problems.append(f"{name}: {seen}, the source has {expected}")
        elif found[name].changed and name not in exempt:
            problems.append(f"{name}: {found[name].changed} kept weights differ from the source")
    fine = f"every weight that was not removed is bit-equal to the source in {len(found)} tensors"
    if exempt:
        fine += f", but for {len(exempt)} whose values were changed on purpose"
    result.row("source", problems, fine)


def _check_side_files(result: Verification, folder: Path, source: Path) -> None:
    problems = []
    names = side_files(source)
    for name in names:
        if not (folder / name).is_file():
            problems.append(f"{name}: missing, the source has it")
        elif (folder / name).read_bytes() != (source / name).read_bytes() and not (
            name == "config.json" and _same_but_for_products(folder / name, source / name)
        ):
            problems.append(f"{name}: differs from the source's")
    result.row("side files", problems, f"{len(names)} files are byte-equal to the source's")


def _same_but_for_products(ours: Path, source: Path) -> bool:
    """Tell whether a config.json only adds what plain transformers must know of factored linears."""
    found, before = (read_json(path, limit_bytes=MAX_CONFIG_BYTES) for path in (ours, source))
    seen = plain(found)
    return seen.pop(factored.CONFIG_KEY, None) is not None and seen == before


def _check_reload(
    result: Verification, model: StreamedModel, *, stream: bool, trusted: bool, reference: Model | None
) -> None:
    ids = fresh.probe(model.config)
    if stream:
        ours = logits(model, {"input_ids": ids})
    else:
        with model.resident(""):
            ours = logits(model.skeleton, {"input_ids": ids})
    result.loads_in.append(loader())
    # An accelerator rounds differently from the processor that the folder is run on here.
    if reference is not None and reference.device.type == "cpu":
        same, said = fresh.difference(logits(reference, {"input_ids": ids}).cpu(), ours)
        result.row("logits", [] if same else [f"this run's model: {said}"], f"this run's model: {said}")
    dtype = str(model.dtype).removeprefix("torch.")
    # The modelling file that we wrote ourselves may run in a process that knows nothing else of us.
    products = factored.CONFIG_KEY in model.reader.config
    (child,) = fresh.reload([fresh.Job(model.reader.folder, ids, dtype, trusted or products)], stream=stream)
    if child.logits is None:
        result.row("reload", [f"a fresh process could not open the folder: {child.error}"], "")
        return
    same, said = fresh.difference(child.logits, ours)
    problems = [] if same else [f"{child.loader} in a fresh process: {said}"]
    problems += [f"{name}: {child.loader} does not find it" for name in child.missing]
    if child.same_with_cache is False:
        problems.append(f"{child.loader}: other tokens are generated with a cache than without")
    fine = f"{child.loader} in a fresh process: {said} on {ids.numel()} tokens"
    if result.row(
        "reload", problems, fine + (", the same tokens with a cache" if child.same_with_cache else "")
    ):
        result.loads_in.append(child.loader)
