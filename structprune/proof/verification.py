"""What a verification found: figures, and a row for each check."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, whether it holds, and what was found in one line."""

    name: str
    ok: bool
    detail: str


@dataclass
class Verification:
    """What was measured.

    Attributes:
        sparsity: Zeros / prunable set; None when the weights could not be read. Without plans, that set
            is every linear of the decoder blocks.
        pattern: "N:M" where every prunable linear holds it, else "unstructured", or "dense" without zeros.
        parameters: All parameters, tied ones once.
        nonzero: Those that are not zero.
        bytes: Bytes of the weight files.
        checks: One row per check, in the order they ran.
        blocks: Per block "block" (its index), "sparsity", "parameters", "zeros" of its linears, and
            "matrices": the last two for each kind of linear.
        loads_in: Loaders that really opened the folder, with their versions.
        stages: Per plan its folder -> the fraction of its units that left, or None where that cannot be told
            without the source.
    """

    sparsity: float | None = None
    pattern: str | None = None
    parameters: int = 0
    nonzero: int = 0
    bytes: int = 0
    checks: list[Check] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    loads_in: list[str] = field(default_factory=list)
    stages: dict[str, float | None] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Tell whether every check holds."""
        return all(check.ok for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """Return the checks that do not hold."""
        return [check for check in self.checks if not check.ok]

    def as_json(self) -> dict[str, Any]:
        """Return what `structprune verify --json` prints."""
        return {"ok": self.ok} | asdict(self)

    def row(self, name: str, problems: list[str], fine: str) -> bool:
        """Add a check: it fails with the first of its problems, or holds and says `fine`."""
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        self.checks.append(Check(name, not problems, problems[0] + more if problems else fine))
        return not problems
