"""Everything that can go wrong, and the exit code that the command line gives it.

StructpruneError            1  a bug of ours, never raised on purpose
├── MethodError             1  a bug in the file of a method, whoever wrote it
├── UsageError              2  the command line, a recipe, a field's value
├── InputError              3  a model, data or adapter that cannot be trusted
├── EnvironmentFailure      4  disk, memory, permission, network, a lock held by another run
├── QualityError            5  a numerical failure, or a quality gate that was missed
├── VerificationError       6  written, but what stands on disk is not what was asked
└── Interrupted       130/143  stopped by a signal; the same command resumes
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class StructpruneError(Exception):
    """Base of all errors raised on purpose: what is wrong, where, and what to do about it.

    Args:
        message: What was found and what was expected, naming the file, tensor or key; one line.
        hint: What the user can do; one line, never empty.

    Attributes:
        rank: Which process of a run met it, where all raise it; None: this one alone does.
    """

    exit_code: int = 1
    kind: ClassVar[str] = "bug"
    rank: int | None = None

    def __init__(self, message: str, *, hint: str) -> None:
        assert hint, "whoever refuses says what to do"
        # What is quoted from a file may hold line breaks; whoever reads a log must not be misled by them.
        message = " ".join(message.splitlines())
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message and the hint as one line."""
        return f"{self.message} ({self.hint})"


class MethodError(StructpruneError):
    """The file of a method is unfinished, or what it returned is not what methods of its family return."""

    kind = "method"


class UsageError(StructpruneError):
    """The command line or a recipe asks for something that cannot be."""

    exit_code = 2
    kind = "usage"


class InputError(StructpruneError):
    """A model folder, a data file or an adapter is damaged, unsupported or contradicts itself."""

    exit_code = 3
    kind = "input"


class EnvironmentFailure(StructpruneError):
    """The machine refuses: disk, memory, permission, network, or a lock that another run holds."""

    exit_code = 4
    kind = "environment"


class RankLost(EnvironmentFailure):
    """Another process of the same run has ended, and this one's work with it; that one says why."""


class QualityError(StructpruneError):
    """The numbers went wrong (NaN, no improvement) or a quality gate was missed."""

    exit_code = 5
    kind = "quality"


class VerificationError(StructpruneError):
    """The written folder does not hold what was asked for."""

    exit_code = 6
    kind = "verification"


class Interrupted(StructpruneError):
    """A signal stopped the run; its partial folder resumes with the same command.

    Args:
        signal_number: The signal received; the exit code is 128 plus it.
    """

    kind = "interrupted"

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}", hint="run the same command again to resume")
        self.exit_code = 128 + signal_number


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the nearest known one, or all of them."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(choices)}"


def counted(count: int, noun: str) -> str:
    """Return how many there are of something: "1 block", "1,024 blocks"."""
    plural = f"{noun[:-2]}ices" if noun.endswith("matrix") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
