"""What the files of a folder hold, all of it: every tensor is read once, with its masks and its source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from structprune.machine import give_back_memory
from structprune.models.streamed import StreamedModel
from structprune.progress import Progress
from structprune.proof import against, counts
from structprune.proof.measure import Inputs, Measured, Place, Rows, measure, places, rows_of
from structprune.proof.stage import Shapes, Stage
from structprune.storage.reader import StoredTensors
from structprune.storage.tensor_file import hash_of


@dataclass(frozen=True)
class Held:
    """What was measured of a folder.

    Attributes:
        stages: Its plans, in order.
        found: What every tensor of its files holds.
        where: Where the linears stand.
        rows: Per stage what its masks remove, by stored tensor, also of those that the files no longer hold.
        hashes: sha256 of every tensor's bytes; empty where nothing is known that they could be compared with.
        removed: Per stage how many of its units it removed; None where the source would have to tell.
    """

    stages: Sequence[Stage]
    found: Mapping[str, Measured]
    where: Mapping[str, Place]
    rows: Sequence[Mapping[str, Rows]]
    hashes: Mapping[str, str]
    removed: Sequence[int | None]


def measure_files(
    model: StreamedModel,
    stages: list[Stage],
    source: StoredTensors | None,
    progress: Progress,
    traced: Sequence[Shapes | None],
    *,
    hashed: bool,
) -> Held:
    """Measure every tensor in the order of the files; one is in memory, with its masks and its source.

    Args:
        model: The folder's model.
        stages: Its plans, in order.
        source: What it was made from.
        progress: Told after every tensor.
        traced: What `trace` returned of the shapes.
        hashed: Whether the bytes are to be hashed, too.
    """
    reader = model.reader
    where = places(model)
    promised = {of for stage in stages for _, of in stage.patterns}
    # M -> whether masks are counted in such groups too; the common ones are looked for in the weights alone.
    groups = {of: of in promised for of in {*counts.COMMON, *promised}}
    found: dict[str, Measured] = {}
    hashes: dict[str, str] = {}
    rows: list[dict[str, Rows]] = [{} for _ in stages]
    sources = against.Before(source, stages)
    for name in (name for names in reader.shards.values() for name in names):
        tensor = reader.read(name)
        masks = [_mask_now(stages, number, name) for number in range(len(stages))]
        before = sources.read(name)
        if before is not None and (before.shape, before.dtype) != (tensor.shape, tensor.dtype):
            before = None
        place = where.get(name)
        counted = any(name in stage.prunable for stage in stages)
        inputs = _inputs(place.transposed if place else any(name in stage.transposed for stage in stages))
        found[name] = measure(tensor, inputs if place or counted else None, masks, before, groups)
        if hashed:
            hashes[name] = hash_of(tensor, name)
        for number, one in enumerate(found[name].rows):
            if one is not None:
                rows[number][name] = one
        # A later mask or cut changes the bytes: such a value has no hash to be held to, and is not counted.
        touching = [one for one in stages if name in {*one.written, *one.masked, *one.reshaped}]
        if touching and name in touching[-1].written:
            found[name].foreign = not touching[-1].holds(name, tensor)
        # Before the next one is read: the two largest are often neighbours in the file.
        del tensor, masks, before
        give_back_memory()
        progress("verify", len(found), len(reader.tensors))
    # What a later stage took away, cut or decided on anew is counted in the stage's own mask.
    for number, stage in enumerate(stages):
        changed = {name for one in stages[number + 1 :] for name in one.reshaped | one.redecided}
        for name in stage.masked:
            if name not in found or name in changed:
                rows[number][name] = rows_of(stage.mask(name), _inputs(name in stage.transposed), groups)
    return Held(stages, found, where, rows, hashes, counts.removed(stages, rows, traced))


def _mask_now(stages: Sequence[Stage], number: int, name: str) -> Tensor | None:
    """Return what a stage keeps of a tensor, in the shape that the stages after it leave of it.

    None where it keeps all, or a later one decides on its weights anew.
    """
    since = stages[number + 1 :]
    if name not in stages[number].masked or any(name in later.redecided for later in since):
        return None
    mask = stages[number].mask(name)
    for later in since:
        mask = later.cut(name, mask)
    return mask


def _inputs(transposed: bool) -> Inputs:
    return "first" if transposed else "last"
