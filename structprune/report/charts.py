"""Charts as SVG inside a page: their colours are classes of the page, so that they follow its dark mode.

Of a page and not of a picture file: those are drawn in `plots`, with matplotlib.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from structprune.report.plots import LINEAR_RATIO

Say = Callable[[float], str]

# In pixels. A chart is as wide as a narrow telephone, unless its bars need more.
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
SLOT, WIDEST = 11, 34
# Of letters of 11 pixels: how wide one is on average, and how far lines are apart.
LETTER, LINE = 6.2, 13
LONGEST_LABEL = 24
DOT = 5
# The page has so many classes s0, s1 ... of colours that stay apart.
COLOURS = 8
# A scale shows at least this share of its largest value, or rounding would look like a difference.
NARROWEST = 0.02


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: What it shows.
        note: How it is to be read.
        svg: The picture.
        width: Its width in pixels.
        legend: Class of a colour, and what it stands for.
    """

    title: str
    note: str
    svg: str
    width: int = WIDTH
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis measures, and how its values are written."""

    title: str
    say: Say


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart: a lower x and a lower y are better.

    Attributes:
        label: What it is called.
        x: Where it stands.
        y: Where it stands.
        error: One standard error of y.
    """

    label: str
    x: float
    y: float
    error: float = 0.0


@dataclass(frozen=True)
class _Scale:
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.logarithmic:
            low, high, here = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values between both ends."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for parts in ((1, 2, 5), (1, 3), (1,)):
                found = [part * 10.0**power for power in powers for part in parts]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= 6:
                    break
            return found
        raw = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def bars(
    title: str,
    note: str,
    rows: Sequence[tuple[str, Mapping[str, float]]],
    axis: Axis,
    line: tuple[float, str] | None = None,
) -> Chart:
    """Return a chart of one bar per block, stacked by what each part adds to it.

    Args:
        title: What it shows.
        note: How it is to be read.
        rows: What stands under a bar -> its parts.
        axis: What their height means.
        line: A value that stands as a line across all bars, and what is written at it.
    """
    parts = list(dict.fromkeys(part for _, found in rows for part in found))
    width = max(WIDTH, LEFT + RIGHT + SLOT * len(rows))
    heights = [sum(found.values()) for _, found in rows]
    top = max([*heights, line[0] if line else 0.0]) * 1.12 or 1.0
    scale = _Scale(0, top, HEIGHT - BOTTOM, TOP)
    svg = _canvas(title, width)
    _level(svg, scale, axis, width)
    slot = (width - LEFT - RIGHT) / max(len(rows), 1)
    thick = min(0.72 * slot, WIDEST)
    every = math.ceil(LETTER * (max((len(label) for label, _ in rows), default=1) + 1) / slot)
    for number, (label, found) in enumerate(rows):
        middle, low = LEFT + (number + 0.5) * slot, 0.0
        for part, value in found.items():
            bottom, high = scale(low), scale(low + value)
            box = _add(
                svg,
                "rect",
                x=middle - thick / 2,
                y=high,
                width=thick,
                height=bottom - high,
                class_=_colour(parts, part),
            )
            named = f", {part}" if len(parts) > 1 else ""
            _add(box, "title", f"{label}{named}: {axis.say(value)}")
            low += value
        if number % every == 0:
            _add(svg, "text", label, x=middle, y=HEIGHT - BOTTOM + 14, class_="middle")
    if line is not None:
        level = scale(line[0])
        _add(svg, "line", x1=LEFT, x2=width - RIGHT, y1=level, y2=level, class_="reference")
        _add(svg, "text", line[1], x=width - RIGHT, y=level - 4, class_="end strong")
    _add(svg, "text", "block", x=(LEFT + width - RIGHT) / 2, y=HEIGHT - 8, class_="middle")
    legend = [(_colour(parts, part), part) for part in parts] if len(parts) > 1 else []
    return Chart(title, note, ElementTree.tostring(svg, encoding="unicode"), width, legend)


def scatter(title: str, note: str, dots: Sequence[Dot], x: Axis, y: Axis) -> Chart:
    """Return a chart of points, with a line through those that no other beats in both.

    Args:
        title: What it shows.
        note: How it is to be read.
        dots: At least one; y is logarithmic where all are positive and lie far apart.
        x: What is on the horizontal axis.
        y: What is on the vertical axis.
    """
    svg = _canvas(title, WIDTH)
    across = _across([dot.x for dot in dots])
    up = _upward(dots)
    _level(svg, up, y, WIDTH)
    for value in across.ticks():
        _add(svg, "text", x.say(value), x=across(value), y=HEIGHT - BOTTOM + 14, class_="middle")
    _add(svg, "text", x.title, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_="middle")
    best = front(dots)
    if len(best) > 1:
        way = f"M{_short(across(best[0].x))},{_short(up(best[0].y))}"
        for after in best[1:]:
            way += f"H{_short(across(after.x))}V{_short(up(after.y))}"
        _add(svg, "path", d=way, class_="front")
    for dot in dots:
        left, level = across(dot.x), up(dot.y)
        if dot.error:
            low, high = up(max(dot.y - dot.error, up.low)), up(min(dot.y + dot.error, up.high))
            _add(svg, "line", x1=left, x2=left, y1=low, y2=high, class_="error")
        circle = _add(svg, "circle", cx=left, cy=level, r=DOT, class_="best" if dot in best else "beaten")
        spread = f" ± {y.say(dot.error)}" if dot.error else ""
        _add(circle, "title", f"{dot.label}: {x.title} {x.say(dot.x)}, {y.title} {y.say(dot.y)}{spread}")
    _name(svg, [(dot.label, across(dot.x), up(dot.y)) for dot in dots])
    return Chart(title, note, ElementTree.tostring(svg, encoding="unicode"))


def front(dots: Sequence[Dot]) -> list[Dot]:
    """Return the points that none beats in both, from left to right."""
    found: list[Dot] = []
    for dot in sorted(dots, key=lambda one: (one.x, one.y)):
        if not found or dot.y < found[-1].y:
            found.append(dot)
    return found


def _across(values: Sequence[float]) -> _Scale:
    low, high = min(values), max(values)
    spare = max(0.12 * (high - low), NARROWEST * abs(high), 1e-9) / 2
    return _Scale(low - spare, high + spare, LEFT, WIDTH - RIGHT)


def _upward(dots: Sequence[Dot]) -> _Scale:
    lowest, highest = min(dot.y for dot in dots), max(dot.y + dot.error for dot in dots)
    if lowest > 0 and highest > LINEAR_RATIO * lowest:
        return _Scale(lowest / 1.6, highest * 1.6, HEIGHT - BOTTOM, TOP, logarithmic=True)
    top = highest * 1.12 if highest > 0 else 1.0
    return _Scale(min(0.0, lowest * 1.12), top, HEIGHT - BOTTOM, TOP)


def _level(svg: Element, scale: _Scale, axis: Axis, width: int) -> None:
    """Draw the vertical axis: its title on top, a line and a value at each of its ticks."""
    for value in scale.ticks():
        level = scale(value)
        _add(svg, "line", x1=LEFT, x2=width - RIGHT, y1=level, y2=level, class_="grid")
        _add(svg, "text", axis.say(value), x=LEFT - 6, y=level + 4, class_="end")


def _name(svg: Element, names: Sequence[tuple[str, float, float]]) -> None:
    """Write a name beside each point, moved down where it would stand on another one."""
    taken: list[tuple[float, float, float]] = []
    for label, left, level in sorted(names, key=lambda one: (one[2], one[1])):
        short = label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"
        wide = LETTER * len(short)
        after = left + 9 + wide <= WIDTH - 2
        start = left + 9 if after else left - 9 - wide
        place = level - 5  # a line through the points leaves them to the right
        while place < HEIGHT - BOTTOM and any(
            abs(place - other) < LINE and start < high and low < start + wide for low, high, other in taken
        ):
            place += 2
        taken.append((start, start + wide, place))
        if place - level > LINE:
            _add(svg, "line", x1=left, x2=left + (7 if after else -7), y1=level, y2=place - 4, class_="error")
        _add(
            svg,
            "text",
            short,
            x=left + (9 if after else -9),
            y=place,
            class_="strong" if after else "strong end",
        )


def _canvas(title: str, width: int) -> Element:
    svg = Element("svg", {"viewBox": f"0 0 {width} {HEIGHT}", "role": "img"})
    _add(svg, "title", title)
    return svg


def _add(parent: Element, tag: str, text: str = "", **attributes: float | str) -> Element:
    """Add an element; `class_` stands for "class". What is text is escaped when it is written."""
    said = {
        name.rstrip("_"): value if isinstance(value, str) else _short(value)
        for name, value in attributes.items()
    }
    element = ElementTree.SubElement(parent, tag, said)
    element.text = text or None
    return element


def _colour(parts: Sequence[str], part: str) -> str:
    """Return the class of a part's colour; a second round of colours is paler."""
    number = parts.index(part)
    return f"s{number % COLOURS}" + (" pale" if number >= COLOURS else "")


def _short(value: float) -> str:
    return f"{round(value, 1):g}"
