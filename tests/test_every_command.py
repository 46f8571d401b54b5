"""Laws of every command, found by listing them: no input changes, nothing silly is a bug, hints are true."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from structprune.cli import app
from structprune.recipe.recipe import Recipe
from tests.forks import Ended, Parent
from tests.specimens import calibrated, quick, stamps
from tests.table_rows import ROWS

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = dict(GROUP.commands)

SHORT = ("--length", 16, "--windows", 1)
SILLY = (
    "",
    " ",
    "-",
    "--",
    "nan",
    "-1",
    "9" * 400,
    "../..",
    "/dev/null",
    "/dev/zero",
    "a\nb",
    "é" * 300,
)
SILLY += (
    "'; rm -rf /",
    "${HOME}",
    "{}",
    "[",
    "=",
    "no",
    "010",
    "2:4,",
    "0.5,,0.6",
    "%",
    "~",
    "x=y=z",
    "demo",
)


def lines(name: str, specimens: Path) -> list[list[object]]:
    """Return command lines of a command that do what it is there for."""
    text, model, pruned = specimens / "text.txt", specimens / "model", specimens / "pruned"
    packed, picture = specimens / "packed", specimens / "picture.png"
    usual: dict[str, list[list[object]]] = {
        "prune": [
            ["prune", model, "out", "--method", "wanda", *calibrated(text), *quick(text)],
            ["prune", specimens / "recipe.yaml", "out"],
            ["prune", model, "out", "--method", "wanda", "--dry-run"],
            ["prune", model, "out", "--method", "magnitude", "--scores", pruned],
        ],
        "apply": [["apply", model, "out", "--plan", pruned]],
        "recover": [
            ["recover", pruned, "out", "--data", text, "--steps", 2, "--length", 16, "--teacher", model]
        ],
        "export": [
            ["export", pruned, "out", "--to", "2:4"],
            ["export", specimens / "packed", "out", "--to", "dense"],
        ],
        "inspect": [["inspect", model], ["inspect", pruned], ["inspect", packed]],
        "verify": [["verify", pruned, "--against", model], ["verify", specimens / "adapter"]],
        "evaluate": [
            ["evaluate", pruned, "--text", text, "--length", 16, "--windows", 1, "--compare", model]
        ],
        "bench": [["bench", pruned, "--compare", model, "--length", 8, "--new", 2, "--repeats", 1]],
        "show": [
            ["show", specimens / "dropping", "--image", picture, "--question", "What?", "-o", "out/kept.png"]
        ],
        "report": [["report", pruned, specimens / "solved", specimens / "dropping", "-o", "out/page.html"]],
        "methods": [["methods"], ["methods", "wanda"]],
        "env": [["env"]],
    }
    return usual[name]


def silly_lines(name: str, specimens: Path) -> Iterator[list[object]]:
    """Yield command lines of a command in which one word is silly: an argument, or the value of a flag."""
    right = lines(name, specimens)[0]
    for word in SILLY:
        for place in range(1, len(right)):
            yield [*right[:place], word, *right[place + 1 :]]
    for option in COMMANDS[name].params:
        if option.param_type_name == "option" and not option.is_flag:
            for word in SILLY:
                yield [*right, option.opts[0], word]


def is_bug(ended: Ended) -> bool:
    """Tell whether a command ended as none may: exit 1, a traceback, no hint, a hang."""
    if ended.code == 0:
        return False
    return ended.code not in (2, 3, 4, 5, 6) or "Traceback" in ended.err or not ended.error.get("hint")


def complaints(name: str, parent: Parent, specimens: Path, place: Path, stride: int) -> tuple[list[str], int]:
    wrong, count = [], 0
    before = stamps(specimens)
    for number, line in enumerate(itertools.islice(silly_lines(name, specimens), 0, None, stride)):
        folder = place / str(number)
        folder.mkdir()
        words = [word for word in line if "\0" not in str(word)]
        ended = parent.run([*words, "--json"], folder)
        count += 1
        if is_bug(ended):
            wrong.append(f"{words}: exit {ended.code}: {ended.err.strip()[-400:]}")
    if stamps(specimens) != before:
        wrong.append("an input was touched")
    return wrong, count


def test_there_are_lines_for_every_command(specimens: Path) -> None:
    assert all(lines(name, specimens) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_changes_no_input(name: str, parent: Parent, specimens: Path, tmp_path: Path) -> None:
    before = stamps(specimens)
    for number, line in enumerate(lines(name, specimens)):
        place = tmp_path / str(number)
        place.mkdir()
        ended = parent.run([*line, "--json"], place)
        assert not is_bug(ended), ended.err
        assert stamps(specimens) == before, line
        assert {path.name for path in place.iterdir()} <= {"out"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_help_of_every_flag(name: str, command) -> None:
    done = command(name, "--help")
    assert done.code == 0
    said = done.out + done.err
    for option in COMMANDS[name].params:
        if option.param_type_name == "option":
            assert option.help
            assert option.opts[0][:20] in said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_silly_word_is_no_bug(name: str, parent: Parent, specimens: Path, tmp_path: Path) -> None:
    wrong, _ = complaints(name, parent, specimens, tmp_path, stride=113)
    assert wrong == []


@pytest.mark.parametrize("name", ["apply", "export", "recover"])
def test_an_output_whose_name_is_not_utf_8_is_refused(
    name: str, parent: Parent, specimens: Path, tmp_path: Path
) -> None:
    words = ["\udcff" if word == "out" else word for word in lines(name, specimens)[0]]
    ended = parent.run([*words, "--json"], tmp_path)
    assert not is_bug(ended), ended.err


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_silly_word_is_a_bug(name: str, parent: Parent, specimens: Path, tmp_path: Path) -> None:
    wrong, _ = complaints(name, parent, specimens, tmp_path, stride=3)
    assert wrong == []


FLAGS = {flag for command in COMMANDS.values() for option in command.params for flag in option.opts}
FLAGS |= {
    flag for command in COMMANDS.values() for option in command.params for flag in option.secondary_opts
}
FLAGS |= {"--help", "--version"}


@pytest.mark.slow
def test_hints_name_flags_and_commands_that_there_are(
    parent: Parent, specimens: Path, tmp_path: Path
) -> None:
    (tmp_path / "specimens").symlink_to(specimens)
    seen, wrong = 0, []
    for number, cases in ROWS.items():
        for count, case in enumerate(cases):
            place = tmp_path / f"{number}-{count}"
            place.mkdir()
            ended = parent.run([*case.line(place), "--json"], place, case.stop, case.around)
            hint = ended.error.get("hint", "")
            seen += bool(hint)
            wrong += [f"{number} {flag}: {hint}" for flag in _flags(hint) if flag not in FLAGS]
            named = re.findall(r"structprune ([a-z]+)", hint)
            wrong += [f"{number} {name}: {hint}" for name in named if name not in COMMANDS]
            for key in re.findall(r"\b([a-z]+)\.[a-z_]+\b", hint):
                known = key in Recipe.model_fields or key in (
                    "config",
                    "model",
                    "structprune",
                    "tokenizer",
                    "adapter",
                )
                wrong += [] if known else [f"{number} {key}: {hint}"]
    assert wrong == []
    assert seen >= 80


# Names before a dot that are files, not groups of a recipe's keys.
FILES = ("config", "model", "structprune", "tokenizer", "adapter", "plan")


def _flags(hint: str) -> list[str]:
    return [flag for flag in re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", hint) if "hf " not in hint]
