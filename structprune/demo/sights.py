"""Questions on the vision demo's scenes: colour, shape, place, count and presence, answered in one word."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from structprune.calibration.image_questions import ImageQuestion
from structprune.demo.dice import Dice
from structprune.demo.scenes import COLOURS, NUMBERS, SHAPES, Scene, Thing, imagine, render

Sight = Literal["colour", "shape", "place", "count", "presence"]
SIGHTS: tuple[Sight, ...] = get_args(Sight)

# As for the text's: chosen while looking at TUNING_SEED only, which is what calibration draws from.
TRAINING_SEED = 11
TUNING_SEED = 12
HELD_OUT_SEED = 13
CALIBRATION_SCENES = 40  # of vision/calibration.jsonl: 200 questions


@dataclass(frozen=True)
class VisualQuestion:
    """A question on a picture.

    Attributes:
        kind: What it is about.
        scene: What the picture shows.
        question: One sentence.
        answer: One word.
    """

    kind: Sight
    scene: Scene
    question: str
    answer: str


def visual_questions(seed: int) -> Iterator[VisualQuestion]:
    """Yield questions without end: one of each kind on a scene, then the next scene.

    Args:
        seed: Any integer; the same seed gives the same questions on every platform.
    """
    dice = Dice(seed)
    while True:
        scene = imagine(dice)
        for kind in SIGHTS:
            yield ask(kind, scene, dice)


def ask(kind: Sight, scene: Scene, dice: Dice) -> VisualQuestion:
    """Return a question of a kind on a scene."""
    question, answer = _ASKERS[kind](scene, dice)
    return VisualQuestion(kind, scene, question, answer)


def write_questions(file: Path, seed: int, scenes: int) -> None:
    """Write the questions on so many scenes as JSON lines, and their images as PNG beside them.

    Args:
        file: NAME.jsonl; the images go into the folder NAME, which is made.
        seed: As for `visual_questions`.
        scenes: Five questions are asked of each.

    Raises:
        EnvironmentFailure: pillow is not installed.
    """
    folder = file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, one in enumerate(islice(visual_questions(seed), scenes * len(SIGHTS))):
        image = folder / f"{number // len(SIGHTS):03}.png"
        if number % len(SIGHTS) == 0:
            ImageQuestion(render(one.scene), one.question).open_image().save(image, optimize=True)
        said = {"kind": one.kind, "question": one.question, "answer": one.answer}
        rows.append(json.dumps({"image": f"{folder.name}/{image.name}"} | said) + "\n")
    file.write_text("".join(rows), encoding="ascii", newline="\n")


def prompt_of(question: str) -> str:
    """Return how the demo model is asked: LLaVA's plain prompt, which its chat template writes as well."""
    return f"USER: <image>\n{question} ASSISTANT:"


def _colour(scene: Scene, dice: Dice) -> tuple[str, str]:
    thing = dice.pick([one for one in scene.things if scene.only(shape=one.shape)])
    return f"What colour is the {thing.shape}?", thing.colour


def _shape(scene: Scene, dice: Dice) -> tuple[str, str]:
    thing = dice.pick([one for one in scene.things if scene.only(colour=one.colour)])
    return f"What shape is the {thing.colour} thing?", thing.shape


def _place(scene: Scene, dice: Dice) -> tuple[str, str]:
    names = [(name, one) for one in scene.things for name in _names(scene, one)]
    name, thing = dice.pick(names)
    return f"Where is the {name}?", thing.place


def _names(scene: Scene, thing: Thing) -> list[str]:
    """Return what tells a thing from all others."""
    by_shape = [thing.shape] if scene.only(shape=thing.shape) else []
    return by_shape + ([f"{thing.colour} thing"] if scene.only(colour=thing.colour) else [])


def _count(scene: Scene, _: Dice) -> tuple[str, str]:
    return "How many things are there?", NUMBERS[len(scene.things) - 2]


def _presence(scene: Scene, dice: Dice) -> tuple[str, str]:
    """Ask for what is there as often as for what is not."""
    there = dice.happens(0.5)
    colours, shapes = ({getattr(one, key) for one in scene.things} for key in ("colour", "shape"))
    names = [f"{colour} thing" for colour in COLOURS if (colour in colours) == there]
    names += [shape for shape in SHAPES if (shape in shapes) == there]
    return f"Is there a {dice.pick(names)}?", "yes" if there else "no"


_ASKERS: dict[Sight, Callable[[Scene, Dice], tuple[str, str]]] = {
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "count": _count,
    "presence": _presence,
}
