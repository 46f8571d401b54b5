"""The pages of the repository as the tests read them: links, headings, and blocks of code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "recipes", "scripts", "structprune", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for one in FOLDERS for page in (ROOT / one).rglob("*.md"))])
# What a fence may call its content: "sh" and "python" can be run, the others are read.
LANGUAGES = ("sh", "python", "yaml", "json", "text")

_FENCE = re.compile(r"^```(.*)$")
_LINK = re.compile(r"\[(?:[^\]]|\]\[)*\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)")
_CODE = re.compile(r"`[^`]+`")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: What the fence says.
        text: What stands in it.
        line: Number of its first line.
    """

    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[list[str]]:
        """Return the command lines of a shell block as words, without comments."""
        whole = self.text.replace("\\\n", " ")
        return [words for line in whole.splitlines() if (words := shlex.split(line, comments=True))]


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of code of a page, in order."""
    found, lines = [], _lines(page)
    for number, (inside, line) in lines:
        opened = _FENCE.match(line)
        if opened and not inside:
            content = []
            for _, (within, text) in lines:
                if not within:
                    break
                content.append(text)
            found.append(Block(opened[1].strip(), "\n".join(content) + "\n", number + 1))
    return found


def links_of(page: Path) -> list[str]:
    """Return where the links and pictures of a page point to."""
    return [target for line in _prose(page) for target in _LINK.findall(_CODE.sub("code", line))]


def paths_of(page: Path) -> list[str]:
    """Return what a page sets in code and what looks like a path in the repository."""
    said = [span.strip("`") for line in _prose(page) for span in _CODE.findall(line)]
    return [span for span in said if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]+", span)]


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made of them where pages are shown."""
    found: dict[str, int] = {}
    for line in _prose(page):
        if heading := re.match(r"#{1,6} (.*)", line):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{count}" if count else slug for slug, last in found.items() for count in range(last + 1)}


def _prose(page: Path) -> Iterator[str]:
    """Yield the lines outside of blocks of code."""
    return (line for _, (inside, line) in _lines(page) if not inside and not _FENCE.match(line))


def _lines(page: Path) -> Iterator[tuple[int, tuple[bool, str]]]:
    """Yield number and text of every line, and whether it stands in a block; its fences do not."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence and inside:
            inside = False
            yield number, (False, "")  # the closing fence opens nothing
        else:
            yield number, (inside, line)
            inside = inside or bool(fence)
