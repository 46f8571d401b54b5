"""Where a text comes from: a value that travels whole from a recipe to whatever reads the text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextSource:
    """One text.

    Args:
        source: A .txt, .jsonl or .parquet file, "demo" for the built-in text (a folder or file of that name
            is "./demo"), else the name of a data set, with its configuration after a colon ("name:config").
        column: Which column holds the text, "text" by default; plain text has none.
        split: Which split of a data set; files have none.
        revision: Which commit or branch of a data set; files have none.
    """

    source: str
    column: str | None = None
    split: str = "train"
    revision: str | None = None
