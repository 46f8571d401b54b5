"""Damage by chance, as a value: what a seed picks can be printed, pasted into a corpus and done again.

Bytes are flipped, cut off and put in; in JSON and YAML a value becomes another one, a key goes or comes
twice.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

# No value that is written can hold it, so text may be put in its place.
_HOLE = "@hole@"
# What is too long to be printed, by a name that is no JSON.
LONG = {
    "@400 digits": "9" * 400,
    "@5000 digits": "9" * 5000,
    "@5000 letters": '"' + "x" * 5000 + '"',
    "@70 lists": "[" * 70 + "]" * 70,
    "@70 objects": '{"a":' * 70 + "1" + "}" * 70,
    "@999 lists": "[0," * 999 + "0" + "]" * 999,
    "@100000 open lists": "[" * 100_000,
    "@100000 open objects": '{"a":' * 100_000,
}
# What stands for a value, as text: other types, sizes at and beyond every limit, and what JSON does not know.
STRANGE = (
    *("null", "true", "false", "0", "1", "-1", "2", "7", "1.5", "-0.0", "1e-3", "1e308", "1e999", "NaN"),
    *("-Infinity", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "1" + "0" * 29),
    *('""', '"x"', '"64"', '"../../x"', '"/etc/hostname"', '"a\\u0000b"', '"\\ud800"'),
    *('"\\n"', '"\\u202e"', "[]", "{}", "[1]", "[null]", '["x", 1]', '{"x": 1}'),
    *('{"": {}}', "[[[[1]]]]", *LONG),
    *("[-1]", "[9223372036854775807, 2]", "[1.5]", "[true]", "nul", "'x'", "", "/", "{", "]", '"'),
)
# What YAML reads as more than it looks like, or can be told to do.
STRANGE_IN_YAML = (
    *("no", "on", "010", "0x1F", "0o17", "1_000", "1:30", "2:4", ".nan", ".inf", "-.INF", "~", "&a x", "*a"),
    *("!!python/object:os.system {}", "!!python/name:os.system", "!!binary aGk=", "!!set {a}", "!x y"),
    *("2001-01-01", "<<: {}", "{<<: {seed: 1}}", "|\n x", "? x", "%TAG ! x", "--- x", "...", "'", "#", "\t"),
)


class Change(Protocol):
    """One thing that is done to a file."""

    def of(self, data: bytes) -> bytes:
        """Return the file after it."""


@dataclass(frozen=True)
class Flip:
    """A bit is another one."""

    place: int
    bit: int

    def of(self, data: bytes) -> bytes:
        changed = bytearray(data)
        changed[self.place] ^= 1 << self.bit
        return bytes(changed)


@dataclass(frozen=True)
class Cut:
    """The file ends early."""

    place: int

    def of(self, data: bytes) -> bytes:
        return data[: self.place]


@dataclass(frozen=True)
class Put:
    """Bytes stand where none were."""

    place: int
    raw: bytes

    def of(self, data: bytes) -> bytes:
        return data[: self.place] + self.raw + data[self.place :]


@dataclass(frozen=True)
class Value:
    """The value at a path is what `raw` says, whatever that is."""

    path: tuple[str | int, ...]
    raw: str

    def of(self, data: bytes) -> bytes:
        root = {"": _parse(data)}
        outer, key = _holder(root, self.path)
        outer[key] = _HOLE
        return json.dumps(root[""]).replace(json.dumps(_HOLE), LONG.get(self.raw, self.raw), 1).encode()


@dataclass(frozen=True)
class Gone:
    """The value at a path is not there."""

    path: tuple[str | int, ...]

    def of(self, data: bytes) -> bytes:
        root = {"": _parse(data)}
        outer, key = _holder(root, self.path)
        del outer[key]
        return json.dumps(root.get("")).encode()


@dataclass(frozen=True)
class Twice:
    """The key at a path stands twice in its object; with `other`, another key stands there."""

    path: tuple[str | int, ...]
    other: str | None = None

    def of(self, data: bytes) -> bytes:
        root = {"": _parse(data)}
        outer, key = _holder(root, self.path)
        if not isinstance(outer, dict):
            return data
        if self.other is not None:
            outer[self.other] = outer.pop(key)
            return json.dumps(root[""]).encode()
        outer[_HOLE] = outer[key]
        return json.dumps(root[""]).replace(json.dumps(_HOLE), json.dumps(key), 1).encode()


@dataclass(frozen=True)
class InHeader:
    """A change of the header of a safetensors file, whose length is then said anew."""

    inner: Change

    def of(self, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = self.inner.of(data[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + data[8 + length :]


@dataclass(frozen=True)
class Raw:
    """The file is nothing but this."""

    data: bytes

    def of(self, data: bytes) -> bytes:
        return self.data


def change(data: bytes, name: str, seed: int) -> Change:
    """Return what a seed does to a file; the name's ending says what is in it."""
    chance = random.Random(f"{name.rpartition('/')[2]} {seed}")
    if name.endswith(".safetensors"):
        if chance.random() < 0.3:
            return _of_bytes(data, chance)
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        inner = _of_values(header, chance) if chance.random() < 0.7 else _of_bytes(header, chance)
        return InHeader(inner)
    if name.endswith((".json", ".yaml")) and chance.random() < 0.7:
        return _of_values(data, chance, STRANGE + STRANGE_IN_YAML if name.endswith(".yaml") else STRANGE)
    return _of_bytes(data, chance)


def _of_bytes(data: bytes, chance: random.Random) -> Change:
    place = chance.randrange(max(len(data), 1))
    kind = chance.choice("ffffccpppw") if data else "w"
    if kind == "f":
        return Flip(place, chance.randrange(8))
    if kind == "c":
        return Cut(place)
    raw = (
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"{",
        b'"',
        b",",
        b"\n",
        b"9" * 50,
        b"\xed\xa0\x80",
        chance.randbytes(8),
    )
    if kind == "p":
        return Put(place, chance.choice(raw))
    whole = (b"", b"\0" * 64, b"\x80\x02.", b"PK\3\4" + bytes(60), b"{}", b"[]", b"null", b"\x1f\x8b\x08")
    return Raw(chance.choice(whole))


def _of_values(data: bytes, chance: random.Random, strange: tuple[str, ...] = STRANGE) -> Change:
    # A file of many equal entries (an index, a vocabulary) shall not be changed in these alone.
    top = list(_paths(_parse(data), 1))
    every = list(_paths(_parse(data)))
    path = chance.choice(chance.choice((top, every)) or [()])
    kind = chance.choice("vvvvvvgt")
    if kind == "v" or not path:
        return Value(path, chance.choice(strange))
    if kind == "g":
        return Gone(path)
    return Twice(path, chance.choice((None, "", "x", "__class__", f"{path[-1]}s", "a.b", "\u202e")))


def _paths(value: Any, depth: int = 64, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if depth:
        for key, item in inner:
            yield from _paths(item, depth - 1, (*path, key))


def _holder(root: dict[str, Any], path: tuple[str | int, ...]) -> tuple[Any, Any]:
    outer: Any = root
    steps = ["", *path]
    for step in steps[:-1]:
        outer = outer[step]
    return outer, steps[-1]


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return yaml.safe_load(data)
