"""What every signature keeps to, read from the source with ast; and every module is found by its path."""

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator

from tests.test_imports import MODULES, TREES, imported

LIBRARY = {name: tree for name, tree in TREES.items() if name.partition(".")[0] != "cli"}
MOST_PARAMETERS = 8
# `open_config`, which a model that is edited calls again, may stand beside one more.
MOST_THAT_TRUST = 2


def functions(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Yield every function and method of a module: its name, and its parameters without self and cls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            spread = [one for one in (node.args.vararg, node.args.kwarg) if one is not None]
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *spread]
            yield node.name, [one.arg for one in every if one.arg not in ("self", "cls")]


def ours(module: str) -> set[str]:
    """Return the names in a module that stand for a function, a class or a module of the package."""
    found = {
        node.name
        for node in TREES[module].body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for _, statement in imported(TREES[module], module):
        assert isinstance(statement, ast.Import | ast.ImportFrom)
        found |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    return found


def root_of(callee: ast.expr) -> str:
    """Return the first name of a dotted callee; empty for anything else."""
    while isinstance(callee, ast.Attribute):
        callee = callee.value
    return callee.id if isinstance(callee, ast.Name) else ""


def test_options_that_travel_together_are_one_value():
    long = {
        f"{module}.{name}": len(found)
        for module, tree in LIBRARY.items()
        for name, found in functions(tree)
        if len(found) > MOST_PARAMETERS
    }

    assert not long, f"more than {MOST_PARAMETERS} parameters: {long}"


def test_trust_travels_with_the_opening():
    found = [
        f"{module}.{name}"
        for module, tree in LIBRARY.items()
        for name, parameters in functions(tree)
        if "trust_remote_code" in parameters
    ]

    assert len(found) <= MOST_THAT_TRUST, found


def test_no_arguments_are_forwarded_unseen():
    forwarding = []
    for module, tree in TREES.items():
        known = ours(module)
        forwarding += [
            f"{module}: {ast.unparse(node)[:80]}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and root_of(node.func) in known
            and any(argument.arg is None for argument in node.keywords)
        ]

    assert not forwarding


def test_no_public_class_name_stands_twice():
    places = defaultdict(list)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)

    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_every_module_is_found_by_its_path():
    for module in MODULES.keys() - {"", "__main__"}:
        found = importlib.import_module(f"structprune.{module}")

        place = importlib.import_module("structprune")
        for part in module.split("."):  # what `import structprune.x.y as m` does
            place = getattr(place, part)
        assert place is found, module
