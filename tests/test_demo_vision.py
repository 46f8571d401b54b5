"""The vision demo: its scenes are drawn as described, its questions have the answers that the scenes give."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch

from structprune.calibration.image_questions import read_questions
from structprune.calibration.text_source import TextSource
from structprune.demo.dice import Dice
from structprune.demo.scenes import (
    COLOURS,
    NUMBERS,
    PATCH,
    PLACES,
    SIDE,
    Scene,
    Thing,
    covered,
    imagine,
    outline,
    render,
)
from structprune.demo.sights import (
    CALIBRATION_SCENES,
    HELD_OUT_SEED,
    SIGHTS,
    TRAINING_SEED,
    TUNING_SEED,
    ask,
    visual_questions,
    write_questions,
)

RED_CIRCLE = Thing("red", "circle", "northwest", 16, 16, 7)
BLUE_CROSS = Thing("blue", "cross", "southeast", 80, 88, 6)
RED_SQUARE = Thing("red", "square", "centre", 48, 48, 6)
SCENE = Scene((RED_CIRCLE, BLUE_CROSS, RED_SQUARE), ground=40, stripes=(10, 4, 0))


def asked(kind: str, scene: Scene = SCENE, draws: int = 60) -> dict[str, str]:
    """Return every question of a kind that a few draws ask, with its answer."""
    dice = Dice(0)
    found = [ask(kind, scene, dice) for _ in range(draws)]
    return {one.question: one.answer for one in found}


def test_a_colour_is_asked_of_what_is_the_only_one_of_its_shape():
    assert asked("colour") == {
        "What colour is the circle?": "red",
        "What colour is the cross?": "blue",
        "What colour is the square?": "red",
    }


def test_a_shape_is_asked_of_what_is_the_only_one_of_its_colour():
    assert asked("shape") == {"What shape is the blue thing?": "cross"}


def test_a_place_is_asked_of_what_one_word_tells_from_all_others():
    assert asked("place") == {
        "Where is the circle?": "northwest",
        "Where is the cross?": "southeast",
        "Where is the blue thing?": "southeast",
        "Where is the square?": "centre",
    }


def test_things_are_counted():
    assert asked("count") == {"How many things are there?": "three"}


def test_what_is_there_and_what_is_not_is_asked_for_equally_often():
    found = asked("presence", draws=400)
    there = {question for question, answer in found.items() if answer == "yes"}
    assert there == {
        f"Is there a {name}?" for name in ("red thing", "blue thing", "circle", "cross", "square")
    }
    assert {question for question in found if "triangle" in question} == {"Is there a triangle?"}
    dice = Dice(1)
    answers = Counter(ask("presence", imagine(dice), dice).answer for _ in range(1000))
    assert 440 < answers["yes"] < 560


def test_a_picture_is_drawn_as_its_scene_says():
    picture = render(SCENE)
    assert (picture.dtype, tuple(picture.shape)) == (torch.uint8, (3, SIDE, SIDE))
    assert tuple(picture[:, 16, 16]) == COLOURS["red"]
    assert tuple(picture[:, 16, 16 + 7]) == COLOURS["red"]
    assert tuple(picture[:, 16 + 6, 16 + 6]) != COLOURS["red"]  # a corner, which a square would fill
    # Four sixteenths of a stripe per pixel: four pixels dark, four bright.
    assert picture[0, 0, :9].tolist() == [40] * 4 + [50] * 4 + [40]


@pytest.mark.parametrize(
    ("shape", "pixels"),
    [
        # Radius 1: the middle and its four neighbours; all nine; the point, and the three below it.
        ("circle", [[0, 1, 0], [1, 1, 1], [0, 1, 0]]),
        ("square", [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("triangle", [[0, 1, 0], [0, 1, 0], [1, 1, 1]]),
        ("cross", [[0, 1, 0], [1, 1, 1], [0, 1, 0]]),
    ],
)
def test_outlines_by_hand(shape, pixels):
    steps = torch.arange(-1, 2)
    found = outline(Thing("red", shape, "centre", 0, 0, 1), steps[None, :], steps[:, None])
    assert found.int().tolist() == pixels


def test_every_thing_covers_four_patches_of_its_own_and_stands_in_its_place():
    dice = Dice(7)
    for _ in range(200):
        scene = imagine(dice)
        assert 2 <= len(scene.things) <= 1 + len(NUMBERS)
        patches = covered(scene) > 0
        assert (patches.sum(1) == 4).all() and int(patches.sum(0).max()) == 1
        across = SIDE // PATCH
        for thing, mask in zip(scene.things, patches, strict=True):
            rows, columns = (mask.nonzero()[:, 0] // across) // 4, (mask.nonzero()[:, 0] % across) // 4
            assert {PLACES[3 * row + column] for row, column in zip(rows, columns, strict=True)} == {
                thing.place
            }


def test_a_seed_gives_the_same_questions_and_no_two_seeds_share_a_picture():
    pictures = {
        seed: [one.scene for one in islice(visual_questions(seed), 0, 500, len(SIGHTS))]
        for seed in (TRAINING_SEED, TUNING_SEED, HELD_OUT_SEED)
    }
    assert pictures[TUNING_SEED] == [one.scene for one in islice(visual_questions(TUNING_SEED), 0, 500, 5)]
    assert len({scene for scenes in pictures.values() for scene in scenes}) == 300


def test_no_answer_is_common_enough_to_be_guessed():
    answers = {kind: Counter() for kind in SIGHTS}
    for one in islice(visual_questions(HELD_OUT_SEED), 2000):
        answers[one.kind][one.answer] += 1
    shares = {kind: max(found.values()) / found.total() for kind, found in answers.items()}
    assert all(
        share < limit for share, limit in zip(shares.values(), (0.25, 0.35, 0.2, 0.35, 0.56), strict=True)
    )


def test_questions_are_written_as_they_are_read(tmp_path):
    pytest.importorskip("PIL")
    write_questions(tmp_path / "asked.jsonl", 5, 2)
    found = read_questions(TextSource(str(tmp_path / "asked.jsonl")))
    expected = list(islice(visual_questions(5), 10))
    assert [(one.kind, one.question, one.answer) for one in found] == [
        (one.kind, one.question, one.answer) for one in expected
    ]
    assert sorted(path.name for path in (tmp_path / "asked").iterdir()) == ["000.png", "001.png"]
    pixels = torch.tensor(list(found[7].open_image().tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
    assert torch.equal(pixels.permute(2, 0, 1), render(expected[7].scene))
    assert set(json.loads((tmp_path / "asked.jsonl").read_text().splitlines()[0])) == {
        *("image", "kind", "question", "answer")
    }


def test_the_built_in_calibration_is_the_tuning_questions():
    found = read_questions(TextSource("demo-vision"))
    expected = islice(visual_questions(TUNING_SEED), CALIBRATION_SCENES * len(SIGHTS))
    assert [one.question for one in found] == [one.question for one in expected]
