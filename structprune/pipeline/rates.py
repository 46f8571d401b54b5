"""Measure what this machine does in a second, and keep it for estimates of how long a run takes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from structprune.checkpoint.locate import check_name, resolve
from structprune.evaluation.machine_rates import measure_rates
from structprune.evaluation.rates import rates_file, save_rates
from structprune.models.cost import weight_files
from structprune.models.opening import Opening
from structprune.ranks import joined_ranks


def bench_rates(
    model: str | None = None, *, opening: Opening = Opening(), revision: str | None = None
) -> dict[str, Any]:
    """Measure this machine's rates and keep them where `dry_run` finds them; it takes some seconds.

    Args:
        model: Whose files are read; unless given, a file in the temporary folder.
        opening: On which device.
        revision: Branch, tag or commit of a hub model.

    Returns:
        "rates": what a process does in a second, and where that was measured; "file": where it is kept. Of
        several processes that a launcher started the first one's, and empty for the others.

    Raises:
        InputError: The folder is none of a model.
        EnvironmentFailure: The device is not there, or the disk is full.
    """
    file = None
    if model is not None:
        file = max(weight_files(resolve(check_name(model), revision=revision)), key=_size)
    device = opening.place()
    with joined_ranks() as ranks:
        rates = measure_rates(device, ranks, file)
        if not ranks.first:
            return {}
    kept = rates_file()
    save_rates(rates, kept)
    return {"rates": asdict(rates), "file": str(kept)}


def _size(file: Path) -> int:
    return file.stat().st_size
