"""The guide to the recipes: every method and file is in it, keys of ours exist, figures are the benches'."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from structprune.errors import UsageError
from structprune.pruners import catalogue
from structprune.recipe.draft import Settings
from structprune.recipe.recipe import Recipe, assemble
from tests.test_hints import FLAGS

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "recipes" / "README.md").read_text()
KEYS_OF_OTHERS = "## Keys of other tools"
BENCHES = (ROOT / "scripts" / "bench" / "README.md").read_text()
FRONT = (ROOT / "README.md").read_text()
ENTRIES = {
    name: " ".join(f"{recipe}): {words}".split())
    for name, recipe, words in re.findall(
        r"^- \*\*`(\w+)`\*\* \(\[recipe\]\(([\w.]+)\)\): (.*(?:\n  .*)*)", GUIDE, re.MULTILINE
    )
}


def section(title: str) -> str:
    """Return the text under a title, up to the next of its level."""
    level = title.partition(" ")[0]
    return re.split(rf"^{level} ", GUIDE.partition(f"{title}\n")[2], flags=re.MULTILINE)[0]


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of the tables of a text, heads and rules left out."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        head = index + 1 < len(lines) and lines[index + 1].startswith("|---")
        if line.startswith("|") and not line.startswith("|---") and not head:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def built(fields: Mapping[str, Any]) -> Recipe:
    """Return the recipe of some of its keys, those of the one stage among them."""
    groups = {key: value for key, value in fields.items() if key in Recipe.model_fields}
    stage = {key: value for key, value in fields.items() if key not in groups}
    return assemble({"model": "demo", "output": "out"} | groups | {"prune": {"method": "magnitude"} | stage})


def accepted(fields: Mapping[str, Any]) -> bool:
    """Tell whether keys can stand together in a recipe, with their method or with any."""
    methods = [fields["method"]] if "method" in fields else sorted(catalogue.names())
    for method in methods:
        try:
            built({**fields, "method": method})
        except (UsageError, ValidationError):
            continue
        return True
    return False


def test_every_method_has_one_entry_that_links_its_recipe():
    assert len(re.findall(r"^- \*\*`", GUIDE, re.MULTILINE)) == len(ENTRIES)
    assert set(catalogue.names()) == ENTRIES.keys()
    for name, words in ENTRIES.items():
        assert words.startswith(f"{name}.yaml): ")


def test_an_entry_says_what_a_method_reads():
    for name, words in ENTRIES.items():
        pruner = catalogue.find(name)()
        says_none = "No data" in words
        assert says_none != pruner.looks_at_data, name
        assert ("Questions on images" in words) == (pruner.looks_at_data and pruner.reads == "images"), name


def test_every_file_and_folder_of_recipes_is_linked():
    linked = set(re.findall(r"\]\(([^)#]+)\)", GUIDE))
    files = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert files <= linked
    assert "models/README.md" in linked
    assert all((ROOT / "recipes" / one).exists() for one in linked)


def test_every_link_inside_the_page_has_its_title():
    titles = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", GUIDE, re.MULTILINE)}
    assert {link[1:] for link in re.findall(r"\]\((#[^)]+)\)", GUIDE)} <= titles


def fragments(cell: str) -> list[dict[str, Any]]:
    """Return the keys of a cell: together, those of what follows a semicolon apart."""
    found = []
    for part in cell.split(";"):
        fields: dict[str, Any] = {}
        for said in re.findall(r"`([^`]+)`", part):
            if re.match(r"\w+: ", said):
                fields |= yaml.safe_load(f"{{{said}}}")
        found.append(fields)
    return [fields for fields in found if fields]


KEYS = [(cells[0], cells[-1]) for cells in rows(section(KEYS_OF_OTHERS))]


@pytest.mark.parametrize(("theirs", "ours"), KEYS, ids=[theirs for theirs, _ in KEYS])
def test_a_key_of_another_tool_is_one_of_ours_or_none(theirs: str, ours: str) -> None:
    assert fragments(ours) or ours.startswith("none")
    first: dict[str, Any] = {}
    for fields in fragments(ours):
        # What stands in place of a value of the same method does not name it again.
        of_it = {"method": first["method"]} if "method" in first else {}
        first = first or fields
        assert accepted(of_it | fields), fields
    flags = re.findall(r"`(--[\w-]+)", ours)
    assert set(flags) <= FLAGS


def test_the_flags_of_other_tools_that_are_taken_are_there():
    said = re.search(r"also takes (.*)\.$", section(KEYS_OF_OTHERS), re.MULTILINE)
    assert said is not None
    named = re.findall(r"`(--[\w-]+)`", said[1])
    assert named
    assert set(named) <= FLAGS


COMPOSE = section("## How to compose")
COMPOSED = [yaml.safe_load(said) for cells in rows(COMPOSE) for said in re.findall(r"`(\{.*\})`", cells[1])]
REFUSED = [
    yaml.safe_load(said)
    for line in re.findall(r"^- `\{method.*$", COMPOSE, re.MULTILINE)
    for said in re.findall(r"`(\{method[^`]*\})`", line)
]


@pytest.mark.parametrize("fields", COMPOSED, ids=str)
def test_a_composition_that_won_can_be_asked_for(fields: dict[str, Any]) -> None:
    assert accepted(fields)


@pytest.mark.parametrize("fields", COMPOSED, ids=str)
def test_a_composition_that_won_says_how_much_left(fields: dict[str, Any]) -> None:
    # Without it the figure beside it belongs to another size.
    assert fields.keys() & {"sparsity", "target_params", "target"}


def test_a_size_of_the_whole_model_stands_beside_figures_that_were_measured_at_it() -> None:
    (cfsp,) = (fields for fields in COMPOSED if fields["method"] == "cfsp")
    shipped = yaml.safe_load((ROOT / "recipes/models/smollm2-135m/cfsp.yaml").read_text())
    assert shipped["prune"] == cfsp

    measured = {
        cells[3]: cells[1]
        for cells in rows(BENCHES.partition("## structure_quality.py")[2].partition("### demo")[0])
        if cells[0] == "cfsp + least_squares"
    }
    (row,) = (cells for cells in rows(COMPOSE) if "cfsp" in cells[1])
    sizes = [size.removesuffix("M") for size in re.findall(r"target_params: ([\d.]+M)", " ".join(row))]
    assert {size: measured[size] for size in sizes} == {"113.28": "21.61", "81.43": "37.55"}
    assert all(measured[size] in row[2] for size in sizes)


WHICH = [cells for cells in rows(section("## Which method when")) if "perplexity at" in cells[3]]


@pytest.mark.parametrize("cells", WHICH, ids=[cells[0] for cells in WHICH])
def test_zeros_are_compared_by_figures_of_one_table(cells: list[str]) -> None:
    table = BENCHES.partition("### smollm2")[2].partition("\n| worse")[0]
    columns = {"50%": 1, "70%": 2, "2:4": 3}
    share, said = re.match(r"perplexity at (\S+) (.*?)(?:; but .*)?$", cells[3]).groups()
    measured = [row[columns[share]] for row in rows(table) if len(row) > columns[share]]
    seconds = [row[6] for row in rows(table)]
    for figure, unit in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)( s)?(?![\w:%])", said):
        assert is_among(figure, seconds if unit else measured), figure
    # What is taken is what does best of those beside it, unless time is what is wanted.
    if "least loss" in cells[0]:
        assert float(said.split(",")[0]) == min(float(one) for one in re.findall(r"\d+\.\d+", said))


def test_zeros_of_every_kind_are_compared() -> None:
    assert len(WHICH) == 6


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_what_is_said_not_to_combine_is_refused(fields: dict[str, Any]) -> None:
    assert fields.keys() <= catalogue.find(fields["method"]).model_fields.keys() | {"method"}
    with pytest.raises(UsageError):
        built(fields)


def test_the_list_of_what_does_not_combine_is_read():
    assert len(REFUSED) >= 10
    assert len(COMPOSED) == 5


def test_keys_named_in_the_text_exist():
    known = {name for method in catalogue.names() for name in catalogue.find(method).model_fields}
    known |= Settings.model_fields.keys() | {"method", "recover", "target"}
    text = GUIDE.partition(KEYS_OF_OTHERS)[0]
    said = set(re.findall(r"`(\w+):[ `]", text))
    assert said
    assert said <= known


def right(method: str, share: str, model: str) -> str:
    """Return the share of right answers that the benches' page has of a method."""
    part = (
        BENCHES.partition("## tokens_quality.py")[2].partition(f"\n### {model}\n")[2].partition("\n### ")[0]
    )
    table = part.partition(f"**{share}% of the tokens**")[2].partition("\n**")[0]
    row = next(cells for cells in rows(table) if cells[0] == method)
    return row[7]


@pytest.mark.parametrize("method", [name for name, family in catalogue.names().items() if family == "token"])
def test_right_answers_are_those_of_the_bench(method: str) -> None:
    share = "33.3" if method == "tome" else "11.0"
    pairs = re.findall(r"([\d.]+%)\s+and\s+([\d.]+%)", ENTRIES[method])
    names = [method, f"{method} all"]
    assert pairs
    for said, name in zip(pairs, names, strict=False):
        assert said == tuple(right(name, share, model) for model in ("demo-vision", "tinyllava-shapes"))


def cells_of(method: str, text: str) -> list[str]:
    """Return all cells of the rows of a method, whatever is composed with it."""
    return [cell for cells in rows(text) if re.match(rf"{method}\b", cells[0]) for cell in cells[1:]]


def is_among(said: str, cells: list[str]) -> bool:
    """Tell whether a figure stands in a cell as it is or with more digits."""
    number = said.replace(" ", "")
    digits = len(number.replace(".", "").strip("0"))
    for cell in cells:
        found = re.match(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", cell)
        if found and float(f"{float(found[0]):.{max(digits, 1)}g}") == float(number):
            return True
    return False


FIGURE = r"\d[\d ]*(?:\.\d+)?"


@pytest.mark.parametrize("method", [name for name, family in catalogue.names().items() if family != "token"])
def test_figures_of_an_entry_are_those_of_the_benches(method: str) -> None:
    assert method in ENTRIES, f"recipes/README.md has no entry of {method}"
    said = re.findall(
        rf"(?:perplexity|Perplexity|refit|KL|KL at 2:4) ({FIGURE})(?: and ({FIGURE}))?"
        rf"(?:; ({FIGURE})(?: and ({FIGURE}))?)?",
        ENTRIES[method],
    )
    figures = [one.strip() for four in said for one in four if one]
    assert figures or "ot in the" in ENTRIES[method]
    cells = cells_of(method, BENCHES + FRONT)
    for one in figures:
        assert is_among(one, cells), one
