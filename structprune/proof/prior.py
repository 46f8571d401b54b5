"""What a model has lost before a run looks at it: zeros, their pattern, and who made them."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from structprune.checkpoint.manifest import read_manifest
from structprune.errors import InputError
from structprune.machine import give_back_memory
from structprune.models.opening import Opening
from structprune.models.streamed import Model
from structprune.proof import counts
from structprune.proof.measure import Inputs, Measured, measure, places
from structprune.storage.reader import CheckpointReader

logger = logging.getLogger(__name__)

# Trained weights are hardly ever exactly zero; below a hundredth nobody pruned, something died in training.
NOTICED = 0.01


@dataclass(frozen=True)
class Prior:
    """What is missing from the linears of a model's decoder blocks.

    Attributes:
        zeros: Their weights that are zero.
        of: All their weights.
        pattern: "N:M" where every linear that has lost something holds it, "unstructured", or "dense".
        method: What pruned it, where structprune did; None where its folder does not say so.
    """

    zeros: int
    of: int
    pattern: str
    method: str | None

    @property
    def sparsity(self) -> float:
        """Return zeros / weights."""
        return self.zeros / self.of if self.of else 0.0

    @property
    def pruned(self) -> bool:
        """Tell whether the model is pruned already."""
        return self.method is not None or self.sparsity >= NOTICED

    def __str__(self) -> str:
        """Return what was found, as the end of a sentence about the model."""
        if not self.zeros and self.method:
            return f"by structprune with {self.method}; no weight of its linears is zero"
        lost = f"{self.sparsity * 100:.4g}% of the weights of its linears are zero"
        shape = "" if self.pattern == "dense" else f" ({self.pattern})"
        return lost + shape + (f", by structprune with {self.method}" if self.method else "")

    def as_json(self) -> dict[str, Any]:
        """Return what reports say of it."""
        return asdict(self) | {"sparsity": self.sparsity, "pruned": self.pruned}


def prior_of(model: Model, reader: CheckpointReader, zeros: Mapping[str, int], opening: Opening) -> Prior:
    """Return what a model has lost; only of one that is pruned are weights read again, for their pattern.

    Args:
        model: For its names and shapes.
        reader: Its files.
        zeros: Of every stored tensor, as a scan counted them.
        opening: How it was opened.

    Raises:
        InputError: The folder's own manifest is damaged.
        EnvironmentFailure: A file cannot be read.
    """
    where = places(model)
    sizes = {name: prod(reader.shapes[name]) for name in where}
    manifest = read_manifest(reader.folder, allow_external_symlinks=opening.allow_external_symlinks)
    method = str(manifest.facts.get("method")) if manifest is not None and manifest.stages else None
    lost = [name for name in where if zeros[name] >= NOTICED * sizes[name]]
    share = sum(zeros[name] for name in where) / max(sum(sizes.values()), 1)
    measured: list[Measured] = []
    for name in lost if share >= NOTICED else ():
        inputs: Inputs = "first" if where[name].transposed else "last"
        measured.append(measure(reader.read(name), inputs, [], None, dict.fromkeys(counts.COMMON, False)))
        give_back_memory()
    pattern = counts.pattern(measured, ()) if measured else "dense"
    return Prior(sum(zeros[name] for name in where), sum(sizes.values()), pattern, method)


def tell_prior(prior: Prior, folder: Path, opening: Opening) -> None:
    """Say that a model is pruned already, or refuse it where the user forbids that.

    Raises:
        InputError: It is, and `opening.from_dense` is set.
    """
    if not prior.pruned:
        return
    said = f"{folder}: is pruned already: {prior}"
    if opening.from_dense:
        raise InputError(said, hint="give the dense model that it was made from")
    logger.warning("%s; what is asked for counts them", said)
