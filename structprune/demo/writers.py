"""The kinds of document of the demo world: each writer turns dice into a text and the questions in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from structprune.demo.dice import Dice
from structprune.demo.inhabitants import (
    COLOURS,
    FOODS,
    GOODS,
    JOBS,
    LANDMARKS,
    MONTHS,
    PETS,
    PLACES,
    RIVERS,
    TOOLS,
    Person,
    Town,
    fame,
    people,
    places,
    words,
)

Kind = Literal["people", "places", "context", "story", "arithmetic", "order"]

OBJECTS = words(
    "key coin ring lamp book knife letter cup map clock rope spoon button candle brush hammer comb whistle "
    "mirror basket stone feather needle shell"
)


@dataclass(frozen=True)
class Question:
    """A question as it stands in a document.

    Attributes:
        kind: What answering it takes: memory (`people`, `places`), reading back (`context`, `story`,
            `order`), or counting.
        prompt: The document up to where the answer begins, without the blank.
        answer: What follows the blank after the prompt; the document sets a full stop behind it.
        near: Wrong answers that stand in the document, or close to the right one.
        far: Wrong answers of the same sort from the rest of the world.
    """

    kind: Kind
    prompt: str
    answer: str
    near: tuple[str, ...]
    far: tuple[str, ...]


@dataclass
class Page:
    """A document being written."""

    text: str = ""
    questions: list[Question] = field(default_factory=list)

    def say(self, sentence: str) -> None:
        """Add a sentence, with a blank before it unless it opens a line."""
        self.text += sentence if not self.text or self.text.endswith("\n") else " " + sentence

    def ask(
        self, kind: Kind, question: str, answer: str, near: Sequence[str], pool: Sequence[str], lead: str = ""
    ) -> None:
        """Add a question on a line of its own, and its answer.

        Args:
            kind: What answering it takes.
            question: The question, with its question mark.
            answer: The right answer.
            near: Wrong answers that stand in the text; the right one may be among them.
            pool: Everything that could be answered.
            lead: How the answer begins whatever it is; it belongs to the prompt.
        """
        start = f"{self.text}\n" if self.text else ""
        self.answer(kind, f"{start}Question: {question} Answer: {lead}".rstrip(), answer, near, pool)

    def answer(self, kind: Kind, prompt: str, answer: str, near: Sequence[str], pool: Sequence[str]) -> None:
        """Replace the text by the prompt and the answer to it."""
        close = tuple(rival for rival in dict.fromkeys(near) if rival != answer)
        far = tuple(rival for rival in dict.fromkeys(pool) if rival != answer and rival not in close)
        self.questions.append(Question(kind, prompt, answer, close, far))
        self.text = f"{prompt} {answer}."


def meet(dice: Dice, count: int) -> list[Person]:
    """Draw people, the well known more often."""
    return dice.several(people(), count, fame(len(people())))


def visit(dice: Dice) -> Town:
    """Draw a place, the well known more often."""
    return dice.pick(places(), fame(len(places())))


def a(noun: str) -> str:
    """Return the noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


# Per relation: two ways to state it, how to ask for it, the answer, and all that could be answered.
Relation = tuple[str, str, str, str, Sequence[str]]


def person_relations(person: Person) -> list[Relation]:
    """Return all that is true of a person; {who} stands for the name or the pronoun."""
    name, her = person.name, person.her
    names = [other.name for other in people() if other is not person]
    home = person.home.name
    return [
        ("{who} lives in " + home, f"the home of {name} is in {home}",
         f"Where does {name} live?", home, PLACES),
        ("{who} is " + a(person.job), "{who} works as " + a(person.job),
         f"What is the work of {name}?", person.job, JOBS),
        ("{who} likes the colour " + person.colour, f"{her} coat is {person.colour}",
         f"Which colour does {name} like?", person.colour, COLOURS),
        ("{who} likes to eat " + person.food, "for supper {who} has " + person.food,
         f"What does {name} like to eat?", person.food, FOODS),
        ("{who} has " + a(person.pet), f"{her} pet is {a(person.pet)}",
         f"Which pet does {name} have?", person.pet, PETS),
        ("{who} plays the " + person.tool, "in the evening {who} plays the " + person.tool,
         f"What does {name} play?", person.tool, TOOLS),
        (f"{her} best friend is " + person.friend, "{who} often visits " + person.friend,
         f"Who is the friend of {name}?", person.friend, names),
    ]  # fmt: skip


def place_relations(place: Town) -> list[Relation]:
    """Return all that is true of a place; {who} stands for its name or "the town"."""
    name = place.name
    return [
        ("the river in {who} is the " + place.river, "{who} lies on the " + place.river,
         f"Which river is in {name}?", place.river, RIVERS),
        ("{who} is known for its " + place.landmark, "visitors of {who} see the old " + place.landmark,
         f"What do visitors see in {name}?", place.landmark, LANDMARKS),
        ("{who} sells " + place.goods, "traders buy " + place.goods + " in {who}",
         f"What does {name} sell?", place.goods, GOODS),
        ("the fair of {who} is in " + place.fair, "in " + place.fair + " {who} holds a fair",
         f"When is the fair of {name}?", place.fair, MONTHS),
    ]  # fmt: skip


def _state(dice: Dice, page: Page, relations: Sequence[Relation], name: str, again: str, least: int) -> None:
    for index, relation in enumerate(dice.several(relations, dice.number(least, len(relations)))):
        sentence = dice.pick(relation[:2])
        # The name must stand in the first sentence, or nothing after it could be known.
        if index == 0 and "{who}" not in sentence and name not in sentence:
            sentence = f"{name} is here, and {sentence}"
        if "{who}" in sentence:
            sentence = sentence.replace("{who}", name if index == 0 or dice.happens(0.3) else again)
        page.say(sentence[0].upper() + sentence[1:] + ".")


def describe_person(dice: Dice, page: Page) -> None:
    """State some of what is true of a person, in any order and wording."""
    person = meet(dice, 1)[0]
    _state(dice, page, person_relations(person), person.name, person.she, 4)


def describe_place(dice: Dice, page: Page) -> None:
    """State some of what is true of a place, and who lives there."""
    place = visit(dice)
    _state(dice, page, place_relations(place), place.name, "the town", 2)
    residents = [person.name for person in people() if person.home is place]
    if residents:
        page.say(f"In {place.name} you can meet {', '.join(residents)}.")


def quiz(dice: Dice, page: Page) -> None:
    """Ask for facts that stand nowhere in the text: only memory answers them."""
    for _ in range(dice.number(2, 6)):
        of_a_place = dice.happens(0.3)
        known = place_relations(visit(dice)) if of_a_place else person_relations(meet(dice, 1)[0])
        relation = dice.pick(known)
        page.ask("places" if of_a_place else "people", relation[2], relation[3], [], relation[4])


def own(dice: Dice, page: Page) -> None:
    """Tell whose things have which colour, paint one anew, and ask."""
    count = dice.number(3, 6)
    owners, things = meet(dice, count), dice.several(OBJECTS, count)
    colours = dice.several(COLOURS, count)
    for person, thing, colour in zip(owners, things, colours, strict=True):
        page.say(f"The {thing} of {person.name} is {colour}.")
    near = list(colours)
    if dice.happens(0.3):
        index = dice.number(0, count - 1)
        near.append(dice.pick([colour for colour in COLOURS if colour not in colours]))
        page.say(
            f"Then {owners[index].name} paints it. The {things[index]} of {owners[index].name} is {near[-1]}."
        )
        colours[index] = near[-1]
    names = [person.name for person in owners]
    everybody = [person.name for person in people()]
    for index in dice.several(range(count), dice.number(2, count)):
        thing, name = things[index], names[index]
        if dice.happens(0.5):
            page.ask("context", f"Whose is the {thing}?", name, names, everybody, f"The {thing} of")
        else:
            question = f"Which colour is the {thing}?"
            page.ask("context", question, colours[index], near, COLOURS, f"The {thing} of {name} is")


def equations(dice: Dice, page: Page) -> None:
    """Add and subtract, one equation a line."""
    for _ in range(dice.number(3, 7)):
        first = dice.number(1, 20)
        if dice.happens(0.5):
            second = dice.number(1, 20)
            sign, result = "+", first + second
        else:
            second = dice.number(1, first)
            sign, result = "-", first - second
        line = f"{first} {sign} {second} ="
        near = [str(result + step) for step in (1, -1, 2, 10) if result + step >= 0]
        page.answer("arithmetic", f"{page.text}\n{line}" if page.text else line, str(result), near, [])


def trade(dice: Dice, page: Page) -> None:
    """Tell a sum as a story of giving and eating."""
    person, other = meet(dice, 2)
    food, have = dice.pick(FOODS), dice.number(2, 12)
    page.say(f"{person.name} has {have} {food}.")
    for _ in range(dice.number(1, 3)):
        if have < 2 or dice.happens(0.5):
            change = dice.number(2, 9)
            have += change
            page.say(f"{other.name} gives {person.them} {change} {food}.")
        else:
            change = dice.number(1, min(9, have - 1))
            have -= change
            page.say(f"{person.name} {dice.pick(('eats', 'sells'))} {change} {food}.")
        page.say(f"Now {person.name} has {have} {food}.")


def line_up(dice: Dice, page: Page) -> None:
    """Name a row of things, perhaps once more, then ask for its ends and neighbours."""
    pool = dice.pick((OBJECTS, [person.name for person in people()], FOODS, JOBS))
    row = dice.several(pool, dice.number(3, 10))
    page.say(f"In a row: {', '.join(row)}.")
    # Plain repetition is the simplest thing to read back; it teaches a network to look back at all.
    if dice.happens(0.8):
        page.say(f"Once more: {', '.join(row)}.")
    for index in dice.several(range(len(row)), 2):
        if index == 0:
            page.ask("order", "Which is first?", row[0], row, pool)
        elif index == len(row) - 1 and dice.happens(0.5):
            page.ask("order", "Which is last?", row[-1], row, pool)
        else:
            before = row[index - 1]
            page.ask("order", f"What comes after {before}?", row[index], row, pool, f"{before},")


Writer = Callable[[Dice, Page], None]
