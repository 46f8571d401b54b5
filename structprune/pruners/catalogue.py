"""Which methods there are: one file each, in the folders of the families; listed without importing any."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structprune import pruners
from structprune.errors import UsageError, nearest

if TYPE_CHECKING:
    from structprune.pruners.pruner import Pruner


def names() -> dict[str, str]:
    """Return every method's name with its family, from the folders on the path of `structprune.pruners`.

    Raises:
        UsageError: Two files claim one name; a recipe could then mean either.
    """
    return {name: path.parent.name for name, path in _files().items()}


def check_name(name: str) -> None:
    """Check that there is such a method.

    Raises:
        UsageError: There is none; the nearest name is given, and where methods are looked for.
    """
    if name not in (known := _files()):
        # Whoever added a file to a copy that is not the one that runs sees it here.
        places = " and ".join(f"{root}/*/" for root in _roots())
        said = f"method {name!r} does not exist: no file of that name in {places}"
        raise UsageError(said, hint=nearest(name, known))


def docstring(name: str) -> str:
    """Return the docstring of a method's file: what it is in one sentence, and a line "Source:"."""
    check_name(name)
    text = _files()[name].read_text(encoding="utf-8")
    return inspect.cleandoc(ast.get_docstring(ast.parse(text)) or "")


def find(name: str) -> "type[Pruner]":
    """Return the pruner class of a method; imports its file, and with it torch and transformers.

    Args:
        name: The method's name, which is its file's: "wanda".

    Raises:
        UsageError: No such method; the nearest name is given.
    """
    check_name(name)
    path = _files()[name]
    family = importlib.import_module(f"{pruners.__name__}.{path.parent.name}")
    if (folder := str(path.parent)) not in family.__path__:
        family.__path__.append(folder)  # a folder elsewhere that adds a method to a family known already
    module = importlib.import_module(f"{family.__name__}.{name}")
    found: list[Any] = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if hasattr(value, "calibrate") and value.__module__ == module.__name__
    ]
    only: type[Pruner] = found[0]
    return only


def _roots() -> list[Path]:
    """Return the folders that hold the families."""
    # A cell of a notebook that is run twice adds its folder twice.
    return list(dict.fromkeys(map(Path, pruners.__path__)))


def _files() -> dict[str, Path]:
    """Return the file of every method by its name; files that begin with an underscore are no methods."""
    found: dict[str, Path] = {}
    for path in sorted((file for root in _roots() for file in root.glob("*/*.py")), key=str):
        if path.stem.startswith("_"):
            continue
        if path.stem in found:
            raise UsageError(
                f"two files are called {path.stem!r}: {found[path.stem]} and {path}",
                hint="rename one of them: a file's name is the method's name",
            )
        found[path.stem] = path
    return dict(sorted(found.items()))
