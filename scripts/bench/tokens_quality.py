"""Token pruners side by side on a trained vision-language model: right answers, by how many tokens are left.

Every method is asked for the same share of an image's tokens in the last block; what that costs in the blocks
stands beside it, for methods that drop late compute more. Questions with one right answer each, answered
greedily; what is drawn is drawn with three seeds. Differences are paired: the share of questions that only
one of two models gets right, with McNemar's test against the dense one. Of the demo's scenes it is known
where the things stand that a question is about: which share of their patches is left in the last block.

    python scripts/bench/tokens_quality.py --model demo-vision --json /tmp/tokens.json --write

The JSON is rewritten after every cell; a second call with the same file measures only what it lacks.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cells import Cell, kept_cells
from figures import README, markdown, write_section
from tokens_plots import draw, file_of
from torch import Tensor

from structprune.calibration.image_questions import ImageQuestion, read_questions
from structprune.calibration.images import batch_of
from structprune.calibration.text_source import DEMO_VISION, TextSource
from structprune.checkpoint.locate import resolve
from structprune.demo.scenes import covered
from structprune.demo.sights import HELD_OUT_SEED, VisualQuestion, visual_questions
from structprune.evaluation.questions import QuestionExam, answer, mcnemar, read_question_exam
from structprune.machine import environment
from structprune.models.opening import Opening
from structprune.models.processor import processor
from structprune.models.streamed import Batch, open_model
from structprune.pruners.catalogue import find
from structprune.pruners.while_running import pruning
from structprune.runtime.attach import engine_of
from structprune.runtime.images import placeholder

SHARES = (1 / 3, 0.11, 0.05, 0.025)
SEEDS = (0, 1, 2)
# Each with what it is asked for, by its share; FitPrune is asked for operations, as its paper is.
METHODS = ("random_tokens", "grid_tokens", "downsample", "divprune", "fastv", "fitprune")
BATCH = 16
NOTE = (
    "downsample leaves the nearest square number of tokens. Papers find it strong where a tower has seen "
    "images of many sizes; the demo's was trained on one size, with scenes drawn on a grid of its patches, "
    "and loses most of what is lost already at 121 of 144 tokens. With tower: operations of an image in the "
    "tower, the projector and the blocks, against dense. Answer patches: of those that hold a part of what "
    "is asked about, the share that the last block computes."
)

SHOWN = """What two methods keep of a picture, beside as many tokens at random; `fastv` chooses after
two blocks, in which tokens have read one another:

    structprune prune demo-vision OUT --method divprune --set target.keep_ratio=0.11
    structprune show OUT --image structprune/demo/vision/calibration/000.png \\
        --question "What colour is the triangle?" -o scripts/bench/demo-vision-divprune.png

![tokens that divprune keeps](demo-vision-divprune.png)

![tokens that fastv keeps](demo-vision-fastv.png)
"""


class Bench:
    """A model with its questions, and what it answers dense.

    Args:
        model: "demo-vision" or a folder.
        questions: A file, or "demo-vision".
        calibration: What FitPrune looks at, the same way.
        limit: Only so many questions.
    """

    def __init__(self, model: str, questions: str, calibration: str, limit: int | None) -> None:
        folder = resolve(model)
        self.processor = processor(folder)
        found = open_model(folder, Opening(dtype="float32", stream=False))
        assert not hasattr(found, "reader")
        self.model: Any = found
        self.exam: QuestionExam = read_question_exam(questions, self.processor, limit=limit)
        looked_at = read_questions(TextSource(calibration))[:64]
        self.batches: list[Batch] = [batch_of(part, self.processor) for part in parts(looked_at)]
        self.patches: list[Tensor] = []
        if questions == DEMO_VISION:
            scenes = zip(self.exam.questions, visual_questions(HELD_OUT_SEED), strict=False)
            self.patches = [patches_of(one) for _, one in scenes]

    def look(self) -> Cell:
        """Return which answers are right, and which share of their patches is left, of the model as it runs.

        The latter is a mean over those questions that are about something in the picture.
        """
        right: list[bool] = []
        left: list[float] = []
        engine = engine_of(self.model)
        for part in parts(self.exam.questions):
            batch = batch_of(part, self.processor)
            if engine is None:
                right += answer(self.model, part, batch, self.processor).right
                continue
            with engine.watching() as watched:
                found = answer(self.model, part, batch, self.processor).right
            kept = watched[max(watched)][-1][batch["input_ids"] == placeholder(self.model.config)]
            # What is left of a smaller image stands for other patches.
            asked = [] if engine.smaller() else self.patches[len(right) : len(right) + len(part)]
            pairs = zip(kept.view(len(part), -1), asked, strict=bool(asked))
            left += [float(row[about].float().mean()) for row, about in pairs if bool(about.any())]
            right += found
        return {"right": right, "on_answer": fmean(left) if left else None}

    def measure(self, method: str, share: float, seed: int) -> Cell:
        """Return a cell: which answers of a pruned model are right."""
        target = {"keep_ratio": share}
        pruner = find(method).model_validate({"target": target} | ({"seed": seed} if draws(method) else {}))
        with pruning(self.model, pruner, self.batches if pruner.needs_data else ()) as plan:
            found = self.look()
        return {"method": method, "share": share, "seed": seed, **found, "facts": plan.facts}


def parts(questions: Any) -> Iterator[tuple[ImageQuestion, ...]]:
    """Yield questions in batches."""
    for start in range(0, len(questions), BATCH):
        yield tuple(questions[start : start + BATCH])


def patches_of(asked: VisualQuestion) -> Tensor:
    """Return which patches hold a part of what a question is about, bool [patches]; maybe none."""
    words = asked.question.rstrip("?").split()
    about = [asked.kind == "count" or one.colour in words or one.shape in words for one in asked.scene.things]
    return covered(asked.scene)[torch.tensor(about)].sum(0) > 0


def draws(method: str) -> bool:
    """Tell whether a method draws."""
    return "seed" in find(method).model_fields


def missing(cells: list[Cell]) -> Iterator[tuple[str, float, int]]:
    """Yield what is not measured yet."""
    done = {(one["method"], one["share"], one["seed"]) for one in cells if "on_answer" in one}
    for share in SHARES:
        for method in METHODS:
            for seed in SEEDS if draws(method) else (0,):
                if (method, share, seed) not in done:
                    yield method, share, seed


def section(kept: Mapping[str, Any]) -> str:
    """Return the table of a model."""
    dense, kinds = kept["dense"], kept["kinds"]
    names = sorted(set(kinds))
    rows = [["dense", "", "", "", f"{fmean(dense):.1%}", *by_kind(dense, kinds, names), "", ""]]
    for share in SHARES:
        for method in METHODS:
            cells = [one for one in kept["cells"] if (one["method"], one["share"]) == (method, share)]
            if cells:
                rows.append(row(method, share, cells, dense, kinds, names))
    header = ["method", "tokens left", "visual FLOPs", "with tower", "right", *names, "p against dense"]
    told = f"{kept['protocol']}. {kept['processor']}, {kept['date']}. {NOTE}"
    picture = f"![right answers against tokens kept]({file_of(kept)})"
    shown = f"\n\n{SHOWN}" if kept["model"] == DEMO_VISION else ""
    table = markdown([*header, "answer patches"], rows)
    return f"### {kept['model']}\n\n{picture}\n\n{told}\n\n{table}{shown}"


def row(
    method: str, share: float, cells: list[Cell], dense: list[bool], kinds: list[str], names: list[str]
) -> list[str]:
    """Return a line of the table; of several seeds the mean, and the test of the first."""
    facts, first = cells[0]["facts"], cells[0]["right"]
    mean = fmean(fmean(one["right"]) for one in cells)
    spread = math.sqrt(mean * (1 - mean) / len(dense))
    alone = [
        sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((dense, first), (first, dense))
    ]
    on_answer = [one["on_answer"] for one in cells if one.get("on_answer") is not None]
    shares = [fmean(column) for column in zip(*(shares_of(one["right"], kinds, names) for one in cells))]
    return [
        method,
        f"{facts['tokens']} of {facts['visual_tokens']} ({share:.1%} asked)",
        f"{facts['visual_flops']:.3f}",
        f"{facts['image_flops']:.3f}",
        f"{mean:.1%} ± {spread:.1%}",
        *(f"{one:.0%}" for one in shares),
        f"{mcnemar(*alone):.2g}",
        f"{fmean(on_answer):.0%}" if on_answer else "",
    ]


def shares_of(right: list[bool], kinds: list[str], names: list[str]) -> list[float]:
    """Return the share of right answers by kind."""
    return [fmean(one for one, kind in zip(right, kinds, strict=True) if kind == name) for name in names]


def by_kind(right: list[bool], kinds: list[str], names: list[str]) -> list[str]:
    """Return the same as text."""
    return [f"{one:.0%}" for one in shares_of(right, kinds, names)]


def main() -> None:
    """Measure what the JSON lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo-vision")
    parser.add_argument("--questions", default="demo-vision")
    parser.add_argument("--calibration", default="demo-vision")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="write the section of README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.model, options.questions, options.calibration, options.limit)
    versions = environment()["versions"]
    asked = len(bench.exam.questions)
    protocol = (
        f"{asked} questions of {Path(options.questions).name}; FitPrune fitted on 64 of "
        f"{Path(options.calibration).name}; float32, torch {versions['torch']}, transformers "
        f"{versions['transformers']}"
    )
    kept = kept_cells(options.json, protocol)
    kept |= {"model": Path(options.model).name, "processor": environment()["machine"]["processor"]}
    kept |= {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "kinds": [str(one.kind) for one in bench.exam.questions],
    }
    if "dense" not in kept:
        kept["dense"] = bench.look()["right"]
    for method, share, seed in missing(kept["cells"]):
        cell = bench.measure(method, share, seed)
        key = method, share, seed
        others = [one for one in kept["cells"] if (one["method"], one["share"], one["seed"]) != key]
        kept["cells"] = [*others, cell]
        options.json.write_text(json.dumps(kept))
        print(f"{method} {share:.3f} seed {seed}: {fmean(cell['right']):.3f} right")
    if options.write:
        draw(kept, README.with_name(file_of(kept)))
        write_section(Path(__file__).name, section(kept))


if __name__ == "__main__":
    main()
