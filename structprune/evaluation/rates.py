"""How fast this machine multiplies, ranks, reads and sends: what an estimate of a run's time is made of.

Measured by `machine_rates` in a few seconds and kept in a file of the user's cache, where `--dry-run --ranks`
finds it. Whatever made the figures what they are stands beside them; figures of another machine, device,
number of threads or version of PyTorch are never used.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field, TypeAdapter, ValidationError

from structprune.errors import InputError
from structprune.machine import machine
from structprune.storage.durable import DurableFile, blame
from structprune.storage.strict_json import read_json

logger = logging.getLogger(__name__)

# Each machine, device and number of threads adds less than a kilobyte.
FILE_LIMIT = 1 << 20


# A file that says zero, or what is no number, would make every estimate one.
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Site:
    """Where figures were measured.

    Attributes:
        processor: Its name.
        device: "cpu", or the name of the accelerator.
        threads: Of PyTorch, in each process.
        ranks: Processes that measured at the same time.
        torch: Its version.
    """

    processor: str
    device: str
    threads: int
    ranks: int
    torch: str

    @classmethod
    def here(cls, device: str = "cpu", ranks: int = 1) -> Self:
        """Return where this process is.

        Args:
            device: A device of PyTorch.
            ranks: Processes that work side by side.
        """
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
        found, chosen = machine(), "OMP_NUM_THREADS" in os.environ
        # torchrun gives each of several processes one thread, unless it is told how many.
        threads = found["threads"] if ranks == 1 or chosen else 1
        return cls(found["processor"], name, threads, ranks, torch.__version__)


@dataclass(frozen=True)
class Rates:
    """What a process does in a second.

    Attributes:
        place: Where it was measured.
        flops: Operations of a product of matrices, by dtype.
        moved_bytes: Read from memory and written to it.
        read_bytes: Read from a file that is not in memory yet.
        squared: Numbers whose squares are summed.
        ranked: Numbers that are scored and ranked.
        sent_bytes: That pass one process on their way to or from others; None where there was only one.
    """

    place: Site
    flops: Mapping[str, Rate]
    moved_bytes: Rate
    read_bytes: Rate
    squared: Rate
    ranked: Rate
    sent_bytes: Rate | None


_FILE = TypeAdapter(list[Rates])


def rates_file() -> Path:
    """Return the file of this user's figures."""
    cache = os.environ.get("XDG_CACHE_HOME") or ""
    # As the XDG base directories want it: a relative path is passed over.
    home = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return home / "structprune" / "rates.json"


def save_rates(rates: Rates, path: Path) -> None:
    """Write figures into a file, in place of the last ones of the same place.

    Raises:
        EnvironmentFailure: It cannot be written.
    """
    kept = [one for one in read_rates(path) if one.place != rates.place]
    with blame(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(one) for one in [*kept, rates]], indent=1)
    with DurableFile(path) as file:
        file.write(f"{text}\n".encode())


def read_rates(path: Path) -> list[Rates]:
    """Return all figures of a file; none, and a warning, where it is not one of ours."""
    if not path.exists():
        return []
    try:
        return _FILE.validate_python(read_json(path, limit_bytes=FILE_LIMIT))
    except (InputError, ValidationError) as error:
        said = error.message if isinstance(error, InputError) else "not figures of this version"
        logger.warning("%s: %s; passed over", path, said)
        return []


def choose_rates(found: Sequence[Rates], place: Site) -> tuple[Rates | None, str]:
    """Return the figures that hold for a place, or None; and what is to be known of them, "" for nothing.

    Args:
        found: Those of a file.
        place: Where a run is to be. Figures of fewer processes serve where there are none of as many.
    """
    like = [one for one in found if {**asdict(one.place), "ranks": 0} == {**asdict(place), "ranks": 0}]
    near = max((one for one in like if one.place.ranks <= place.ranks), key=_ranks, default=None)
    if near is None and found:
        there, here = asdict(found[-1].place), asdict(place)
        differs = [f"{key} {there[key]}, not {here[key]}" for key in there if there[key] != here[key]]
        return None, f"those kept are of {'; '.join(differs)}"
    if near is None or near.place.ranks == place.ranks:
        return near, ""
    unsaid = ", without what they send each other" if near.sent_bytes is None else ""
    return near, f"measured by {near.place.ranks} of {place.ranks} processes{unsaid}"


def _ranks(rates: Rates) -> int:
    return rates.place.ranks
