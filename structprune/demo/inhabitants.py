"""The facts of the demo's closed world: who lives where, does what and likes what. They never change."""

from dataclasses import dataclass
from functools import cache

from structprune.demo.dice import Dice

WORLD_SEED = 2026  # deals the facts out once; not a seed of any text


def words(line: str) -> tuple[str, ...]:
    """Return the words of a line."""
    return tuple(line.split())


WOMEN = words(
    "Mira Ana Tilda Greta Runa Isolde Petra Wanja Sabine Olga Frida Celia "
    "Nadia Hilde Jorun Lotte Marta Edda Vera Kaia Britta Selma Dora Una"
)
MEN = words(
    "Tom Bren Oskar Anton Ruben Falk Jonas Emil Gregor Hanno Viktor Lars "
    "Milan Pavel Stefan Ulrich Kasper Dario Felix Igor Norbert Quentin Simon Yaro"
)
PLACES = words(
    "Oldford Marwick Tarn Elmstead Brackwater Cold-Harbour Dunmere Farholt Gorsley Hexby "
    "Ivenport Kelling Lowmoor Netherby Orrin Pellgate Ravensea Stonehurst Underhill Westray"
)
RIVERS = words(
    "Senn Alder Breck Calla Dove Esk Fenn Glim Hale Isk "
    "Jarrow Kest Lune Morrow Nidd Orle Piddle Quill Rothe Sill"
)
JOBS = words(
    "baker miller smith tailor fisher carpenter teacher doctor weaver painter sailor mason "
    "gardener clerk hunter singer printer shepherd potter cook driver judge glazier farmer"
)
COLOURS = words("red blue green yellow white black brown grey purple orange")
FOODS = words(
    "plums apples pears cakes buns figs nuts eggs onions beans carrots cherries olives leeks turnips dates"
)
PETS = words("cat dog goat parrot rabbit goose pony tortoise mouse ferret")
TOOLS = words("flute fiddle drum harp horn lute bell organ")
LANDMARKS = words("bridge tower mill castle well church lighthouse market gate statue windmill library")
GOODS = words("cheese wool salt glass honey rope paper boats tiles candles silver cider")
MONTHS = words("January February March April May June July August September October November December")


@dataclass(frozen=True)
class Town:
    """A town and what is true of it."""

    name: str
    river: str
    landmark: str
    goods: str
    fair: str


@dataclass(frozen=True)
class Person:
    """Somebody and what is true of them."""

    name: str
    she: str
    home: Town
    job: str
    colour: str
    food: str
    pet: str
    tool: str
    friend: str

    @property
    def her(self) -> str:
        """Return the possessive."""
        return "her" if self.she == "she" else "his"

    @property
    def them(self) -> str:
        """Return the object form."""
        return "her" if self.she == "she" else "him"


@cache
def places() -> tuple[Town, ...]:
    """Return the towns; each has a river of its own, the rest may be shared."""
    dice = Dice(WORLD_SEED)
    rivers = dice.several(RIVERS, len(PLACES))
    return tuple(
        Town(name, river, dice.pick(LANDMARKS), dice.pick(GOODS), dice.pick(MONTHS))
        for name, river in zip(PLACES, rivers, strict=True)
    )


@cache
def people() -> tuple[Person, ...]:
    """Return the inhabitants, the most talked about first."""
    dice = Dice(WORLD_SEED + 1)
    names = dice.several(WOMEN + MEN, len(WOMEN) + len(MEN))
    return tuple(
        Person(
            name=name,
            she="she" if name in WOMEN else "he",
            home=dice.pick(places()),
            job=dice.pick(JOBS),
            colour=dice.pick(COLOURS),
            food=dice.pick(FOODS),
            pet=dice.pick(PETS),
            tool=dice.pick(TOOLS),
            friend=dice.pick([other for other in names if other != name]),
        )
        for name in names
    )


def fame(count: int) -> list[float]:
    """Return how often each of `count` entities is talked about, the first most.

    A few are met in every other text and most seldom, as in real text: that is what gives a network's inputs
    the unequal scales on which pruning methods differ. The offset keeps the rarest learnable.
    """
    return [1.0 / (rank + 5) for rank in range(count)]
