"""The notebooks: what they store is whole and clean, and a fresh kernel shows the same again."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Bytes of the whole folder: pictures in outputs soon weigh more than a repository.
LARGEST = 1_500_000
SHOWS = {"print", "display", "plt.show"}
# At least two names deep, and neither part of a relative path nor of an address.
ABSOLUTE = re.compile(r"(?<![\w:/.)-])/\w[\w.-]*/\w")
PROGRESS = re.compile(r"it/s|\d%\||\r")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
NUMBER = re.compile(r"(\d+\.\d+|\d+)")
# Of a measured figure, for another processor's rounding; or so many units of the last digit printed.
SHARE, UNITS = 0.1, 2
TIMING = "timing"  # the tag of a cell whose figures are of the machine and the moment

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures_of(cell: Any) -> list[list[str]]:
    return [sorted(output.data) for output in cell.outputs if "data" in output]


def calls(nodes: list[ast.stmt]) -> set[str]:
    """Return what statements call, functions that they only define left out."""
    run = [node for node in nodes if not isinstance(node, ast.FunctionDef)]
    found = (node for one in run for node in ast.walk(one) if isinstance(node, ast.Call))
    return {ast.unparse(node.func) for node in found}


def silent_cells(notebook: Any) -> Iterator[str]:
    """Yield the cells that call what shows something, and have no output."""
    shows = set(SHOWS)
    for cell in cells(notebook):
        if cell.source.startswith("%%"):
            continue
        body = ast.parse(cell.source).body
        shows |= {
            node.name for node in body if isinstance(node, ast.FunctionDef) and calls(node.body) & shows
        }
        if calls(body) & shows and not cell.outputs:
            yield cell.source


def differences(stored: str, found: str, *, timing: bool = False) -> list[str]:
    """Return where two texts differ: words and whole numbers to the letter, measured figures more than a bit.

    Args:
        stored: What a cell had shown.
        found: What it shows now.
        timing: Whether its figures are left alone.
    """
    one, other = (NUMBER.split(text) for text in (stored, found))
    words = [[" ".join(word.split()) for word in text[::2]] for text in (one, other)]
    if words[0] != words[1]:
        return [f"{stored!r} became {found!r}"]
    pairs = zip(one[1::2], other[1::2], strict=True)
    return [] if timing else [f"{was} became {now}" for was, now in pairs if not alike(was, now)]


def alike(was: str, now: str) -> bool:
    if "." not in was or "." not in now:
        return was == now
    unit = 10.0 ** -len(was.partition(".")[2])
    return abs(float(was) - float(now)) <= max(SHARE * float(was), UNITS * unit) * (1 + 1e-9)


def test_there_are_notebooks_and_they_stay_small() -> None:
    assert len(NOTEBOOKS) == 4
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < LARGEST


@every_notebook
def test_it_is_valid_and_its_cells_were_run_in_order_from_a_fresh_kernel(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in cells(notebook)] == [*range(1, len(cells(notebook)) + 1)]
    assert not [cell.metadata for cell in cells(notebook) if cell.metadata.keys() - {"tags"}]


@every_notebook
def test_what_shows_something_has_an_output_and_none_is_an_error_or_a_warning_of_python(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if "Warning:" in output.get("text", "")]
    assert not [*silent_cells(notebook)]


@every_notebook
def test_it_holds_no_path_of_a_machine_and_no_progress(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells] + [text_of(cell) for cell in cells(notebook)]
    assert not [text for text in texts if ABSOLUTE.search(text)]
    assert not [text for text in texts if PROGRESS.search(text)]


@every_notebook
def test_its_links_lead_somewhere(path: Path) -> None:
    said = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    links = [link for text in said for link in LINK.findall(text)]
    assert not [link for link in links if not (FOLDER / link).is_file()]


def test_a_path_and_a_bar_are_seen() -> None:
    assert ABSOLUTE.search("written to /home/me/out")
    assert not ABSOLUTE.search("half/0.11, ../README.md, https://example.org/a/b, 12 / 4")
    assert PROGRESS.search("Loading weights: 100%|####| 48/48 [00:00<00:00, 1501.19it/s]")


def test_a_cell_without_its_output_is_seen() -> None:
    new = nbformat.v4.new_code_cell
    sources = ["def show():\n    print(1)", "show()", "x = 1", "plt.show()"]
    notebook = nbformat.v4.new_notebook(cells=[new(source) for source in sources])
    assert [*silent_cells(notebook)] == ["show()", "plt.show()"]


@pytest.mark.parametrize(
    ("stored", "found", "same"),
    [
        ("zeros 768000, KL 0.0068", "zeros  768000, KL 0.0070", True),
        ("zeros 768000, KL 0.0068", "zeros 768001, KL 0.0068", False),
        ("perplexity 1.777", "perplexity 1.990", False),
        ("perplexity 1.777", "perplexity 1.777 or so", False),
        ("proved: True", "proved: False", False),
        ("0.0001", "0.0003", True),
        ("0.0001", "0.0004", False),
    ],
)
def test_figures_that_differ_by_more_than_rounding_are_seen(stored: str, found: str, same: bool) -> None:
    assert (not differences(stored, found)) == same


def test_of_a_timing_only_the_words_count() -> None:
    assert not differences("1.5 times", "2.5 times", timing=True)
    assert differences("1.5 times", "1.5 seconds", timing=True)


@pytest.mark.slow
@every_notebook
def test_a_fresh_kernel_shows_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    from notebooks import execute

    stored, found = nbformat.read(path, as_version=4), execute(path, tmp_path)
    for was, now in zip(cells(stored), cells(found), strict=True):
        timing = TIMING in was.metadata.get("tags", [])
        assert not differences(text_of(was), text_of(now), timing=timing), was.source
        assert pictures_of(was) == pictures_of(now), was.source
    assert not [*tmp_path.iterdir()]  # they work in a folder of their own
