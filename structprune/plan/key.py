"""What one decision of a plan is about, and what is to be done about it.

A key is a name and a kind, `"<stored tensor name>:<kind>"` on disk. What a kind asks for is one of seven
edits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Self

from structprune.errors import InputError

Edit = Literal["mask", "value", "parts", "keep", "drop", "members", "none"]
"""What a decision asks for: zeros in a tensor; its new value, which may create it; its storage in parts, of
which this is one; some indices of an axis only; that it goes; some members of a numbered list only, which are
numbered anew; or nothing, where it is only kept beside the weights."""

EDITS: Mapping[str, Edit] = MappingProxyType(
    {
        "mask": "mask",
        "value": "value",
        "factor": "parts",
        "keep.0": "keep",
        "keep.1": "keep",
        "drop": "drop",
        "members": "members",
        "tokens": "none",
        "rule": "none",
        "score": "none",
    }
)
"""Which edit each kind is."""

# Edits whose result is a tensor of the saved model, bit for bit: a finished folder keeps it only once.
WRITTEN: frozenset[Edit] = frozenset({"value", "parts"})

# Edits that leave tensors of other shapes, or fewer of them.
RESHAPING: frozenset[Edit] = frozenset({"keep", "drop", "members"})


@dataclass(frozen=True, order=True, slots=True)
class Key:
    """One decision.

    Attributes:
        name: The tensor it is about, by its name in the checkpoint files; of members, what stands before
            their number; of tokens, the block's path in the model.
        kind: One of `EDITS`.
    """

    name: str
    kind: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a key as it stands on disk.

        Raises:
            InputError: It has no kind, or one that is not known.
        """
        name, _, kind = text.rpartition(":")
        if kind not in EDITS:
            raise InputError(
                f"plan key {text!r}: kind {kind!r} is not known", hint=f"known kinds: {', '.join(EDITS)}"
            )
        return cls(name, kind)

    @property
    def edit(self) -> Edit:
        """Return what the decision asks for."""
        return EDITS[self.kind]

    @property
    def axis(self) -> int:
        """Return the axis that a "keep" is about."""
        return int(self.kind.removeprefix("keep."))

    def __str__(self) -> str:
        return f"{self.name}:{self.kind}"


def check_key(key: object) -> Key:
    """Return what a plan was indexed by.

    Raises:
        TypeError: It is no `Key`; a string that looks like one would never be found, and nobody would know.
    """
    if not isinstance(key, Key):
        raise TypeError(f"a plan is indexed by Key(name, kind), not by {key!r}")
    return key
