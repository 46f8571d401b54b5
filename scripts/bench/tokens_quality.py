"""Token pruners side by side on a trained vision-language model: right answers, by how many tokens are left.

Every method is asked for the same share of an image's tokens in the last block; what that costs in the blocks
stands beside it, for methods that drop late compute more. Questions with one right answer each, answered
greedily; what is drawn is drawn with three seeds. Differences are paired: per question a method's answer less
the random choice's (mean of its seeds), with a 95% interval over questions. Of the demo's scenes it is known
where the things stand that a question is about: which share of their patches the last block computes. Prefill
and choosing are the processor's seconds in the language model, over a dense prefill of the same prompts.

    python scripts/bench/tokens_quality.py --json one.json
    python scripts/bench/tokens_quality.py --examples 2 --json two.json --write one.json two.json

The JSON is rewritten after every cell; a second call with the same file measures only what it lacks. What the
tower makes of an image is kept for all methods that neither look into it nor change it. With examples every
prompt has so many questions of the same kind, with their images and answers, before the one that is asked.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from cells import Cell, kept_cells
from figures import README, write_section
from tokens_plots import draw, file_of
from tokens_quality_tables import BASELINES, NOTE, section
from tokens_seen import Remembered, TimedChoosers, in_language_model
from torch import Tensor

from structprune.calibration.image_questions import ImageQuestion, read_questions
from structprune.calibration.images import batch_of, prompt_of
from structprune.calibration.text_source import DEMO_VISION, TextSource
from structprune.checkpoint.locate import resolve
from structprune.demo.scenes import covered
from structprune.demo.sights import HELD_OUT_SEED, VisualQuestion, visual_questions
from structprune.errors import UsageError
from structprune.evaluation.questions import QuestionExam, answer, read_question_exam
from structprune.machine import environment
from structprune.models.opening import Opening
from structprune.models.processor import processor
from structprune.models.streamed import Batch, open_model
from structprune.pruners import catalogue
from structprune.pruners.token._family import TokenPruner
from structprune.pruners.while_running import pruning
from structprune.runtime.attach import engine_of, paused
from structprune.runtime.images import placeholder

SHARES = (1 / 3, 0.11, 0.05, 0.025)
SEEDS = (0, 1, 2)
BATCH = 16
ALL = "all"
# Prefills of a method and of the dense model in turns, of which the medians are compared.
TURNS = 5


def token_methods() -> list[str]:
    """Return all token methods: what knows nothing of the picture first, then by name.

    Those that ask the tower's class token stand there a second time, where they ask all of its patches.
    """
    found = [name for name in catalogue.names() if issubclass(catalogue.find(name), TokenPruner)]
    found += [f"{name} {ALL}" for name in found if "queries" in catalogue.find(name).model_fields]
    return sorted(found, key=lambda name: (name not in BASELINES, name))


class Bench:
    """A model with its questions, and what it answers dense.

    Args:
        model: "demo-vision" or a folder.
        questions: A file, or "demo-vision".
        calibration: What methods with a fit look at, the same way.
        limit: Only so many questions.
        examples: How many stand before each question.
    """

    def __init__(
        self, model: str, questions: str, calibration: str, limit: int | None, examples: int = 0
    ) -> None:
        folder = resolve(model)
        self.processor = processor(folder)
        found = open_model(folder, Opening(dtype="float32", stream=False))
        assert not hasattr(found, "reader")
        self.model: Any = found
        self.exam: QuestionExam = read_question_exam(questions, self.processor, limit=limit)
        pool = read_questions(TextSource(calibration))
        self.batches: list[Batch] = [batch_of(part, self.processor) for part in parts(pool[:64])]
        self.asked: list[Batch] = [
            batch_with(examples, pool, part, self.processor, number * BATCH)
            for number, part in enumerate(parts(self.exam.questions))
        ]
        self.patches: list[Tensor] = []
        if questions == DEMO_VISION and not examples:
            scenes = zip(self.exam.questions, visual_questions(HELD_OUT_SEED), strict=False)
            self.patches = [patches_of(one) for _, one in scenes]
        self.features = Remembered(self.model.model)

    def look(self) -> Cell:
        """Return which answers are right, what is left of the images, and what of that is asked about.

        The last is a mean over those questions that are about something in the picture.
        """
        right: list[bool] = []
        left: list[int] = []
        on_answer: list[float] = []
        engine = engine_of(self.model)
        for number, (part, batch) in enumerate(zip(parts(self.exam.questions), self.asked, strict=True)):
            self.features.batch = number
            if engine is None:
                right += answer(self.model, part, batch, self.processor).right
                continue
            with engine.watching() as watched:
                found = answer(self.model, part, batch, self.processor).right
            kept = watched[max(watched)][-1][batch["input_ids"] == placeholder(self.model.config)]
            rows = kept.view(len(part), -1)
            left += rows.sum(1).tolist()
            # What is left of a smaller image stands for other patches.
            about = [] if engine.fewer() else self.patches[len(right) : len(right) + len(part)]
            pairs = zip(rows, about, strict=bool(about))
            on_answer += [float(row[one].float().mean()) for row, one in pairs if bool(one.any())]
            right += found
        self.features.batch = None
        return {
            "right": right,
            "left": fmean(left) if left else None,
            "on_answer": fmean(on_answer) if on_answer else None,
        }

    @torch.no_grad()
    def costs(self) -> Cell:
        """Return what a prefill takes, of that choosing, and its cache, over a dense prefill's."""
        engine = engine_of(self.model)
        assert engine is not None
        took: dict[str, list[float]] = {"dense": [], "pruned": [], "choosing": []}
        caches: dict[str, int] = {}
        for _ in range(TURNS):
            for which in ("dense", "pruned"):
                with TimedChoosers(engine) as choosers, in_language_model(self.model) as seconds:
                    if which == "dense":
                        with paused(self.model):
                            cache = self.model(**self.asked[0], use_cache=True).past_key_values
                    else:
                        cache = self.model(**self.asked[0], use_cache=True).past_key_values
                        took["choosing"].append(choosers.seconds)
                took[which].append(sum(seconds))
                caches[which] = sum(one.keys.nbytes + one.values.nbytes for one in cache.layers)
        dense = median(took["dense"])
        return {
            "prefill": median(took["pruned"]) / dense,
            "choosing": median(took["choosing"]) / dense,
            "cache": caches["pruned"] / caches["dense"],
        }

    def measure(self, method: str, share: float, seed: int) -> Cell:
        """Return a cell: which answers of a pruned model are right, and what it costs."""
        name, _, queries = method.partition(" ")
        fields: dict[str, Any] = {"target": {"keep_ratio": share}} | ({"queries": queries} if queries else {})
        pruner = catalogue.find(name).model_validate(fields | ({"seed": seed} if draws(method) else {}))
        assert isinstance(pruner, TokenPruner)
        started = time.process_time()
        with pruning(self.model, pruner, self.batches if pruner.needs_data else ()) as plan:
            engine = engine_of(self.model)
            assert engine is not None
            self.features.used = engine.fewer() is None and not getattr(pruner, "tower_layers", ())
            found = self.look() | self.costs()
        self.features.used = True
        took = time.process_time() - started
        cell = {"method": method, "share": share, "seed": seed, "took": took, "facts": plan.facts}
        return cell | found


def parts(questions: Any) -> Iterator[tuple[ImageQuestion, ...]]:
    """Yield questions in batches."""
    for start in range(0, len(questions), BATCH):
        yield tuple(questions[start : start + BATCH])


def batch_with(
    count: int, pool: Sequence[ImageQuestion], part: Sequence[ImageQuestion], processor: Any, first: int
) -> Batch:
    """Return questions as a batch, each with some of its kind before it, answered.

    Args:
        count: How many.
        pool: Where they come from, in turns.
        part: The questions.
        processor: The model's.
        first: Number of the first question.
    """
    if not count:
        return batch_of(part, processor)
    prompts, images = [], []
    for number, one in enumerate(part, start=first):
        alike = [other for other in pool if other.kind == one.kind]
        examples = [alike[(count * number + at) % len(alike)] for at in range(count)]
        said = [f"{prompt_of(other, processor)} {other.answer}\n" for other in examples]
        prompts.append("".join(said) + prompt_of(one, processor))
        images.append([other.open_image() for other in (*examples, one)])
    made = processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def patches_of(asked: VisualQuestion) -> Tensor:
    """Return which patches hold a part of what a question is about, bool [patches]; maybe none."""
    words = asked.question.rstrip("?").split()
    about = [asked.kind == "count" or one.colour in words or one.shape in words for one in asked.scene.things]
    return covered(asked.scene)[torch.tensor(about)].sum(0) > 0


def draws(method: str) -> bool:
    """Tell whether a method draws."""
    fields = catalogue.find(method.partition(" ")[0]).model_fields
    # A search draws what it tries, and none runs here.
    return "seed" in fields and "trials" not in fields


def missing(cells: list[Cell], methods: list[str]) -> Iterator[tuple[str, float, int]]:
    """Yield what is not measured yet."""
    done = {(one["method"], one["share"], one["seed"]) for one in cells}
    for share in SHARES:
        for method in methods:
            for seed in SEEDS if draws(method) else (0,):
                if (method, share, seed) not in done:
                    yield method, share, seed


def main() -> None:
    """Measure what the JSON lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo-vision")
    parser.add_argument("--questions", default="demo-vision")
    parser.add_argument("--calibration", default="demo-vision")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--methods", default=",".join(token_methods()))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=0)
    parser.add_argument(
        "--write", type=Path, nargs="+", default=[], help="JSONs for the section of README.md"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.model, options.questions, options.calibration, options.limit, options.examples)
    versions = environment()["versions"]
    asked = len(bench.exam.questions)
    protocol = (
        f"{asked} questions of {Path(options.questions).name} after {options.examples} examples; fits on "
        f"64 of {Path(options.calibration).name}; float32, torch {versions['torch']}, transformers "
        f"{versions['transformers']}"
    )
    kept = kept_cells(options.json, protocol)
    name = Path(options.model).name + (f", after {options.examples} examples" if options.examples else "")
    kept |= {
        "model": name,
        "images": 1 + options.examples,
        "processor": environment()["machine"]["processor"],
    }
    kept |= {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "kinds": [str(one.kind) for one in bench.exam.questions],
    }
    if "dense" not in kept:
        kept["dense"] = bench.look()["right"]
    for method, share, seed in missing(kept["cells"], options.methods.split(",")):
        try:
            cell = bench.measure(method, share, seed)
        except UsageError as error:
            print(f"{method} {share:.3f}: {error}", flush=True)
            continue
        kept["cells"].append(cell)
        options.json.write_text(json.dumps(kept))
        print(f"{method} {share:.3f} seed {seed}: {fmean(cell['right']):.3f} right", flush=True)
    files = [json.loads(one.read_text()) for one in options.write]
    for one in files:
        draw(one, README.with_name(file_of(one)))
    if files:
        write_section(Path(__file__).name, "\n\n".join([NOTE, *map(section, files)]))


if __name__ == "__main__":
    main()
