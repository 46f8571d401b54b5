"""The demo's generator: endless plain English about a small closed world, deterministic from a seed.

A document carries its own entropy: the -log p of the choices that wrote it. A question whose answer follows
from the world or from the text adds nothing, so a model that has understood everything reaches exactly this
loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from structprune.demo.dice import Dice
from structprune.demo.tales import tell
from structprune.demo.writers import (
    Page,
    Question,
    Writer,
    describe_person,
    describe_place,
    equations,
    line_up,
    own,
    quiz,
    trade,
)

# World and training were chosen while looking at TUNING_SEED only; figures are reported with the others.
TRAINING_SEED = 1  # what the model has read
TUNING_SEED = 2  # what was looked at while the world and the training were chosen
CALIBRATION_SEED = 3  # calibration.txt
HELD_OUT_SEED = 4  # perplexity and divergence
TASK_SEED = 5  # lm-eval tasks

CALIBRATION_CHARACTERS = 180_000  # some 49,000 tokens: 128 samples of 256 with room to spare
SEPARATOR = "\n\n"

WRITERS: tuple[tuple[Writer, float], ...] = (
    (describe_person, 0.12),
    (describe_place, 0.06),
    (quiz, 0.12),
    (own, 0.2),
    (tell, 0.2),
    (equations, 0.12),
    (trade, 0.05),
    (line_up, 0.13),
)


@dataclass(frozen=True)
class Document:
    """A finished text.

    Attributes:
        text: Plain ASCII English, a few lines, no blank line in it.
        nats: -log p of the choices that wrote it: its share of the generator's entropy.
        questions: The questions in it, in order.
    """

    text: str
    nats: float
    questions: tuple[Question, ...]


def documents(seed: int) -> Iterator[Document]:
    """Yield documents without end.

    Args:
        seed: Any integer; the same seed gives the same documents on every platform.
    """
    dice = Dice(seed)
    writers = [writer for writer, _ in WRITERS]
    shares = [share for _, share in WRITERS]
    while True:
        before, page = dice.nats, Page()
        dice.pick(writers, shares)(dice, page)
        yield Document(page.text, dice.nats - before, tuple(page.questions))


def text(seed: int, characters: int) -> str:
    """Return whole documents, a blank line between them, until there are at least `characters` characters."""
    parts: list[str] = []
    length = 0
    for document in documents(seed):
        parts.append(document.text + SEPARATOR)
        length += len(parts[-1])
        if length >= characters:
            return "".join(parts)
    raise AssertionError("documents() never ends")
