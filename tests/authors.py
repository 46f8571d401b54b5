"""Methods that a test writes as a newcomer would: files in a folder of their own, found by their name."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune import pruners
from structprune.plan.plan import Plan
from structprune.pruners.catalogue import find
from tests.tiny import tiny, tokens

HEAD = '''"""What a test is about.

Source: ours
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

'''
# A class that derives from a family's, by the family's name.
CLASSES = {
    "weight": "from structprune.pruners.weight._scored import ScorePruner as Family\n",
    "structure": "from structprune.pruners.structure._columns import ColumnPruner as Family\n",
    "token": "from structprune.pruners.token._scored import ScoredTokens as Family\n",
}


@dataclass(frozen=True)
class Author:
    """Whoever writes methods.

    Attributes:
        folder: Where the families' folders are.
    """

    folder: Path

    def write(self, name: str, text: str, family: str = "weight") -> Path:
        """Write the file of a method as it is given, and return it."""
        path = self.folder / family / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def derive(self, name: str, body: str, family: str = "weight") -> Path:
        """Write the file of a method whose class has this body, and return it."""
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        return self.write(name, f"{HEAD}{CLASSES[family]}\n\nclass Mine(Family):\n{lines}", family)

    def score(self, name: str, answer: str, family: str = "weight", parts: str = "") -> Path:
        """Write the file of a method whose score is the lines of `answer`, and return it."""
        asks = "self, seen" if family == "token" else "self, weight, seen"
        declared = f"parts: ClassVar = frozenset({{{parts}}})\n" if parts else ""
        lines = "".join(f"\n    {line}" for line in answer.splitlines())
        return self.derive(name, f"{declared}def score({asks}):{lines}", family)


def decide(method: str, family: str = "llama", **fields: Any) -> Plan:
    """Return what a method decides on a tiny model of a family."""
    model = tiny(family)
    return find(method)(**fields).calibrate(model, [tokens(model)])


@contextmanager
def writing_methods(folder: Path) -> Iterator[Author]:
    """Let files in a folder be methods for the length of a `with`; then nobody knows them."""
    before, roots = set(sys.modules), list(pruners.__path__)
    pruners.__path__.append(str(folder))
    try:
        yield Author(folder)
    finally:
        pruners.__path__[:] = roots
        for name in set(sys.modules) - before:
            if name.startswith("structprune.pruners."):
                family = sys.modules.get(name.rpartition(".")[0])
                file = getattr(sys.modules[name], "__file__", None) or ""
                if file.startswith(str(folder)):
                    del sys.modules[name]
                    vars(family).pop(name.rpartition(".")[2], None)
        for family in ("weight", "structure", "token"):
            known = sys.modules.get(f"structprune.pruners.{family}")
            if known is not None and str(folder / family) in known.__path__:
                known.__path__.remove(str(folder / family))
