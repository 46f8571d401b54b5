"""How fast a model is and how much room it takes, beside the dense model in the same rounds."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from structprune.checkpoint.adapter import is_adapter
from structprune.checkpoint.integrity import check_weights, intact_manifest
from structprune.checkpoint.locate import check_name, resolve
from structprune.checkpoint.source import Source, open_adapted
from structprune.errors import UsageError
from structprune.evaluation.footprint import HOW, Subject, check_room, file_bytes, peak_memory
from structprune.evaluation.protocol import dtype_of, stamped_versions
from structprune.evaluation.speed import Pass, Spread, Workload, timed_rounds, workload_of
from structprune.machine import machine
from structprune.models.cost import parameters_of
from structprune.models.opening import Opening
from structprune.models.streamed import StreamedModel, open_skeleton
from structprune.progress import Progress, silent
from structprune.proof.prior import prior_of
from structprune.recipe.options import BenchOptions
from structprune.storage.reader import CheckpointReader

logger = logging.getLogger(__name__)

SAME = "Both are the same folder: what differs is the noise of the measurement"
# What of a pass is a rate, and of how many tokens: each is given the workload and the batch.
RATES: dict[str, Callable[[Pass, Workload, int], float]] = {
    "prefill_tokens_per_second": lambda one, load, batch: batch * load.length / one.prefill,
    "decode_tokens_per_second": lambda one, load, batch: batch * (load.new - 1) / one.decode,
}


@dataclass(frozen=True)
class Contender:
    """A model that is measured.

    Attributes:
        name: What the user called it.
        subject: How its folder is opened.
        base: The folder of its weights: that of its base, where it is an adapter.
        skeleton: Its modules without weights.
        pruned: Whether something was removed from it.
    """

    name: str
    subject: Subject
    base: Path
    skeleton: StreamedModel
    pruned: bool

    def as_json(self) -> dict[str, Any]:
        """Return what a result says of it."""
        return {
            "name": self.name,
            "pruned": self.pruned,
            "dtype": dtype_of(self.skeleton),
            "parameters": parameters_of(self.skeleton.skeleton),
            "file_bytes": file_bytes(self.subject.folder, self.base),
        }


def bench(
    model: str,
    options: BenchOptions | None = None,
    *,
    compare: str | None = None,
    opening: Opening = Opening(),
    revision: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure the speed, the memory and the bytes of a model, and of a dense one in the same rounds.

    Args:
        model: "demo", a folder, a hub name, or a kept adapter's folder.
        options: What is run, and how often.
        compare: The dense model.
        opening: How both are opened; always in memory.
        revision: Branch, tag or commit of a hub model.
        progress: Told (stage, done, total).

    Returns:
        "models": facts of "model" and "compared" (None where nothing was compared); "batches": per batch each
        figure of both, rates and seconds as "median", "low" and "high" of the rounds, "speedup" of the same
        round; "protocol"; "flags": sentences about the figures.

    Raises:
        UsageError: A size is impossible, the models differ in dtype, or a model is to be streamed.
        InputError: A folder is damaged.
        EnvironmentFailure: A model or a batch does not fit the memory.
    """
    if opening.stream:
        raise UsageError("bench: a model is timed in memory, not streamed", hint="leave --stream out")
    opening = replace(opening, stream=False)
    names = [check_name(model), *([] if compare is None else [check_name(compare)])]
    folders = [resolve(names[0], revision=revision), *(resolve(one) for one in names[1:])]
    found = [contender(name, folder, opening) for name, folder in zip(names, folders, strict=True)]
    load = workload_of(options or BenchOptions(), [one.skeleton.config for one in found])
    return measure_speed(found, load, progress)


def contender(name: str, folder: Path, opening: Opening) -> Contender:
    """Return a model folder to be measured, after every check of its files; no weight is held.

    Args:
        name: What the user called it.
        folder: Where it is.
        opening: How.
    """
    base = folder
    if is_adapter(folder):
        base = open_adapted(name, folder, opening).folder
    manifest = intact_manifest(base, opening)
    opened = open_skeleton(base, opening)
    assert isinstance(opened.reader, CheckpointReader)
    scan = opened.reader.scan(opened.names.ignored)
    check_weights(manifest, opened.reader, scan.hashes)
    resolved = replace(opening.resolve(base, opened.reader.nbytes), stream=False)
    prior = prior_of(opened, opened.reader, scan.zeros, opening)
    return Contender(name, Subject(folder, resolved), base, opened, prior.pruned)


def written_contenders(work: Path, output: Path, dense: Source) -> list[Contender]:
    """Return what a run has written and what it is compared with, both checked by the run already.

    Args:
        work: Where the run has written.
        output: What the folder will be called.
        dense: What to compare with.
    """
    opening = replace(dense.opening, stream=False)
    prior = dense.prior or prior_of(dense.model, dense.reader, dense.scan.zeros, opening).as_json()
    pairs = [(str(output), work, True), (dense.name, dense.folder, bool(prior["pruned"]))]
    return [
        Contender(name, Subject(folder, opening), folder, open_skeleton(folder, opening), pruned)
        for name, folder, pruned in pairs
    ]


def measure_speed(found: Sequence[Contender], load: Workload, progress: Progress = silent) -> dict[str, Any]:
    """Measure a model, and the one that it is compared with where there is one; errors are those of `bench`.

    Args:
        found: The model, and what it is compared with.
        load: What they run.
        progress: Told (stage, done, total).
    """
    device = found[0].subject.opening.device
    dtypes = [dtype_of(one.skeleton) for one in found]
    if len(set(dtypes)) > 1:
        raise UsageError(
            f"the model computes in {dtypes[0]}, the one it is compared with in {dtypes[1]}",
            hint="open both with the same --dtype",
        )
    check_room([one.skeleton.skeleton for one in found], load, device)
    passes, peaks = _measured(found, load, progress)
    same = len({one.subject.folder.resolve() for one in found}) < len(found)
    if same:
        logger.warning("%s", SAME)
    facts = [one.as_json() for one in found]
    here = machine()
    return {
        "models": {"model": facts[0], "compared": facts[1] if len(facts) > 1 else None},
        "batches": [
            _figures(rounds, load, batch) | {"peak_memory_bytes": _pair([one[place] for one in peaks])}
            for place, (batch, rounds) in enumerate(passes.items())
        ],
        "protocol": {
            "length": load.length,
            "new": load.new,
            "cached_tokens": load.cached,
            "repeats": load.repeats,
            "device": device,
            "dtype": dtypes[0],
            "threads": here["threads"],
            "processor": here["processor"],
            "accelerators": here["accelerators"],
            "peak_memory": HOW.get(device.partition(":")[0], "not measured on this device"),
            "versions": stamped_versions(),
        },
        "flags": [SAME] if same else [],
    }


def _measured(
    found: Sequence[Contender], load: Workload, progress: Progress
) -> tuple[dict[int, list[list[Pass]]], list[list[int | None]]]:
    """Return the passes of each batch, and each model's peak of memory for each batch."""
    models = [one.subject.open() for one in found]
    passes = {}
    for batch in load.batches:
        tell = partial(_tell, progress, f"time a batch of {batch}", load.repeats)
        tell(0)
        passes[batch] = timed_rounds(models, load, batch, tell)
    peaks: list[list[int | None]] = []
    on_cpu = found[0].subject.opening.device == "cpu"
    if on_cpu:
        models.clear()  # a fresh process holds its own
    for number, one in enumerate(found):
        progress("measure memory", number, len(found))
        peaks.append(peak_memory(one.subject, None if on_cpu else models[number], load))
    progress("measure memory", len(found), len(found))
    return passes, peaks


def _tell(progress: Progress, stage: str, of: int, done: int) -> None:
    progress(stage, done, of)


def _figures(rounds: Sequence[Sequence[Pass]], load: Workload, batch: int) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": batch}
    for name, rate in RATES.items():
        values = [[rate(one, load, batch) for one in row] for row in rounds]
        found[name] = _spreads(values, [row[0] / row[-1] for row in values])
    seconds = [[one.first for one in row] for row in rounds]
    found["first_token_seconds"] = _spreads(seconds, [row[-1] / row[0] for row in seconds])
    return found | {"kv_bytes": _pair([one.kv_bytes for one in rounds[-1]])}


def _spreads(values: Sequence[Sequence[float]], speedups: Sequence[float]) -> dict[str, Any]:
    columns = [asdict(Spread.of(column)) for column in zip(*values, strict=True)]
    return _pair(columns) | {"speedup": asdict(Spread.of(speedups)) if len(columns) > 1 else None}


def _pair(values: Sequence[Any]) -> dict[str, Any]:
    return {"model": values[0], "compared": values[1] if len(values) > 1 else None}
