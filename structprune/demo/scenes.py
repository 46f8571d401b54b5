"""The scenes of the vision demo: a few coloured shapes on a dark striped ground, drawn with whole numbers.

A picture follows from its scene alone, byte by byte, on every platform. A thing covers four patches of the
demo model's tower, so most of a picture is ground.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.demo.dice import Dice
from structprune.demo.inhabitants import words

SIDE = 96  # pixels of a picture, each way
CELL = 32  # pixels of a place: three by three of them
PATCH = 8  # pixels of a patch of the demo model's tower
RADIUS = 7  # of the largest thing, in pixels

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "purple": (170, 50, 200),
    "white": (235, 235, 235),
}
SHAPES = words("circle square triangle cross")
PLACES = words("northwest north northeast west centre east southwest south southeast")
NUMBERS = words("two three four five")


@dataclass(frozen=True)
class Thing:
    """A shape in a scene.

    Attributes:
        colour: One of COLOURS.
        shape: One of SHAPES.
        place: One of PLACES; no other thing of the scene is there.
        x: Column of its centre, in pixels.
        y: Row of its centre, in pixels, from the top.
        radius: In pixels.
    """

    colour: str
    shape: str
    place: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        things: Two to five.
        ground: Brightness of the ground's darker stripes, 0-255.
        stripes: How much brighter the others are, and their run across and down, in 1/16 stripe per pixel.
    """

    things: tuple[Thing, ...]
    ground: int
    stripes: tuple[int, int, int]

    def only(self, **attributes: str) -> Thing | None:
        """Return the one thing with these attributes; None when there is none or more than one."""
        found = [one for one in self.things if attributes.items() <= vars(one).items()]
        return found[0] if len(found) == 1 else None


def imagine(dice: Dice) -> Scene:
    """Draw a scene in which some thing is the only one of its colour, and some the only one of its shape."""
    while True:
        places = dice.several(PLACES, dice.number(2, 1 + len(NUMBERS)))
        scene = Scene(
            things=tuple(_put(dice, place) for place in places),
            ground=dice.number(20, 60),
            stripes=(dice.number(0, 30), dice.number(0, 4), dice.number(0, 4)),
        )
        if all(
            any(scene.only(**{key: getattr(one, key)}) for one in scene.things) for key in ("colour", "shape")
        ):
            return scene


def _put(dice: Dice, place: str) -> Thing:
    row, column = divmod(PLACES.index(place), 3)
    # Four patches meet where its centre is, give or take a pixel.
    steps = CELL // PATCH - 2
    x, y = (CELL * at + PATCH * (1 + dice.number(0, steps)) + dice.number(-1, 0) for at in (column, row))
    return Thing(dice.pick(tuple(COLOURS)), dice.pick(SHAPES), place, x, y, dice.number(RADIUS - 1, RADIUS))


def render(scene: Scene) -> Tensor:
    """Return the picture of a scene, shape [3, SIDE, SIDE], uint8, red green blue."""
    down, across = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    step, run_across, run_down = scene.stripes
    picture = scene.ground + step * ((across * run_across + down * run_down) // 16 % 2)
    picture = picture.expand(3, SIDE, SIDE).clone()
    for thing in scene.things:
        colour = torch.tensor(COLOURS[thing.colour])[:, None, None]
        picture = torch.where(outline(thing, across - thing.x, down - thing.y), colour, picture)
    return picture.to(torch.uint8)


def outline(thing: Thing, across: Tensor, down: Tensor) -> Tensor:
    """Return which pixels a thing covers, bool, of the shape of its arguments.

    Args:
        thing: Of some shape and radius.
        across: Pixels to the right of its centre.
        down: Pixels below it.
    """
    radius = thing.radius
    inside = (across.abs() <= radius) & (down.abs() <= radius)
    if thing.shape == "circle":
        return across**2 + down**2 <= radius**2
    if thing.shape == "triangle":
        return inside & (2 * across.abs() <= down + radius)
    if thing.shape == "cross":
        return inside & ((3 * across.abs() <= radius) | (3 * down.abs() <= radius))
    return inside


def covered(scene: Scene) -> Tensor:
    """Return how many pixels of each patch each thing covers, shape [things, patches], patches row by row."""
    down, across = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    masks = torch.stack([outline(one, across - one.x, down - one.y) for one in scene.things])
    patches = masks.view(len(masks), SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
    return patches.sum((2, 4)).flatten(1)
