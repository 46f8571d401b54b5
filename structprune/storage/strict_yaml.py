"""YAML that says what it looks like: no aliases, no duplicates, no numbers that only YAML 1.1 sees.

Plain YAML 1.1 keeps the last of two equal keys, reads `2:4` as 124, `010` as 8, `no` as False and `1e-3`
as text, and expands aliases until memory is full. Here scalars follow YAML 1.2's core schema, and what
the two versions read differently as a number is refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode

from structprune.errors import UsageError

# A recipe is a page of text; a mebibyte is far above any and far below what could hurt.
LIMIT_BYTES = 2**20
# Recipes nest four levels; the parser recurses, so an unlimited depth would exhaust the stack.
LIMIT_DEPTH = 32
# 18 digits always fit 64 bits, and Python refuses to read integers of more than 4300 digits.
LIMIT_DIGITS = 18

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")
# Leading zeros, underscores between digits, 0x, 0o, 0b: numbers in one version of YAML, text in the other.
_AMBIGUOUS = re.compile(r"[-+]?(?:0[0-9_]+|[0-9][0-9_]*_[0-9_]*|0[xob][0-9a-fA-F_]+)")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2 and without aliases and duplicates."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and shape PyYAML looks for
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose one node, refusing aliases, anchors and depths that no recipe needs."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, AliasEvent) or event.anchor is not None:
            raise ConstructorError(None, None, "anchors and aliases are not allowed", event.start_mark)
        if getattr(event, "tag", None):
            raise ConstructorError(
                None, None, f"tags such as {event.tag:.40} are not allowed", event.start_mark
            )
        self.depth += 1
        if self.depth > LIMIT_DEPTH:
            raise ConstructorError(None, None, f"nested deeper than {LIMIT_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping whose keys are text and occur once."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise ConstructorError(None, None, "a key must be text", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in lines:
                said = f"key {key.value!r} appears twice, in line {lines[key.value]} and in line {line}"
                raise ConstructorError(None, None, said, key.start_mark)
            lines[key.value] = line
        return super().construct_mapping(node, deep=deep)

    def integer(self, node: ScalarNode) -> int:
        """Construct an integer of at most 18 digits."""
        digits = len(node.value.lstrip("+-"))
        if digits > LIMIT_DIGITS:
            raise ConstructorError(
                None, None, f"an integer of {digits} digits is out of range", node.start_mark
            )
        return int(node.value)

    def number(self, node: ScalarNode) -> float:
        """Construct a float; `.inf` and `.nan` are left to the field to refuse."""
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def ambiguous(self, node: ScalarNode) -> None:
        """Refuse a scalar that is one number or another, or text, depending on the YAML version."""
        said = f"{node.value:.40} is a number only in some versions of YAML; write it plainly, or quote it"
        raise ConstructorError(None, None, said, node.start_mark)


# Tried in this order: the first that matches the whole scalar wins.
for _tag, _pattern, _make in (
    ("tag:yaml.org,2002:null", _NULL, _Loader.construct_yaml_null),
    ("tag:yaml.org,2002:bool", _BOOL, _Loader.construct_yaml_bool),
    ("tag:yaml.org,2002:int", _INTEGER, _Loader.integer),
    ("tag:structprune,2026:ambiguous", _AMBIGUOUS, _Loader.ambiguous),
    ("tag:yaml.org,2002:float", _FLOAT, _Loader.number),
):
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    yaml.add_implicit_resolver(_tag, _whole, first=None, Loader=_Loader)  # type: ignore[no-untyped-call, unused-ignore]
    yaml.add_constructor(_tag, _make, Loader=_Loader)  # type: ignore[no-untyped-call, arg-type, unused-ignore]


def parse(text: str, where: str) -> Any:
    """Return the value of one YAML document; an empty one is None.

    Args:
        text: The document.
        where: What to call it in an error: a file's name, or "--set".

    Raises:
        UsageError: Not YAML, or YAML that can be misread; names the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark and "\n" in text else ""
        raise UsageError(
            f"{where}{place}: {error.problem or error.context}",
            hint="write plain YAML; quote what is meant as text",
        ) from None
    except yaml.YAMLError as error:
        # What is left is a character that YAML does not allow; its message spans lines.
        raise UsageError(
            f"{where}: {' '.join(str(error).split())}",
            hint="remove the character, or write the file again as UTF-8 text",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()  # type: ignore[no-untyped-call, unused-ignore]


def read(path: Path) -> tuple[Any, str]:
    """Return a YAML file's value and its text.

    Raises:
        UsageError: No such file, larger than a mebibyte, not UTF-8, or as for `parse`.
    """
    if not path.is_file():
        raise UsageError(
            f"{path}: {'not a plain file' if path.exists() else 'no such file'}",
            hint="check the path; a recipe is a YAML file",
        )
    try:
        with path.open("rb") as file:
            raw = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="check the path and its rights") from None
    if len(raw) > LIMIT_BYTES:
        raise UsageError(
            f"{path}: more than {LIMIT_BYTES} bytes; that is no recipe",
            hint="give the recipe, which is a page of YAML",
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8 text") from None
    return parse(text, str(path)), text
