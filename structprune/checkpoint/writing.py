"""How a run treats the place that it writes to: a value that travels whole from the command line."""

from dataclasses import dataclass
from typing import Literal, get_args

from structprune.errors import UsageError

Unchanged = Literal["copy", "link", "refer"]


@dataclass(frozen=True)
class Writing:
    """How to write a result.

    Args:
        overwrite: Replace an existing output once the new one is complete.
        restart: Forget what an interrupted run left, rather than to go on from it.
        reload: Open the result in a fresh process; without it the proof is of the files alone.
        keep: A complete result of the very same run stays as it is, and its report is read back.
        unchanged: What becomes of a weight file of which nothing changes. "copy": the result gets its own,
            which shares its bytes with the source until either is edited, where the file system can do that.
            "link": a hard link, so that an edit of one is an edit of both. "refer": the result holds only
            where the weights are and their hashes, and nothing but structprune opens it.

    Raises:
        UsageError: `unchanged` is none of these.
    """

    overwrite: bool = False
    restart: bool = False
    reload: bool = True
    keep: bool = False
    unchanged: Unchanged = "copy"

    def __post_init__(self) -> None:
        if self.unchanged not in get_args(Unchanged):
            known = ", ".join(get_args(Unchanged))
            raise UsageError(f"unchanged {self.unchanged!r} is not known", hint=f"one of: {known}")

    @property
    def shaping(self) -> dict[str, str]:
        """Return what of this shapes the bytes of a result, for the fingerprint of its run."""
        return {"unchanged": self.unchanged} if self.unchanged == "refer" else {}

    def refuse(self, *ways: Unchanged, because: str) -> None:
        """Check that weights are not to be treated in a way that makes no sense of a run.

        Args:
            ways: Those that make none.
            because: Why.

        Raises:
            UsageError: One of them is asked for.
        """
        if self.unchanged in ways:
            flag = f"--{self.unchanged}"
            raise UsageError(f"{flag}: {because}", hint=f"leave {flag} out")
