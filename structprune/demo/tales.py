"""The stories of the demo world: a walk, a meeting, something lost and found, a gift, the way home."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from structprune.demo.dice import Dice
from structprune.demo.inhabitants import FOODS, PLACES, Person, Town, people
from structprune.demo.writers import OBJECTS, Page, a, meet, visit

WEATHER = {
    "rainy": "coat",
    "sunny": "hat",
    "windy": "scarf",
    "snowy": "shovel",
    "foggy": "lantern",
    "cold": "blanket",
}
SPOTS = ("under the {}", "behind the {}", "near the {}", "on top of the {}", "in front of the {}")
MOODS = ("happy", "tired", "proud", "hungry", "sleepy", "cheerful", "thoughtful", "late")
STATES = ("wet", "muddy", "hungry", "limping")
PARTS = ("morning", "noon", "evening", "night")


@dataclass
class Tale:
    """What a story has told so far, for the questions at its end: (question, answer, near, pool)."""

    hero: Person
    other: Person
    place: Town
    asked: list[tuple[str, str, Sequence[str], Sequence[str]]] = field(default_factory=list)


def tell(dice: Dice, page: Page) -> None:
    """Tell a story of two people in a town, then ask what happened in it."""
    hero = meet(dice, 1)[0]
    place = visit(dice)
    names = [person.name for person in people()]
    weather = dice.pick(tuple(WEATHER))
    page.say(f"One {weather} {dice.pick(PARTS)} {hero.name}, the {hero.job} of {hero.home.name},")
    page.say(f"{dice.pick(('walked', 'rode', 'went', 'travelled'))} to {place.name}.")
    page.say(f"It was {weather}, so {hero.she} took {a(WEATHER[weather])}.")
    if dice.happens(0.5):
        other = next(person for person in people() if person.name == hero.friend)
        page.say(f"By the {place.river} {hero.she} met {hero.her} friend {other.name}.")
    else:
        strangers = [person for person in people() if person.name not in (hero.name, hero.friend)]
        other = dice.pick(strangers)
        page.say(f"By the {place.river} {hero.she} met {other.name}, {a(other.job)} from {other.home.name}.")
    tale = Tale(hero, other, place)
    tale.asked.append((f"Where did {hero.name} go?", place.name, [hero.home.name, other.home.name], PLACES))
    tale.asked.append((f"What did {hero.name} take?", WEATHER[weather], [], list(WEATHER.values())))
    tale.asked.append((f"Who did {hero.name} meet?", other.name, [], names))
    for event in dice.several((lose, give, play, feed), dice.number(1, 3)):
        event(dice, page, tale)
    mood = dice.pick(MOODS)
    page.say(f"Then {hero.she} went home to {hero.home.name}, {mood} but glad.")
    tale.asked.append((f"How was {hero.name} at the end?", mood, [], list(MOODS)))
    for question, answer, near, pool in dice.several(tale.asked, dice.number(1, 3)):
        page.ask("story", question, answer, near, pool)


def lose(dice: Dice, page: Page, tale: Tale) -> None:
    """One loses a thing, the other has seen it."""
    thing, spot = dice.pick(OBJECTS), dice.pick(SPOTS).format(tale.place.landmark)
    loser, finder = (tale.other, tale.hero) if dice.happens(0.5) else (tale.hero, tale.other)
    page.say(f"{loser.name} had lost {a(thing)}, and {finder.name} had seen the {thing} {spot}.")
    page.say(f"So they found the {thing} {spot} again.")
    pair = [tale.hero.name, tale.other.name]
    pool = [person.name for person in people()]
    tale.asked.append((f"Who had lost the {thing}?", loser.name, pair, pool))
    tale.asked.append((f"Who had seen the {thing}?", finder.name, pair, pool))
    spots = [other.format(tale.place.landmark) for other in SPOTS]
    tale.asked.append((f"Where was the {thing}?", spot, [], spots))


def give(dice: Dice, page: Page, tale: Tale) -> None:
    """The other one gives what they like best, and some of it is eaten."""
    count = dice.number(2, 9)
    eaten = dice.number(1, count - 1)
    hero, food = tale.hero, tale.other.food
    page.say(f"{tale.other.name} gave {hero.name} {count} {food}.")
    page.say(f"{hero.name} ate {eaten} of the {count} {food} and kept {count - eaten}.")
    numbers = [str(number) for number in range(1, 10)]
    tale.asked.append((f"What did {tale.other.name} give?", food, [hero.food], FOODS))
    tale.asked.append(
        (f"How many did {hero.name} keep?", str(count - eaten), [str(eaten), str(count)], numbers)
    )


def play(dice: Dice, page: Page, tale: Tale) -> None:
    """Both make music, each on their own instrument."""
    first, second = (tale.hero, tale.other) if dice.happens(0.5) else (tale.other, tale.hero)
    act = dice.pick(("sang", "danced", "listened"))
    page.say(f"{first.name} played the {first.tool}, and {second.name} {act}.")


def feed(dice: Dice, page: Page, tale: Tale) -> None:
    """The pet of one of them runs away and comes back."""
    owner = tale.hero if dice.happens(0.5) else tale.other
    state = dice.pick(STATES)
    page.say(f"The {owner.pet} of {owner.name} ran to the {tale.place.landmark} and came back {state}.")
    tale.asked.append((f"How was the {owner.pet}?", state, [], list(STATES)))
