"""What a model writes: the most likely continuation of a few beginnings, for eyes that distrust figures."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from structprune.calibration.data import cut, encode
from structprune.models.outputs import next_tokens
from structprune.models.streamed import Model
from structprune.progress import Progress, silent

TOKENS = 40
PROMPTS = 3
PROMPT_TOKENS = 32


def beginnings(
    text: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = PROMPTS,
    max_length: int | None = None,
    tokens: int = TOKENS,
) -> list[str]:
    """Take prompts from the beginning of a text, so far apart that none holds what continues another.

    Args:
        text: The running text, in pieces.
        tokenizer: The model's.
        count: How many at most; a short text gives fewer.
        max_length: The most positions the model knows.
        tokens: How many tokens are to be continued.
    """
    room = prompt_length(max_length, tokens)
    if not room:
        return []
    step = room + tokens
    ids = encode(text, tokenizer, limit=count * step)
    return [str(tokenizer.decode(window)) for window in cut(ids, room, step).tolist()]


def prompt_length(max_length: int | None, tokens: int = TOKENS) -> int:
    """Return how many tokens a prompt has, so that `tokens` more fit; 0 where none do."""
    return PROMPT_TOKENS if max_length is None else max(0, min(PROMPT_TOKENS, max_length - tokens - 1))


def generations(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
    first: int | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Continue prompts greedily, until the model ends the text or `tokens` were written.

    Every token takes a forward of its own over all prompts of one length, without a cache: a few prompts cost
    as much as one window of perplexity, and a streamed model is read `tokens` times.

    Args:
        model: In memory or streamed.
        tokenizer: The model's.
        prompts: Texts to continue.
        tokens: How many tokens are written at most.
        first: A beginning-of-sequence token to put before each prompt.
        progress: Told (stage, tokens written, tokens).

    Returns:
        The continuations, without their prompts.
    """
    opening = [] if first is None else [first]
    encoded = [opening + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    written: dict[int, str] = {}
    lengths = sorted({len(ids) for ids in encoded})
    tell = partial(progress, f"continue {len(prompts)} prompts")
    tell(0, total := tokens * len(lengths))
    for place, length in enumerate(lengths):
        # Prompts of one length form a batch without padding.
        rows = [index for index, ids in enumerate(encoded) if len(ids) == length]
        ids = torch.tensor([encoded[index] for index in rows])
        for count in range(tokens):
            ids = torch.cat([ids, next_tokens(model, {"input_ids": ids}).to(ids.device)], dim=1)
            tell(place * tokens + count + 1, total)
        for index, row in zip(rows, ids[:, length:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            written[index] = str(tokenizer.decode(row[:end]))
    return [written[index] for index in range(len(prompts))]
