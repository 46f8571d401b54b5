"""What a run reads, in one list: none of it may be lost to the output that the run writes or replaces."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from structprune.calibration.text_source import DEMOS
from structprune.checkpoint.adapter import CONFIG_FILE, CONFIG_LIMIT
from structprune.checkpoint.locate import demo_folder
from structprune.errors import InputError, UsageError
from structprune.storage.reference import read_reference
from structprune.storage.strict_json import read_json


@dataclass(frozen=True)
class Input:
    """A file or a folder that a run reads.

    Args:
        what: What it is to the run, as in "the calibration text".
        path: Where it is; a link is protected as well as what it leads to.
    """

    what: str
    path: Path

    def places(self) -> list[Path]:
        """Return the real paths whose loss would be the loss of the input: of links also where they lead."""
        places = [
            Path(os.path.realpath(self.path)),
            Path(os.path.realpath(self.path.parent)) / self.path.name,
        ]
        with suppress(OSError), os.scandir(self.path) as entries:
            places += [Path(os.path.realpath(entry.path)) for entry in entries if entry.is_symlink()]
        return places


def local_inputs(what: str, source: str | Path | None) -> list[Input]:
    """Return the input that a word on the command line names; none where that is no path that exists here.

    Built-in things ("demo"), names on a hub and the like are nobody's files. An adapter's base is one more,
    and so is the folder of the weights that a model refers to.
    """
    if source is None or str(source) in DEMOS:
        return []
    path = Path(source).expanduser()
    return [Input(what, path), *_base_of(what, path)] if os.path.lexists(path) else []


def refuse_overlap(inputs: Iterable[Input], final: Path, output: Path) -> None:
    """Check that writing or replacing a folder can harm no input.

    Args:
        inputs: What the run reads.
        final: A folder that is written, replaced or removed; its real path.
        output: The output as it was asked for.

    Raises:
        UsageError: An input is the folder, lies inside it or holds it.
    """
    for one in (*inputs, *_always()):
        for number, place in enumerate(one.places()):
            if _is_same(final, place):
                relation = f"is {one.what} itself"
            elif number == 0 and _is_inside(final, place):
                relation = f"lies inside {one.what} {one.path}"
            elif _is_inside(place, final):
                relation = f"holds {one.what} {one.path}"
            else:
                continue
            raise UsageError(
                f"{output}: the output {relation}, which is never written to",
                hint="choose an output beside it",
            )


def _always() -> list[Input]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return [
        *(Input("the built-in model", demo_folder(name)) for name in DEMOS),
        Input("the folder of downloaded models", Path(HF_HUB_CACHE)),
    ]


def _base_of(what: str, path: Path) -> list[Input]:
    """Return where the weights of an adapter's base are, or those that a folder refers to."""
    base: object = None
    with suppress(InputError):  # told by whoever opens it
        if reference := read_reference(path):
            base = reference.folder
        elif os.path.lexists(path / CONFIG_FILE):
            said = read_json(path / CONFIG_FILE, limit_bytes=CONFIG_LIMIT)
            base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    return (
        [Input(f"the base of {what}", Path(base))] if isinstance(base, str) and os.path.lexists(base) else []
    )


def _is_inside(inner: Path, outer: Path) -> bool:
    """Tell whether a real path lies in a folder, also where the disk spells its name in several ways."""
    return any(_is_same(one, outer) for one in inner.parents)


def _is_same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    with suppress(OSError):  # What is not there, or may not be looked at, is no file of this user's.
        return one.samefile(other)
    return False
