"""Where data come from: a value that travels whole from a recipe to whatever reads them."""

from dataclasses import dataclass

DEMO = "demo"  # the built-in text, and the model that has learned its world
DEMO_VISION = "demo-vision"  # the built-in questions on images, and the model that answers them
DEMOS = (DEMO, DEMO_VISION)
SUFFIXES = (".txt", ".jsonl", ".parquet")  # of a file that holds a text


@dataclass(frozen=True)
class TextSource:
    """One text, or questions on images.

    Args:
        source: A .txt, .jsonl or .parquet file, "demo" for the built-in text (a folder or file of that name
            is "./demo"), "demo-vision" for the built-in questions on images, else the name of a data set,
            with its configuration after a colon ("name:config").
        column: Which column holds the text, "text" by default; plain text has none.
        split: Which split of a data set; files have none.
        revision: Which commit or branch of a data set; files have none.
    """

    source: str
    column: str | None = None
    split: str = "train"
    revision: str | None = None
