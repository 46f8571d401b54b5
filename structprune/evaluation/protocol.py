"""How a perplexity was measured: what is stamped on it, and the refusal to compare unlike things."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from structprune.calibration.data import SequenceStart, encode, hash_of
from structprune.errors import InputError, UsageError
from structprune.evaluation.perplexity import Windows, windows_of
from structprune.machine import versions
from structprune.models.streamed import Model

PACKAGES = ("structprune", "torch", "transformers", "lm_eval")


def cut_windows(
    text: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    length: int,
    start: SequenceStart,
    stride: int | None = None,
    windows: int | None = None,
) -> tuple[Windows, dict[str, Any]]:
    """Tokenise a text and cut it into windows.

    Args:
        text: The running text, in pieces.
        tokenizer: The model's.
        source: What to call the text in an error.
        length: Tokens per window.
        start: Which beginning-of-sequence token goes where.
        stride: Tokens from one window's beginning to the next; by default none overlap.
        windows: Only so many of them; the text is then read only as far as they need, in pieces.

    Returns:
        The windows, and their stamp: `source`, `sha256` of the text that was read, `tokens_sha256`,
        `tokenizer`, `tokens` (in the text that was read), `length`, `stride` (None: no overlap), `windows`,
        `scored_tokens`, `bos`.

    Raises:
        UsageError: `stride` is not between 1 and `length`, or `windows` is not positive.
        InputError: The text is shorter than one window.
    """
    if stride is not None and not 1 <= stride <= length:
        raise UsageError(
            f"stride is {stride}, expected 1 to the length of a window, {length}",
            hint="leave --stride out for windows that do not overlap",
        )
    if windows is not None and windows < 1:
        raise UsageError(
            f"windows is {windows}, expected at least 1", hint="leave --windows out to read the whole text"
        )
    body = length - (start.token is not None)
    step = body if stride is None else min(stride, body)
    digest = hashlib.sha256()
    needed = None if windows is None else body + (windows - 1) * step
    ids = encode(_hashed(text, digest), tokenizer, limit=needed)
    found = windows_of(ids, length, stride=step, first=start.token)
    if not found.starts:
        raise InputError(
            f"{source}: {ids.numel()} tokens are too few for one window of length {length}",
            hint=f"use a longer text, or a length of at most {ids.numel() + length - body}",
        )
    return found, {
        "source": source,
        "sha256": digest.hexdigest(),
        "tokens_sha256": hash_of(found.inputs),
        "tokenizer": hash_of_tokenizer(tokenizer),
        "tokens": ids.numel(),
        "length": length,
        "stride": None if step == body else step,
        "windows": len(found.starts),
        "scored_tokens": found.scored,
        "bos": start.rule,
    }


def same_footing(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    dense: Model,
    dense_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Check that a model and the one it is compared with compute in one dtype and read the same tokens.

    Raises:
        UsageError: They do not; names what differs.
    """
    if model.dtype != dense.dtype:
        raise UsageError(
            f"the model computes in {dtype_of(model)}, the one it is compared with in {dtype_of(dense)}",
            hint="open both with the same dtype",
        )
    if dense_tokenizer is not None and hash_of_tokenizer(tokenizer) != hash_of_tokenizer(dense_tokenizer):
        raise UsageError(
            "the two models have different tokenizers, so their figures cannot be compared",
            hint="compare with the dense model that this one was pruned from",
        )


def dtype_of(model: Model) -> str:
    """Return the name of the dtype that a model computes in, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of what decides how a tokenizer cuts a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        # Left behind by whoever called the tokenizer last; every call of ours sets its own.
        content.update(truncation=None, padding=None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stamped_versions() -> dict[str, str | None]:
    """Return the versions of the packages that the figures depend on; None for those not installed."""
    return {name: found for name, found in versions().items() if name in PACKAGES}


def _hashed(text: Iterable[str], digest: "hashlib._Hash") -> Iterator[str]:
    for piece in text:
        digest.update(piece.encode())
        yield piece
