"""What a hub answers when it does not give what was asked for, told apart and in one line."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from structprune.errors import EnvironmentFailure


class _Answer(NamedTuple):
    """One way in which a hub says no."""

    said: str
    hint: str


_OFFLINE = _Answer(
    "not fetched before, and HF_HUB_OFFLINE forbids to ask the hub",
    "unset HF_HUB_OFFLINE, or give local files",
)
_UNREACHED = _Answer("the hub could not be reached", "no network? give local files")
_GATED = _Answer("access is restricted", "ask for access on its page, then log in with `hf auth login`")
_TOKEN = _Answer(
    "the hub does not accept the token of this machine", "log in anew with `hf auth login`, or unset HF_TOKEN"
)
_BUSY = _Answer("the hub was asked too often (429)", "try again later, or log in with `hf auth login`")
_REVISION = _Answer("the hub has no such revision of it", "--revision takes a branch, a tag or a commit")
_NOWHERE = _Answer(
    "no such folder here and no such model on the hub",
    "check the name; what is private needs `hf auth login`",
)
_FAULT = _Answer("the hub has a fault of its own", "try again later")


def hub_failure(error: BaseException, what: str) -> EnvironmentFailure:
    """Return what stands for an error of the hub's client; its own text, which may hold a token, is left out.

    Args:
        error: As it was raised; what caused it is looked at first, because the client wraps its answers.
        what: What was asked for.
    """
    answer = next((found for one in _chain(error) if (found := _answer_of(one)) is not None), _UNREACHED)
    return EnvironmentFailure(f"{what}: {answer.said}", hint=answer.hint)


def is_answer(error: BaseException) -> bool:
    """Tell whether an error comes from the hub or the way to it, and not from what was fetched."""
    return any(_answer_of(one) is not None for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error's causes, the first of them first, and then the error itself."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    yield from reversed(found)


def _answer_of(error: BaseException) -> _Answer | None:
    # By names: the client is imported where it is used, and its classes move from release to release.
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in names:
        return _GATED
    if "RevisionNotFoundError" in names:
        return _REVISION
    if status == 429:
        return _BUSY
    if "RepositoryNotFoundError" in names:
        return _NOWHERE
    if status in (401, 403):
        return _TOKEN if status == 401 else _GATED
    if isinstance(status, int) and status >= 500:
        return _FAULT
    if "OfflineModeIsEnabled" in names:
        return _OFFLINE
    if "LocalEntryNotFoundError" in names and os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return _OFFLINE
    if names & {
        "ConnectionError",
        "ConnectError",
        "TimeoutError",
        "TimeoutException",
        "LocalEntryNotFoundError",
    }:
        return _UNREACHED
    return None
