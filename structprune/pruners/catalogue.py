"""Which methods there are: one file each, in the folders of the families; listed without importing any."""

import ast
import importlib
import inspect
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structprune import pruners
from structprune.errors import MethodError, UsageError, nearest

if TYPE_CHECKING:
    from structprune.pruners.pruner import Pruner

# Of one's own, besides the path of `structprune.pruners`; several with a colon between.
FOLDERS = "STRUCTPRUNE_METHODS"


def names() -> dict[str, str]:
    """Return every method's name with its family, from the folders on the path of `structprune.pruners`."""
    return {name: paths[0].parent.name for name, paths in _files().items()}


def check_name(name: str) -> Path:
    """Check that there is such a method, and return its file.

    Raises:
        UsageError: There is none; the nearest name is given, and where methods are looked for. Or two files
            claim the name, and a recipe could mean either.
    """
    if name not in (known := _files()):
        # Whoever added a file to a copy that is not the one that runs sees it here.
        places = " and ".join(f"{root}/*/" for root in _roots())
        said = f"method {name!r} does not exist: no file of that name in {places}"
        own = f"one of your own: {FOLDERS}=FOLDER, which holds it as FOLDER/weight/{name}.py"
        raise UsageError(said, hint=f"{nearest(name, known)}; {own}")
    path, *others = known[name]
    if others:
        raise UsageError(
            f"two files are called {name!r}: {path} and {others[0]}",
            hint="rename one of them: a file's name is the method's name",
        )
    return path


def check_lasting(pruner: "type[Pruner]") -> None:
    """Check that whoever opens a folder finds the method that is to work on it while the model runs.

    Args:
        pruner: Any method; of others the folder holds all that is left of them.

    Raises:
        UsageError: Its file lies where only this process looks for methods.
    """
    home, files = Path(__file__).parent, _files().get(pruner.method(), [])
    path = next((one for one in files if one.samefile(inspect.getfile(pruner))), None)
    if pruner.at_run_time and path is not None and home not in path.parents:
        raise UsageError(
            f"{path}: {pruner.method()} works while a model runs, and whoever opens the folder is sure "
            f"to find methods in {home}/*/ only",
            hint=f"put the file into {home}/{path.parent.name}/, or try it in memory: structprune.pruning",
        )


def docstring(name: str) -> str:
    """Return the docstring of a method's file: what it is in one sentence, and a line "Source:".

    Raises:
        UsageError: No such method.
        MethodError: The file is no Python.
    """
    path = check_name(name)
    try:
        return inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"), path)) or "")
    except SyntaxError as error:
        raise _unusable(path, error) from error


def find(name: str) -> "type[Pruner]":
    """Return the pruner class of a method; imports its file, and with it torch and transformers.

    Args:
        name: The method's name, which is its file's: "wanda".

    Raises:
        UsageError: No such method; the nearest name is given.
        MethodError: Its file cannot be imported, or its class lacks a method of its own.
    """
    path = check_name(name)
    family = importlib.import_module(f"{pruners.__name__}.{path.parent.name}")
    if (folder := str(path.parent)) not in family.__path__:
        family.__path__.append(folder)  # a folder elsewhere that adds a method to a family known already
    try:
        module = importlib.import_module(f"{family.__name__}.{name}")
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError) as error:
        raise _unusable(path, error) from error
    found: list[Any] = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if hasattr(value, "calibrate") and value.__module__ == module.__name__
    ]
    if not found:
        raise MethodError(
            f"{path}: holds no method", hint="derive a class from one of its family, such as ScorePruner"
        )
    # A file may hold what its method derives from.
    only: type[Pruner] = next((one for one in found if not inspect.isabstract(one)), found[0])
    if missing := sorted(getattr(only, "__abstractmethods__", ())):
        raise MethodError(
            f"{path}: {only.__name__} lacks {' and '.join(f'{one}()' for one in missing)}",
            hint="write it: structprune/README.md has an example of every family",
        )
    return only


def place_of(error: BaseException) -> str | None:
    """Return in which method's file an error arose, and in which line; None where it is in none.

    Args:
        error: With its traceback: the last line of a method counts, whatever it called.
    """
    known = {path.resolve(): (name, path) for name, paths in _files().items() for path in paths}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if (found := known.get(Path(frame.filename).resolve())) is not None:
            name, path = found
            return f"{name}, {path}:{frame.lineno}"
    return None


def _unusable(path: Path, error: Exception) -> MethodError:
    """Return the refusal of a file that raised an error when it was read or imported."""
    line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    where = place_of(error) or f"{path.stem}, {path}{line}"
    return MethodError(f"{where}: {type(error).__name__}: {said}", hint="mend the method's file")


def _roots() -> list[Path]:
    """Return the folders that hold the families."""
    # A cell of a notebook that is run twice adds its folder twice.
    return list(dict.fromkeys(map(Path, [*pruners.__path__, *_named_roots()])))


def _named_roots() -> list[str]:
    """Return the folders of one's own that the environment names, for the command line."""
    return [one for one in os.environ.get(FOLDERS, "").split(os.pathsep) if one]


def _files() -> dict[str, list[Path]]:
    """Return the files of every method by its name; files that begin with an underscore are no methods."""
    found: dict[str, list[Path]] = {}
    for path in sorted((file for root in _roots() for file in root.glob("*/*.py")), key=str):
        if not path.stem.startswith("_"):
            found.setdefault(path.stem, []).append(path)
    return dict(sorted(found.items()))
