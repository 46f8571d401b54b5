"""README.md of the benches: each bench writes its own section, whole, and leaves those of the others."""

import re
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).with_name("README.md")
# What pruning costs in quality is what a reader comes for; times and memory follow.
LEADING = ("quality.py", "structure_quality.py", "tokens_quality.py", "tokens_rivals.py")
CONTENTS = "Sections: "
TITLE = "# Figures\n\nEach section is written by the bench that it names, with `--write`.\n"


def write_section(bench: str, text: str, readme: Path = README, *, others_stay: bool = False) -> None:
    """Put a bench's figures into the file of all figures, in place of its last ones.

    Args:
        bench: The file of the bench; its section is called so.
        text: Markdown without headings of the first two levels.
        readme: The file; it is made where it is missing.
        others_stay: Whether a model's part of the last figures stays, after the new ones, where they say
            nothing of it; parts begin with a heading of the third level.
    """
    said = readme.read_text(encoding="utf-8") if readme.is_file() else TITLE
    head, *sections = re.split(r"^## ", said, flags=re.MULTILINE)
    kept = [one for one in sections if one.partition("\n")[0] != bench]
    if others_stay:
        old = next((one for one in sections if one not in kept), "")
        _, *parts = re.split(r"^(?=### )", old, flags=re.MULTILINE)
        new = set(re.findall(r"^### .*$", text, flags=re.MULTILINE))
        text += "".join(f"\n\n{one.strip()}" for one in parts if one.partition("\n")[0] not in new)
    kept = sorted([*kept, f"{bench}\n\n{text.strip()}\n"], key=_place)
    kept = [f"## {one.strip()}\n" for one in kept]
    words, _, _ = head.partition(CONTENTS)
    names = [one.removeprefix("## ").partition("\n")[0] for one in kept]
    contents = CONTENTS + " · ".join(f"[{name}](#{_anchor(name)})" for name in names) + "\n"
    readme.write_text("\n".join([f"{words.strip()}\n", contents, *kept]), encoding="utf-8")


def _anchor(heading: str) -> str:
    """Return what a link to a heading says."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _place(section: str) -> tuple[int, str]:
    """Return by what sections are sorted: the leading ones first, the others by name."""
    name = section.partition("\n")[0]
    return (LEADING.index(name) if name in LEADING else len(LEADING)), section


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
