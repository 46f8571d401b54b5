"""What recovery trains on: windows of a text, cut as calibration cuts them, some of them kept away for judging."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from structprune.calibration.data import (
    READ_AHEAD,
    begin,
    cut,
    encode,
    hash_of,
    opening,
    pieces,
    window_length,
)
from structprune.errors import InputError
from structprune.recipe import RecoverOptions

# So many windows tell one percent of loss apart; more would only make the checks as dear as the training.
HELD_OUT_LIMIT = 64


@dataclass(frozen=True)
class Windows:
    """Windows of tokens and where they come from.

    Attributes:
        ids: Shape [windows, length], int64.
        facts: JSON-safe: source, column, split, revision, seed, windows, length, bos, tokens_available, sha256.
    """

    ids: Tensor
    facts: dict[str, Any]


def draw(
    tokenizer: PreTrainedTokenizerBase,
    options: RecoverOptions,
    *,
    max_length: int | None = None,
    seed: int = 0,
) -> Windows:
    """Draw windows that do not overlap; unlike calibration it takes what there is when there are fewer than asked.

    Args:
        tokenizer: The model's.
        options: Which text and how much of it; without `samples`, as much as the steps can look at.
        max_length: The most positions the model knows; None when it has no such limit.
        seed: Decides which windows are drawn, and their order.

    Raises:
        UsageError: `length` is longer than `max_length`.
        InputError: There are fewer than two windows, or the source cannot be trusted.
        EnvironmentFailure: The source cannot be reached.
    """
    length = window_length(options.length, max_length)
    first = opening(tokenizer)
    body = length - (first.window is not None)
    limit = options.samples or options.steps * options.batch_size + HELD_OUT_LIMIT
    text = pieces(options.data, column=options.column, split=options.split, revision=options.revision)
    ids = encode(text, tokenizer, limit=limit * body * READ_AHEAD, first=first.text)
    windows = cut(ids, body)
    if len(windows) < 2:
        raise InputError(
            f"{options.data}: {ids.numel()} tokens are too few: recovery needs at least 2 windows of length {length}",
            hint=f"use a length of at most {max(2, ids.numel() // 2)}, or more text",
        )
    drawn = random.Random(seed).sample(range(len(windows)), min(limit, len(windows)))
    inputs = begin(windows[drawn], first.window)
    facts = {
        "source": options.data,
        "column": options.column,
        "split": options.split,
        "revision": options.revision,
        "seed": seed,
        "windows": len(inputs),
        "length": length,
        "bos": first.rule,
        "tokens_available": ids.numel(),
        "sha256": hash_of(inputs),
    }
    return Windows(inputs, facts)


def split_off(windows: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the windows to train on and those to judge by, drawn with the seed.

    Args:
        windows: Shape [windows, length].
        held_out: Fraction kept away from training; at least one window, at most 64.
        seed: Decides which.

    Raises:
        InputError: There are fewer than two windows.
    """
    if len(windows) < 2:
        raise InputError(
            f"the data fill {len(windows)} windows, recovery needs at least 2: one to train on and one to judge by",
            hint="use more text or a smaller length",
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    kept_away = min(max(1, round(len(windows) * held_out)), HELD_OUT_LIMIT, len(windows) - 1)
    return windows[order[kept_away:]], windows[order[:kept_away]]
