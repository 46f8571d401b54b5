"""What calibration looks at: seeded windows of tokens, cut from a text; for images see `images`.

A source is tokenised from its beginning as one running text. It is cut into windows that do not overlap, and
`samples` of them are drawn with the seed. Every window has the same length, so nothing is ever padded. Where
the tokenizer itself begins a text with a beginning-of-sequence token (Llama, Gemma), every window begins with
one, as every prompt does in use; it counts into the length.
"""

import hashlib
import random
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from structprune.calibration.image_questions import LeftQuestions
from structprune.calibration.text_source import TextSource
from structprune.calibration.texts import name_of, pieces, texts
from structprune.errors import InputError, UsageError
from structprune.models.streamed import Batch

__all__ = [
    "Calibration",
    "cut",
    "encode",
    "load",
    "name_of",
    "pieces",
    "positions",
    "sequence_start",
    "texts",
]

LONGEST_DEFAULT = 2048
# So many times the tokens needed are read at most: enough for the draw to reach past a source's first pages,
# while a corpus of a terabyte costs no more than a book (4 bytes per token: 16 MB for 128 samples of 2048).
READ_AHEAD = 16
# Of the windows that were not drawn, so many tell how good the result is; they cost about what 16 samples do.
LEFT_WINDOWS = 8


@dataclass(frozen=True)
class Left:
    """The last windows of a text that were not drawn: what a run's result may be measured on.

    They are searched from the end of what is read backwards. Behind the furthest window that can be drawn up
    to `LEFT_WINDOWS` more are read: where the text reaches so far, these are left whatever the seed is.

    Attributes:
        text: Where they come from.
        inputs: Shape [windows, tokens], int64, in the order of the text; there may be none.
        bos: Which token each begins with.
    """

    text: TextSource
    inputs: Tensor
    bos: "SequenceStart"


@dataclass(frozen=True)
class Calibration:
    """Batches to calibrate on, and where they come from.

    Attributes:
        batches: `input_ids` [batch, tokens], int64; of a text no attention mask, because nothing is padded.
        facts: JSON-safe: source, column, split, revision, seed, samples, length, bos, tokens_available (those
            that were read), and `sha256` of the token ids, which alone decides whether two calibrations are
            the same. Of questions: `images`, questions_available, and the hash covers pixels.
        left: What was not drawn.
    """

    batches: list[Batch]
    facts: dict[str, Any]
    left: Left | LeftQuestions


def load(
    text: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Calibration:
    """Draw calibration samples; the same arguments give the same tokens in the same order.

    Args:
        text: Where they come from.
        tokenizer: The model's.
        samples: Windows to draw.
        length: Tokens per window; min(2048, max_length) by default.
        seed: Decides which windows are drawn, and their order.
        batch_size: Windows per batch; the last batch may be smaller.
        max_length: The most positions the model knows (`positions` tells); None when it has no such limit.

    Raises:
        UsageError: `length` is longer than `max_length`, or a count is not positive.
        InputError: There are too few tokens, or the source cannot be trusted.
        EnvironmentFailure: The source cannot be reached.
    """
    for name, value in {"samples": samples, "batch_size": batch_size}.items():
        if value < 1:
            raise UsageError(
                f"{name} is {value}, expected at least 1",
                hint=f"leave {name} out for its default, or give a whole number of at least 1",
            )
    tokens = window_length(length, max_length)
    first = sequence_start(tokenizer)
    body = tokens - (first.token is not None)
    furthest = samples * body * READ_AHEAD
    ids = encode(pieces(text), tokenizer, limit=furthest + LEFT_WINDOWS * body)
    available = min(ids.numel(), furthest)
    if available // body < samples:
        raise _too_few(text.source, available, samples, tokens, tokens - body)
    windows = begin(cut(ids, body), first.token)
    drawn = random.Random(seed).sample(range(available // body), samples)
    inputs = windows[drawn]
    facts = {
        **asdict(text),
        "seed": seed,
        "samples": samples,
        "length": tokens,
        "bos": first.rule,
        "tokens_available": available,
        "sha256": hash_of(inputs),
    }
    batches: list[Batch] = [{"input_ids": batch.clone()} for batch in torch.split(inputs, batch_size)]
    return Calibration(batches, facts, Left(text, windows[not_drawn(len(windows), drawn)], first))


def not_drawn(windows: int, drawn: Collection[int]) -> list[int]:
    """Return the last `LEFT_WINDOWS` of so many windows that are not among the drawn ones, in order."""
    taken = set(drawn)
    return [index for index in range(windows) if index not in taken][-LEFT_WINDOWS:]


def positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions the language model of a config knows; None when it has no such limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def window_length(length: int | None, max_length: int | None) -> int:
    """Return the tokens per window: `length`, or min(2048, max_length) when it is None.

    Raises:
        UsageError: `length` is under 2 (nothing to predict), or over `max_length`.
    """
    if length is None:
        return LONGEST_DEFAULT if max_length is None else min(LONGEST_DEFAULT, max_length)
    if length < 2:
        raise UsageError(
            f"length is {length}, expected at least 2 tokens",
            hint="leave length out for its default; one token predicts nothing",
        )
    if max_length is not None and length > max_length:
        # Rotary embeddings run on past it without a word, and every figure after that is about something
        # else.
        raise UsageError(
            f"length {length} is more than the model's max_position_embeddings, {max_length}",
            hint=f"use a length of at most {max_length}",
        )
    return length


@dataclass(frozen=True)
class SequenceStart:
    """Whether a beginning-of-sequence token stands before every window.

    Attributes:
        token: The token, or None.
    """

    token: int | None = None

    @property
    def rule(self) -> str:
        """Return the rule as it is stamped on figures: "window" or "none"."""
        return "none" if self.token is None else "window"


def sequence_start(tokenizer: PreTrainedTokenizerBase) -> SequenceStart:
    """Return what every window begins with: a token where the tokenizer begins texts with one by itself."""
    token = tokenizer.bos_token_id
    own = tokenizer("a", verbose=False)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    starts = isinstance(token, int) and own[0] == token != bare[0]
    return SequenceStart(token if starts else None)


def encode(
    text: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
) -> Tensor:
    """Tokenise a running text piece by piece, without adding special tokens.

    Args:
        text: Pieces of the text; special tokens spelled out in it are read as such.
        tokenizer: The model's.
        limit: Stop reading once there are so many tokens; the rest of the last piece is dropped.

    Returns:
        Token ids, shape [tokens], int32.
    """
    parts: list[Tensor] = []
    count = 0
    for piece in text:
        # verbose=False: a text longer than the model's limit is what we want, and no reason for a warning.
        ids = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        parts.append(torch.tensor(ids, dtype=torch.int32))
        count += len(ids)
        if limit is not None and count >= limit:
            break
    return torch.cat(parts)[:limit] if parts else torch.empty(0, dtype=torch.int32)


def cut(ids: Tensor, length: int, stride: int | None = None) -> Tensor:
    """Cut ids into windows of exactly `length`, one every `stride` tokens, and drop what is left.

    Args:
        ids: Shape [tokens].
        length: Tokens per window.
        stride: Tokens from one window's beginning to the next; `length` by default, so that none overlap.

    Returns:
        Shape [windows, length], int64.
    """
    if ids.numel() < length:
        return torch.empty(0, length, dtype=torch.int64)
    return ids.unfold(0, length, stride or length).long()


def begin(windows: Tensor, token: int | None) -> Tensor:
    """Put a token before every window; shape [windows, length] or, with a token, [windows, length + 1]."""
    if token is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), token, dtype=windows.dtype), windows], dim=1)


def hash_of(ids: Tensor) -> str:
    """Return the sha256 of token ids and their shape, the same on every machine."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.to(torch.int64).cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _too_few(source: str, available: int, samples: int, tokens: int, extra: int) -> InputError:
    """Say how many tokens there are, how many it takes, and what would fit; `extra`: a window's own BOS."""
    body = tokens - extra
    fits = []
    if available // body:
        fits.append(f"{available // body} samples of length {tokens}")
    if available // samples + extra >= 2:
        fits.append(f"{samples} samples of length {available // samples + extra}")
    need = f"{samples} samples of length {tokens} need {samples * body}"
    return InputError(
        f"{source}: it has {available} tokens, which are too few: {need}",
        hint=f"what fits: {', or '.join(fits)}" if fits else "use a longer text",
    )
