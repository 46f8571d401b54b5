"""Where the files of a recipe were when it ran, so that a saved recipe runs again from any folder.

A saved recipe is verbatim, with paths relative to the folder that the run was started in. Beside it stands
run.json: each path that led to something on this disk, as it is written and as it is from everywhere.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from structprune.calibration.text_source import DEMOS
from structprune.errors import UsageError
from structprune.storage.strict_json import read_json

RUN_FILE = "run.json"
_LIMIT = 2**20
# Keys that name a file or a folder; all else, such as names on a hub, is the same everywhere.
_KEYS = (
    ("model",),
    ("plan",),
    ("tokenizer",),
    ("calibration", "source"),
    ("recover", "data"),
    ("recover", "teacher"),
    ("evaluate", "compare"),
    ("evaluate", "include_path"),
    ("evaluate", "text"),
    ("evaluate", "questions"),
)


def places_text(raw: Mapping[str, Any], command: str = "prune") -> str:
    """Return what run.json holds for a recipe with these keys, of this command."""
    places = {
        ".".join(keys): {text: os.path.realpath(Path(text).expanduser()) for text in texts}
        for keys in _KEYS
        if (texts := [text for text in _texts(raw, keys) if _is_here(text)])
    }
    return json.dumps({"command": command, "places": places}, indent=1, sort_keys=True) + "\n"


def with_places(raw: Mapping[str, Any], recipe: Path) -> dict[str, Any]:
    """Return the keys of a saved recipe with its paths as they are from everywhere.

    Args:
        raw: The keys as they are written.
        recipe: The recipe's file; one with no run.json beside it stays as it is.

    Raises:
        UsageError: run.json is damaged.
    """
    file = recipe.with_name(RUN_FILE)
    if not file.is_file():
        return dict(raw)
    said = read_json(file, limit_bytes=_LIMIT)
    places = said.get("places") if isinstance(said, dict) else None
    if not isinstance(places, dict) or not all(isinstance(one, dict) for one in places.values()):
        raise UsageError(
            f"{file}: expected the places of a recipe's files", hint="remove it: paths are relative then"
        )
    found = copy.deepcopy(dict(raw))
    for keys in _KEYS:
        known = places.get(".".join(keys), {})
        group: Any = found
        for key in keys[:-1]:
            group = group.get(key) if isinstance(group, dict) else None
        if isinstance(group, dict) and keys[-1] in group:
            group[keys[-1]] = _placed(group[keys[-1]], known)
    return found


def _placed(value: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_placed(one, known) for one in value]
    place = known.get(value) if isinstance(value, str) else None
    return place if isinstance(place, str) else value


def _texts(raw: Any, keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    if isinstance(raw, list | tuple):
        yield from (str(one) for one in raw)
    elif raw is not None:
        yield str(raw)


def _is_here(text: str) -> bool:
    return text not in DEMOS and os.path.lexists(Path(text).expanduser())
