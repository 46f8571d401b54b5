"""What running with fewer visual tokens costs and saves, on a random LLaVA of 300 M parameters.

Prefill of a prompt with one image of 576 tokens, and decoding after it. Keep all: the engine attached to a
model of which it drops nothing, over the plain one. Fewer: a pruned prefill over the plain model's with as
many tokens in every block, what choosing takes apart: the plain one is timed with `inputs_embeds` of three
lengths, and what a block takes of another is read off the parabola through them. Choosing alone: over a
dense prefill, also of an image of 2916 tokens, which each method reads once. One process and one thread,
whose seconds on the processor are counted: other programs do not show in them. In every round all take
turns, and each figure is the median of the rounds' own ratios. Memory: by how much the process grows at its
peak while it reads the prompt, which is activations and cache; over the plain model's. `--memory` measures
that alone, and takes the rest from the JSON of an earlier call.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from figures import markdown, write_section
from tokens_model import BLOCKS, PATCH, TEXT, prompt, random_llava
from torch import Tensor
from transformers import Cache, LlavaForConditionalGeneration

from structprune.machine import environment, give_back_memory, own_peak_rss, reset_peak_rss
from structprune.models.shapes import cache_entry, cache_of
from structprune.pruners.catalogue import find
from structprune.pruners.token._family import TokenPruner
from structprune.pruners.while_running import pruning
from structprune.runtime.attach import attach, detach
from structprune.runtime.drop import Drop
from structprune.runtime.flops import BlockCost

NEW = 16
Counts = Sequence[tuple[int, int]]
# Of an image of high resolution, about as many tokens as LLaVA-NeXT's largest has.
LARGE = 756
# Lengths of which the plain model is timed: all tokens, a quarter of the image's, and one between.
SIZES = (576, 320, 144)
METHODS = ("random_tokens", "grid_tokens", "divprune", "fastv", "fitprune")
# FitPrune's plan is made by hand, for a random model has none to fit: of every block what is left after it.
SHARES = [max(0.22, 1 - 0.06 * number) for number in range(1, BLOCKS + 1)]


@contextmanager
def running(model: LlavaForConditionalGeneration, method: str) -> Iterator[tuple[TokenPruner, Counts]]:
    """Let a model run with fewer tokens, for the length of a `with`.

    Yields:
        The pruner, and of every block how many tokens of an image its attention and feed-forward compute.
    """
    size = (model.config.vision_config.image_size // PATCH) ** 2
    pruner = find(method).model_validate({} if method == "fitprune" else {"target": {"keep_ratio": 0.25}})
    assert isinstance(pruner, TokenPruner)
    if method != "fitprune":
        with pruning(model, pruner):
            yield pruner, pruner.counts(model, size)
        return
    left = [size, *(round(share * size) for share in SHARES)]
    drops = [
        Drop(block, True, torch.tensor(share, dtype=torch.float64), pruner)
        for block, share in enumerate(SHARES)
        if left[block + 1] < left[block]
    ]
    attach(model, method, drops)
    try:
        yield pruner, [*pairwise(left)]
    finally:
        detach(model, method)


@torch.no_grad()
def seconds(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[float, float, Any]:
    """Return the processor's seconds for a prompt, for what follows, and the cache at the end."""
    began = time.process_time()
    output = model(**batch, use_cache=True, logits_to_keep=1)
    read = time.process_time()
    for _ in range(NEW):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, **cache_entry(output), use_cache=True)
    return read - began, time.process_time() - read, cache_of(output)


def cache_bytes(cache: Cache) -> int:
    """Return what the keys and values of a cache take."""
    return sum(one.keys.nbytes + one.values.nbytes for one in cache.layers)


@torch.no_grad()
def growth(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> int:
    """Return by how many bytes this process grows at its peak while it reads a prompt."""
    give_back_memory()
    reset_peak_rss()
    before = own_peak_rss()
    model(**batch, use_cache=True, logits_to_keep=1)
    return own_peak_rss() - before


def memory(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, float]:
    """Return the growth of each kind of run, of the plain model's."""
    growth(model, batch)  # the first time kernels take memory of their own
    dense = growth(model, batch)
    with keeping_all(model):
        found = {"keep all": growth(model, batch) / dense}
    for name in METHODS:
        with running(model, name):
            found[name] = growth(model, batch) / dense
    return found


@torch.no_grad()
def embedded(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Return what the language model reads of a prompt, shape [1, tokens, hidden]."""
    found: list[Tensor] = []
    module = model.model.language_model
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**batch, logits_to_keep=1)
    handle.remove()
    return found[0]


@contextmanager
def keeping_all(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Attach the engine with a drop that drops nothing."""
    chooser = find("random_tokens")()
    assert isinstance(chooser, TokenPruner)
    attach(model, "all", [Drop(0, False, torch.tensor(10**6), chooser)])
    try:
        yield
    finally:
        detach(model, "all")


@contextmanager
def timing(pruner: TokenPruner) -> Iterator["Timed"]:
    """Time what a pruner chooses, for the length of a `with`."""
    timed = Timed(type(pruner).choose.__get__(pruner))
    object.__setattr__(pruner, "choose", timed)
    try:
        yield timed
    finally:
        object.__delattr__(pruner, "choose")


class Timed:
    """Adds up what a method's `choose` takes.

    Args:
        choose: The method's.
    """

    def __init__(self, choose: Callable[..., Tensor]) -> None:
        self._choose, self.seconds = choose, 0.0

    def __call__(self, *args: Any) -> Tensor:
        """Choose, and note the processor's seconds."""
        began = time.process_time()
        found = self._choose(*args)
        self.seconds += time.process_time() - began
        return found


def measure(model: LlavaForConditionalGeneration, batch: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    """Return the medians of all ratios of time, and what the caches take."""
    tokens = batch["input_ids"].shape[1]
    plain = embedded(model, batch)
    rows: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds + 1):
        dense, decode, cache = seconds(model, batch)
        full_bytes = cache_bytes(cache)
        with keeping_all(model):
            kept, kept_decode, _ = seconds(model, batch)
        if number:  # the first round warms up
            rows.setdefault("keep all", []).append({"prefill": kept / dense, "decode": kept_decode / decode})
        short = [seconds(model, {"inputs_embeds": plain[:, : size + TEXT].clone()})[:2] for size in SIZES]
        for name in METHODS:
            with running(model, name) as (pruner, counts), timing(pruner) as timed:
                mine, my_decode, cache = seconds(model, batch)
            as_short, as_short_decode = (plain_seconds(one, counts) for one in zip(*short, strict=True))
            if number:
                rows.setdefault(name, []).append(
                    {
                        "of dense": mine / dense,
                        "as short": (mine - timed.seconds) / as_short,
                        "choosing": timed.seconds / dense,
                        "decode": my_decode / decode,
                        "decode as short": my_decode / as_short_decode,
                        "cache": cache_bytes(cache) / full_bytes,
                    }
                )
    found = {
        name: {key: median(one[key] for one in cells) for key in cells[0]} for name, cells in rows.items()
    }
    return {"rows": found, "tokens": tokens, "parameters": sum(one.numel() for one in model.parameters())}


def plain_seconds(timed: Sequence[float], counts: Counts) -> float:
    """Return what a plain model would take with so many tokens in its blocks.

    Args:
        timed: What it takes with each of `SIZES` in all of them.
        counts: Of every block the tokens of its attention and of its feed-forward.
    """
    # What a block takes grows with its tokens and with their square.
    powers = torch.tensor([[size**power for power in range(3)] for size in SIZES], dtype=torch.float64)
    curve = torch.linalg.solve(powers, torch.tensor(timed, dtype=torch.float64)).tolist()
    sizes = [fmean(pair) for pair in counts]
    return fmean(sum(factor * size**power for power, factor in enumerate(curve)) for size in sizes)


def of_a_large_image() -> dict[str, float]:
    """Return what choosing among the tokens of a large image takes, of a dense prefill, by method."""
    model, batch = random_llava(LARGE), prompt(LARGE)
    dense, _, _ = seconds(model, batch)
    found = {}
    for name in METHODS:
        with running(model, name) as (pruner, _), timing(pruner) as timed:
            seconds(model, batch)
        found[name] = timed.seconds / dense
    return found


def counted_wide() -> float:
    """Return what FitPrune's choosing takes of a large image at the width of a 7 B model, in operations."""
    size, blocks = (LARGE // PATCH) ** 2, 32
    cost = BlockCost(hidden=4096, queries=4096, keys=4096, feed_forward=11008)
    left = [size, *(round(max(SHARES[-1], 1 - 0.06 * number) * size) for number in range(1, blocks + 1))]
    spent = find("fitprune")().operations(cost, size, [*pairwise(left)])
    return spent / (blocks * cost.operations(size))


def section(found: dict[str, Any], rounds: int) -> str:
    """Return the table."""
    whole = found["rows"]["keep all"]
    rows = [
        [
            name,
            *(f"{row[key]:.2f}" for key in ("of dense", "as short")),
            *(f"{row[key]:.2%}" for key in ("choosing", "choosing, large")),
            *(f"{row[key]:.2f}" for key in ("decode", "decode as short", "cache", "memory")),
        ]
        for name, row in found["rows"].items()
        if name != "keep all"
    ]
    large = (LARGE // PATCH) ** 2
    header = ["method", "prefill / dense", "prefill / as many tokens", "choosing / dense prefill"]
    header += [
        f"of {large} tokens",
        "decode / dense",
        "decode / as many tokens",
        "cache bytes / dense",
        "memory / dense",
    ]
    return (
        f"{markdown(header, rows)}\n\nA quarter of the tokens is left; FitPrune deletes 6% of them "
        f"in each of {len({*SHARES})} blocks until {SHARES[-1]:.0%} are. Memory: activations and cache of a "
        "prefill at their peak. FitPrune looks at all pairs of tokens, which is much where a model is as "
        f"narrow as this one (1024): at a width of 4096 it is at most {counted_wide():.1%} of the operations "
        f"of {(LARGE // PATCH) ** 2} tokens. The engine "
        f"attached and nothing dropped: prefill {whole['prefill']:.2f}, decode {whole['decode']:.2f}, memory "
        f"{whole['memory']:.2f} of the plain model's. Random LLaVA of "
        f"{found['parameters'] / 1e6:.0f} M parameters, float32, {found['tokens']} tokens, {NEW} decoded, "
        f"SDPA, one thread, medians of {rounds} rounds. {environment()['machine']['processor']}, a shared "
        "host: runs of this bench differ by up to a seventh in what is compared with as many tokens, and "
        "what is below 1 there is noise."
    )


def main() -> None:
    """Measure, print and, with --write, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", action="store_true", help="measure memory alone, the rest is in --json")
    parser.add_argument("--write", action="store_true", help="write the section of README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, batch = random_llava(), prompt()
    found = json.loads(options.json.read_text()) if options.memory else measure(model, batch, options.rounds)
    for name, share in memory(model, batch).items():
        found["rows"][name]["memory"] = share
    del model
    if not options.memory:
        for name, share in of_a_large_image().items():
            found["rows"][name]["choosing, large"] = share
    if options.json:
        options.json.write_text(json.dumps(found))
    print(json.dumps(found, indent=1))
    if options.write:
        write_section(Path(__file__).name, section(found, options.rounds))


if __name__ == "__main__":
    main()
