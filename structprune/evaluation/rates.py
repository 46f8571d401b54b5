"""How fast this machine multiplies, ranks, reads and sends: what an estimate of a run's time is made of.

Measured by `measuring` in a few seconds and kept in a file of the user's cache, where `--dry-run --ranks`
finds it. Whatever made the figures what they are stands beside them; figures of another machine, device,
number of threads or version of PyTorch are never used.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import torch

from structprune.errors import InputError
from structprune.machine import machine
from structprune.storage.durable import DurableFile, blame
from structprune.storage.strict_json import read_json

logger = logging.getLogger(__name__)

# Each machine, device and number of threads adds less than a kilobyte.
FILE_LIMIT = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where figures were measured.

    Attributes:
        processor: Its name.
        device: "cpu", or the name of the accelerator.
        threads: Of PyTorch.
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
        found = machine()
        return cls(found["processor"], name, found["threads"], ranks, torch.__version__)


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
        sent_bytes: Sent from process to process, of all together; None where there was only one.
    """

    place: Place
    flops: Mapping[str, float] = field(default_factory=dict)
    moved_bytes: float = 0.0
    read_bytes: float = 0.0
    squared: float = 0.0
    ranked: float = 0.0
    sent_bytes: float | None = None


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
    text = json.dumps({"rates": [asdict(one) for one in [*kept, rates]]}, indent=1)
    with DurableFile(path) as file:
        file.write(f"{text}\n".encode())


def read_rates(path: Path) -> list[Rates]:
    """Return all figures of a file; none, and a warning, where it is not one of ours."""
    if not path.exists():
        return []
    try:
        return [
            Rates(**{**one, "place": Place(**one["place"])})
            for one in read_json(path, limit_bytes=FILE_LIMIT)["rates"]
        ]
    except (InputError, LookupError, TypeError) as error:
        logger.warning("%s: not figures of this version, passed over: %s", path, error)
        return []


def choose_rates(found: Sequence[Rates], place: Place) -> tuple[Rates | None, str]:
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
    return near, f"measured by {near.place.ranks} of {place.ranks} processes"


def _ranks(rates: Rates) -> int:
    return rates.place.ranks
