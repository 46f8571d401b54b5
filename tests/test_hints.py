"""Every refusal says what to do, and what it names can be done: flags, commands, keys and extras exist."""

import ast
import re
import tomllib
from collections.abc import Iterator

import pytest
import typer

from structprune import errors
from structprune.cli import app
from structprune.errors import Interrupted, StructpruneError
from structprune.pruners.catalogue import find, names
from structprune.recipe.options import BenchOptions, EvaluateOptions, RecoverOptions
from structprune.recipe.recipe import Recipe
from tests.test_imports import ROOT, TREES

KINDS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, StructpruneError) and kind is not Interrupted
}
COMMANDS = typer.main.get_command(app).commands
FLAGS = {
    flag
    for command in COMMANDS.values()
    for parameter in command.params
    for flag in (*parameter.opts, *parameter.secondary_opts)
} | {"--help", "--version"}
GROUPS = {name: field.annotation for name, field in Recipe.model_fields.items()} | {
    "recover": RecoverOptions,
    "evaluate": EvaluateOptions,
    "bench": BenchOptions,
}


def text_of(node: ast.AST) -> Iterator[str]:
    """Yield the texts of an expression; a formatted one is whole, with `{}` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from text_of(child)


def hints_of(tree: ast.AST) -> set[str]:
    """Return the texts that a module hints with, in the call itself or under a name that the call gives."""
    values = [
        keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "hint"
    ]
    used = {node.id for value in values for node in ast.walk(value) if isinstance(node, ast.Name)}
    values += [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        if used & {target.id for target in node.targets if isinstance(target, ast.Name)}
    ]
    return {text for value in values for text in text_of(value)}


HINTS = sorted({(module, text) for module, tree in TREES.items() for text in hints_of(tree)})


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_error_is_made_without_a_hint(kind):
    with pytest.raises(TypeError, match="hint"):
        getattr(errors, kind)("something is wrong")
    with pytest.raises(AssertionError):
        getattr(errors, kind)("something is wrong", hint="")


def test_every_refusal_is_given_a_hint_where_it_is_made():
    wrong = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in KINDS:
                hints = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "hint"]
                if not hints or hints[0] in ("''", "None"):
                    wrong.append(f"{module}, line {node.lineno}: {ast.unparse(node)[:80]}")
    assert not wrong


def test_hints_are_found():
    assert len(HINTS) > 150
    assert any("--allow-external-symlinks" in text for _, text in HINTS)
    assert any("--restart" in text for _, text in HINTS)


def test_a_hint_names_only_what_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wrong = []
    for module, hint in HINTS:
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", hint):
            wrong += [f"{module}: no command has {flag}"] * (flag not in FLAGS)
        for command in re.findall(r"`structprune ([a-z]+)", hint):
            wrong += [f"{module}: no command {command}"] * (command not in COMMANDS)
        for path in re.findall(r"--set ([\w.]+)=", hint):
            wrong += [f"{module}: no key {path}"] * (not is_key(path))
        for extra in re.findall(r"structprune\[(\w+)\]", hint):
            wrong += [f"{module}: no extra {extra}"] * (extra not in project["optional-dependencies"])
    assert not wrong


def test_a_hint_is_one_line_without_a_full_stop():
    wrong = [(module, hint) for module, hint in HINTS if "\n" in hint or hint[1:].endswith(".")]
    assert not wrong


def is_key(path: str) -> bool:
    """Tell whether `--set` knows a path: a key of the recipe, or a field of a method."""
    first, *rest = path.split(".")
    if first in GROUPS:
        return not rest or rest[0] in GROUPS[first].model_fields
    return any(first in find(name).model_fields for name in names())


def test_a_path_of_set_is_known_or_not():
    assert is_key("sparsity")
    assert is_key("calibration.samples")
    assert not is_key("calibration.nothing")
    assert not is_key("nothing")
