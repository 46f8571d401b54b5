"""The tables of `tokens_quality.py`: one line of each method and share, and which method is best where."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from cells import Cell
from figures import markdown
from tokens_plots import ERRORS, file_of

from structprune.calibration.text_source import DEMO_VISION

# What knows nothing of the picture.
BASELINES = ("random_tokens", "grid_tokens", "downsample")
NOTE = (
    "Left: what the last block computes, mean over images; FLOPs: operations of visual tokens in the blocks, "
    "image: of an image in tower, projector and blocks, both against dense. Cache: its bytes after prompts "
    "of 16 questions, text included. Prefill, choosing: the processor's seconds in the language model, over "
    "a dense prefill; of a model as small as this, where a hook is as dear as a product: tokens.py has a "
    "larger one. Less random: paired, with a 95% interval. Worst: the kind of question that loses most "
    "against dense. Answer patches: of those that hold a part of what is asked about, the share that the "
    "last block computes. downsample leaves the nearest square number of tokens."
)
SHOWN = """What two methods keep of a picture, beside as many tokens at random; `fastv` chooses after
two blocks, in which tokens have read one another:

    structprune prune demo-vision OUT --method divprune --set target.keep_ratio=0.11
    structprune show OUT --image structprune/demo/vision/calibration/000.png \\
        --question "What colour is the triangle?" -o scripts/bench/demo-vision-divprune.png

![tokens that divprune keeps](demo-vision-divprune.png)

![tokens that fastv keeps](demo-vision-fastv.png)
"""
HEADER = ["method", "left", "FLOPs", "image", "cache", "prefill", "choosing", "right", "less random", "worst"]


def section(kept: Mapping[str, Any]) -> str:
    """Return the tables of a model."""
    dense, kinds = kept["dense"], kept["kinds"]
    names = sorted(set(kinds))
    told = f"{kept['protocol']}. {kept['processor']}, {kept['date']}."
    parts = [f"### {kept['model']}", f"![right answers against tokens kept]({file_of(kept)})", told]
    header = [*HEADER, *names, "answer patches"]
    blank = [""] * (len(HEADER) - 4)
    first = ["dense", *blank, f"{fmean(dense):.1%}", "", "", *by_kind(dense, kinds, names), ""]
    for share in dict.fromkeys(one["share"] for one in kept["cells"]):
        cells = [one for one in kept["cells"] if one["share"] == share]
        random = pooled([one for one in cells if one["method"] == BASELINES[0]])
        rows = [first]
        for method in dict.fromkeys(one["method"] for one in cells):
            mine = [one for one in cells if one["method"] == method]
            rows.append(row(method, mine, random, dense, kinds, kept.get("images", 1)))
        ranked = sorted(rows[1:], key=lambda one: (one[0] not in BASELINES, -float(one[7].rstrip("%"))))
        parts += [f"**{share:.1%} of the tokens**", markdown(header, [first, *ranked])]
    return "\n\n".join(parts + [SHOWN] * (kept["model"] == DEMO_VISION))


def row(
    method: str,
    cells: list[Cell],
    random: Sequence[float],
    dense: Sequence[bool],
    kinds: Sequence[str],
    images: int,
) -> list[str]:
    """Return a line of the table, of several seeds the mean; of prompts with so many images."""
    facts, mine, names = cells[0]["facts"], pooled(cells), sorted(set(kinds))
    shares, whole = shares_of(mine, kinds, names), shares_of(dense, kinds, names)
    lost = [after - before for after, before in zip(shares, whole, strict=True)]
    worst = names[lost.index(min(lost))]
    on_answer = [one["on_answer"] for one in cells if one.get("on_answer") is not None]
    return [
        method,
        f"{fmean(one['left'] for one in cells):.3g} of {images * facts['visual_tokens']}",
        f"{facts['visual_flops']:.3f}",
        f"{facts['image_flops']:.3f}" if "image_flops" in facts else "",
        f"{fmean(one['cache'] for one in cells):.2f}",
        f"{fmean(one['prefill'] for one in cells):.2f}",
        f"{fmean(one['choosing'] for one in cells):.3f}",
        f"{fmean(mine):.1%}",
        "" if method == BASELINES[0] or not random else paired(mine, random),
        f"{worst} {min(lost):+.0%}",
        *by_kind(mine, kinds, names),
        f"{fmean(on_answer):.0%}" if on_answer else "",
    ]


def pooled(cells: Sequence[Cell]) -> list[float]:
    """Return of every question how often it is answered right, over seeds."""
    return [fmean(one) for one in zip(*(cell["right"] for cell in cells), strict=True)]


def paired(mine: Sequence[float], other: Sequence[float]) -> str:
    """Return the mean difference of two models' answers to the same questions, with its 95% interval."""
    mean, error = interval(mine, other)
    return f"{mean:+.1%} ± {error:.1%}"


def interval(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of two models on the same questions, and half its 95% interval."""
    each = [one - two for one, two in zip(mine, other, strict=True)]
    mean = fmean(each)
    error = math.sqrt(fmean((one - mean) ** 2 for one in each) / len(each))
    return mean, ERRORS * error


def shares_of(right: Sequence[float], kinds: Sequence[str], names: Sequence[str]) -> list[float]:
    """Return the share of right answers by kind."""
    return [fmean(one for one, kind in zip(right, kinds, strict=True) if kind == name) for name in names]


def by_kind(right: Sequence[float], kinds: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the same as text."""
    return [f"{one:.0%}" for one in shares_of(right, kinds, names)]
