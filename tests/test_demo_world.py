"""The demo's generator: deterministic, closed, and honest about its entropy."""

import math
import re
from itertools import islice

import pytest

from structprune.demo import CALIBRATION
from structprune.demo.dice import Dice
from structprune.demo.inhabitants import COLOURS, PLACES, people, places
from structprune.demo.world import (
    CALIBRATION_CHARACTERS,
    CALIBRATION_SEED,
    HELD_OUT_SEED,
    SEPARATOR,
    TASK_SEED,
    TRAINING_SEED,
    TUNING_SEED,
    documents,
    text,
)
from structprune.demo.writers import Page, describe_person, line_up, own


def test_a_draw_costs_the_logarithm_of_its_probability() -> None:
    dice = Dice(0)
    dice.pick("abcd")
    assert dice.nats == pytest.approx(math.log(4))
    dice.several(range(5), 2)
    assert dice.nats == pytest.approx(math.log(4) + math.log(5 * 4))


def test_a_weighted_draw_costs_what_its_weight_says_and_comes_as_often() -> None:
    dice, seen = Dice(1), 0
    for _ in range(4000):
        before = dice.nats
        if dice.happens(0.25):
            seen += 1
            assert dice.nats - before == pytest.approx(math.log(4))
        else:
            assert dice.nats - before == pytest.approx(-math.log(0.75))
    assert abs(seen / 4000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)  # four standard errors


def test_the_only_possible_draw_is_free() -> None:
    dice = Dice(2)
    dice.pick(["alone"])
    assert dice.nats == 0.0


def test_the_same_seed_writes_the_same_text_and_another_seed_another() -> None:
    assert text(7, 5000) == text(7, 5000)
    assert text(7, 5000) != text(8, 5000)


def test_a_text_is_plain_ascii_made_of_whole_documents() -> None:
    written = text(9, 3000)
    parts = written.removesuffix(SEPARATOR).split(SEPARATOR)
    assert written.isascii() and len(written) >= 3000
    assert parts == [document.text for document in islice(documents(9), len(parts))]


def test_the_seeds_are_five_different_ones() -> None:
    assert len({TRAINING_SEED, TUNING_SEED, CALIBRATION_SEED, HELD_OUT_SEED, TASK_SEED}) == 5


def test_the_calibration_text_in_the_package_is_what_the_generator_writes() -> None:
    # When the world changes: tasks.write_text(CALIBRATION, CALIBRATION_SEED, CALIBRATION_CHARACTERS).
    assert CALIBRATION.read_bytes().decode("ascii") == text(CALIBRATION_SEED, CALIBRATION_CHARACTERS)


def test_held_out_stories_were_not_read_in_training() -> None:
    read = {document.text for document in islice(documents(TRAINING_SEED), 3000)}
    long = [document.text for document in islice(documents(HELD_OUT_SEED), 500) if document.nats > 30]
    assert len(long) > 100
    assert not read.intersection(long)


def test_every_question_stands_in_its_document_with_its_answer() -> None:
    for document in islice(documents(10), 300):
        for question in document.questions:
            assert document.text.startswith(f"{question.prompt} {question.answer}.")
            assert question.answer not in question.near + question.far


def test_a_fact_is_the_same_whoever_tells_it() -> None:
    homes = {person.name: person.home.name for person in people()}
    for document in islice(documents(11), 1000):
        for question in document.questions:
            if "Where does" in question.prompt.rsplit("\n", 1)[-1]:
                name = question.prompt.rsplit("\n", 1)[-1].split()[3]
                assert question.answer == homes[name]


def test_the_world_is_closed() -> None:
    assert len({person.name for person in people()}) == 48
    assert {person.home.name for person in people()} <= set(PLACES)
    assert len({place.river for place in places()}) == len(PLACES)


def test_what_is_asked_of_things_stands_earlier_in_the_text() -> None:
    dice = Dice(12)
    for _ in range(200):
        page = Page()
        own(dice, page)
        for question in page.questions:
            lead = question.prompt.rsplit("Answer: ", 1)[1]
            assert f"{lead} {question.answer}" in question.prompt.split("\nQuestion")[0]


def test_a_painted_thing_has_its_last_colour() -> None:
    dice, painted = Dice(13), 0
    for _ in range(300):
        page = Page()
        own(dice, page)
        told = page.text.split("\nQuestion")[0]
        for question in page.questions:
            found = re.search(r"Which colour is the (\w+)\? Answer: (.*)$", question.prompt)
            if found and f"paints it. The {found[1]} of" in told:
                painted += 1
                assert told.endswith(f"{found[2]} {question.answer}.")
    assert painted > 10


def test_every_equation_is_right() -> None:
    checked = 0
    for document in islice(documents(14), 500):
        for question in document.questions:
            if question.kind == "arithmetic":
                first, sign, second, _ = question.prompt.rsplit("\n", 1)[-1].split()
                assert int(question.answer) == int(first) + (int(second) if sign == "+" else -int(second))
                checked += 1
    assert checked > 50


def test_two_different_pages_of_one_person_never_read_the_same() -> None:
    # The entropy is exact only if a text tells every choice that made it.
    seen: dict[str, float] = {}
    dice = Dice(15)
    for _ in range(5000):
        before, page = dice.nats, Page()
        describe_person(dice, page)
        assert seen.setdefault(page.text, round(dice.nats - before, 9)) == round(dice.nats - before, 9)


def test_a_row_is_asked_about_what_stands_in_it() -> None:
    page = Page()
    line_up(Dice(16), page)
    row = page.text.split(".")[0].removeprefix("In a row: ").split(", ")
    assert all(question.answer in row for question in page.questions)
    assert len(set(row)) == len(row) and COLOURS
