"""A page of pictures: which tokens of four images each token pruner keeps, of the demo that sees.

    python scripts/bench/tokens_pictures.py [--share 0.11] [--write]

What is kept is what the last block computes; where tokens are merged, it is the token that holds them.
"""

import argparse
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import README, write_section
from tokens_quality import Bench, token_methods
from torch import Tensor

from structprune.calibration.image_questions import ImageQuestion, read_questions
from structprune.calibration.images import batch_of
from structprune.calibration.text_source import DEMO_VISION, TextSource
from structprune.errors import UsageError
from structprune.pruners.catalogue import find
from structprune.pruners.while_running import pruning
from structprune.report.patches import Patches, patches_of
from structprune.runtime.attach import engine_of

KINDS = ("count", "place", "presence", "shape")
# Inches of a picture, and what is left of a dropped patch before white.
SIDE, FAINT, DPI, COLOURS_KEPT, COLUMNS = 1.05, 0.2, 80, 128, 3


@torch.no_grad()
def kept_of(bench: Bench, method: str, share: float) -> list[Tensor]:
    """Return which patches of each picture are left, bool [tokens]; none where others stand for them."""
    name, _, queries = method.partition(" ")
    fields: dict[str, Any] = {"target": {"keep_ratio": share}} | ({"queries": queries} if queries else {})
    pruner: Any = find(name).model_validate(fields)
    with pruning(bench.model, pruner, bench.batches if pruner.needs_data else ()):
        engine = engine_of(bench.model)
        assert engine is not None
        if engine.fewer() is not None:
            return []
        found = []
        for batch in bench.asked:
            with engine.watching() as watched:
                bench.model(**batch, logits_to_keep=1)
            there = batch["input_ids"][0] == bench.model.config.image_token_id
            found.append(watched[max(watched)][-1][0][there])
        return found


def drawn(patches: Patches, kept: Tensor) -> Any:
    """Return a picture in which patches that are gone are faint, uint8 [height, width, 3]."""
    pixels = patches.pixels.float()
    there = patches.parts(kept).float()[None, None]
    seen = torch.nn.functional.interpolate(there, pixels.shape[1:], mode="nearest")[0]
    faint = pixels * FAINT + 255 * (1 - FAINT)
    return np.asarray((pixels * seen + faint * (1 - seen)).round().to(torch.uint8).permute(1, 2, 0))


def page(rows: dict[str, list[Any]], questions: list[str], path: Path) -> None:
    """Draw the methods in columns, each with a line of pictures; write a PNG."""
    from matplotlib.figure import Figure
    from PIL import Image

    lines = -(-len(rows) // COLUMNS)
    wide = len(questions) * COLUMNS
    figure = Figure(figsize=(wide * SIDE, lines * (SIDE + 0.2) + 0.5), layout="constrained")
    axes = figure.subplots(lines, wide, squeeze=False)
    for one in axes.flatten():
        one.set_axis_off()
    for number, (method, pictures) in enumerate(rows.items()):
        column, line = divmod(number, lines)
        for at, picture in enumerate(pictures):
            here = axes[line, column * len(questions) + at]
            here.imshow(picture)
            if at == 0:
                here.set_title(method, fontsize=9, loc="left")
    figure.suptitle("   |   ".join(questions), fontsize=9)
    with BytesIO() as buffer:
        figure.savefig(buffer, dpi=DPI)
        Image.open(buffer).convert("RGB").quantize(COLOURS_KEPT).save(path, optimize=True)


def main() -> None:
    """Draw the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--share", type=float, default=0.11)
    parser.add_argument("--write", action="store_true", help="write the section of README.md")
    parser.add_argument("-o", "--output", type=Path, default=README.with_name("demo-vision-kept.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(DEMO_VISION, DEMO_VISION, DEMO_VISION, 1)
    every = read_questions(TextSource(DEMO_VISION))
    asked: list[ImageQuestion] = []
    for kind in KINDS:
        shown = {one.image for one in asked}
        asked.append(next(one for one in every if one.kind == kind and one.image not in shown))
    bench.asked = [batch_of([one], bench.processor) for one in asked]
    patches = [patches_of(bench.model.config, one, bench.processor, 144) for one in bench.asked]
    rows = {"all": [drawn(one, torch.ones(144, dtype=torch.bool)) for one in patches]}
    for method in token_methods():
        try:
            kept = kept_of(bench, method, options.share)
        except UsageError as error:
            print(f"{method}: {error}")
            continue
        if kept:
            rows[method] = [drawn(*pair) for pair in zip(patches, kept, strict=True)]
    questions = [one.question for one in asked]
    page(rows, questions, options.output)
    if options.write:
        said = (
            f"Which patches of four pictures of {DEMO_VISION} each method keeps, asked for "
            f"{options.share:.0%}: what the last block computes; where tokens are merged, the one that holds "
            f"them. The questions: {' '.join(questions)} Methods that spare the tower keep no patch of "
            f"them.\n\n![tokens that each method keeps]({options.output.name})"
        )
        write_section(Path(__file__).name, said)


if __name__ == "__main__":
    main()
