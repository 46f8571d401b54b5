"""What recovery trains on: windows of a text, their order, and some that are kept away for judging."""

import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from structprune.calibration.data import (
    LEFT_WINDOWS,
    READ_AHEAD,
    Left,
    begin,
    cut,
    encode,
    hash_of,
    not_drawn,
    pieces,
    sequence_start,
    window_length,
)
from structprune.calibration.text_source import TextSource
from structprune.errors import InputError
from structprune.recipe.options import RecoverOptions

# So many windows tell one percent of loss apart; more would only make the checks as dear as the training.
HELD_OUT_LIMIT = 64


@dataclass(frozen=True)
class TrainingWindows:
    """Windows of tokens and where they come from.

    Attributes:
        ids: Shape [windows, length], int64.
        facts: JSON-safe: source, column, split, revision, seed, windows, length, bos, tokens_available, and
            the sha256 of the token ids.
        left: What was not drawn.
    """

    ids: Tensor
    facts: dict[str, Any]
    left: Left


def draw(
    text: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    length: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> TrainingWindows:
    """Draw windows that do not overlap; unlike calibration it makes do with fewer than asked.

    Args:
        text: Where they come from.
        tokenizer: The model's.
        limit: The most windows to draw: no more than training can look at.
        length: Tokens per window; min(2048, max_length) by default.
        max_length: The most positions the model knows; None when it has no such limit.
        seed: Decides which windows are drawn, and their order.

    Raises:
        UsageError: `length` is longer than `max_length`.
        InputError: There are fewer than two windows, or the source cannot be trusted.
        EnvironmentFailure: The source cannot be reached.
    """
    tokens = window_length(length, max_length)
    first = sequence_start(tokenizer)
    body = tokens - (first.token is not None)
    furthest = limit * body * READ_AHEAD
    ids = encode(pieces(text), tokenizer, limit=furthest + LEFT_WINDOWS * body)
    available = min(ids.numel(), furthest)
    windows = begin(cut(ids, body), first.token)
    if available // body < 2:
        raise InputError(
            f"{text.source}: {available} tokens are too few: recovery needs at least 2 windows of {tokens}",
            hint=f"use a length of at most {available // 2}, or more text"
            if available > 3
            else "use more text",
        )
    drawn = random.Random(seed).sample(range(available // body), min(limit, available // body))
    inputs = windows[drawn]
    facts = {
        **asdict(text),
        "seed": seed,
        "windows": len(inputs),
        "length": tokens,
        "bos": first.rule,
        "tokens_available": available,
        "sha256": hash_of(inputs),
    }
    return TrainingWindows(inputs, facts, Left(text, windows[not_drawn(len(windows), drawn)], first))


def windows_wanted(options: RecoverOptions) -> int:
    """Return the most windows that a training draws: what its steps can look at, and what is held out."""
    looked_at = options.steps * options.batch_size
    return options.samples or int(looked_at / (1 - options.held_out)) + HELD_OUT_LIMIT


def held_out_of(windows: int, fraction: float) -> int:
    """Return how many of at least two windows are kept away from training: one or more, 64 at most."""
    return min(max(1, round(windows * fraction)), HELD_OUT_LIMIT, windows - 1)


def split_off(windows: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the windows to train on and those to judge by, drawn with the seed.

    Args:
        windows: Shape [windows, length].
        held_out: Fraction kept away from training; see `held_out_of`.
        seed: Decides which.

    Raises:
        InputError: There are fewer than two windows.
    """
    if len(windows) < 2:
        raise InputError(
            f"{len(windows)} windows of text are too few: recovery needs one to train on and one to judge by",
            hint="use more text or a smaller length",
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    kept_away = held_out_of(len(windows), held_out)
    return windows[order[kept_away:]], windows[order[:kept_away]]


class Order:
    """The order in which windows are looked at: all of them epoch after epoch, each in an order of its own.

    Where a step's windows lie in it follows from the step's number, so a run that resumes need not rewind.

    Args:
        count: How many windows there are.
        seed: Decides the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._drawn = -1, [0]

    def slice(self, start: int, size: int) -> list[int]:
        """Return which windows come at `size` places from `start` on; places count from 0 without end."""
        return [self._at(place) for place in range(start, start + size)]

    def _at(self, place: int) -> int:
        epoch, within = divmod(place, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._drawn = random.Random(f"{self._seed} {epoch}").sample(range(self._count), self._count)
        return self._drawn[within]
