"""Questions on images: what a vision-language model is calibrated and measured on, read from JSON lines.

A row is `{"image": PATH, "question": TEXT}`, with `"answer"` where it is measured and `"kind"` where figures
are to be told apart by it. Paths are relative to the file, or whole; they may lead anywhere, as those that a
user writes on the command line may.
"""

import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from structprune.calibration.text_source import DEMO_VISION, TextSource
from structprune.calibration.texts import data_file, jsonl_rows
from structprune.errors import EnvironmentFailure, InputError
from structprune.models.processor import missing_vision

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLE = '{"image": "cat.png", "question": "What is it?"}'
# Written from the demo's scenes by `scripts/train_demo.py --vision`.
_DEMO_FILE = Path(__file__).parents[1] / "demo" / "vision" / "calibration.jsonl"


@dataclass(frozen=True)
class ImageQuestion:
    """A question on one image.

    Attributes:
        image: A file, or pixels [3, height, width], uint8.
        question: As a user would ask it.
        answer: The right one; None where the data do not tell.
        kind: What the question is about; empty where the data do not tell.
        where: The file and the line, for errors.
    """

    image: Path | Tensor
    question: str
    answer: str | None = None
    kind: str = ""
    where: str = ""

    def open_image(self) -> "Image":
        """Return the image in red, green and blue.

        Raises:
            EnvironmentFailure: pillow is not installed, or the file may not be read.
            InputError: It is no image.
        """
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise missing_vision(error) from None
        if isinstance(self.image, Tensor):
            return Image.fromarray(self.image.permute(1, 2, 0).contiguous().numpy())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(self.image) as image:
                    return image.convert("RGB")
        except PermissionError as error:
            raise EnvironmentFailure(
                f"{self.image}: {error.strerror}", hint="check the rights of the file"
            ) from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
            # What pillow raises of damaged files depends on the format.
            said = str(error).partition("\n")[0]
            raise InputError(
                f"{self.where}: {self.image} is not a readable image: {said}",
                hint="save it as PNG or JPEG, or take the row out",
            ) from None


@dataclass(frozen=True)
class LeftQuestions:
    """The questions of a source that a run did not look at, in the source's order.

    Attributes:
        text: Where they come from.
        questions: There may be none.
    """

    text: TextSource
    questions: tuple[ImageQuestion, ...]


def asks_on_images(text: TextSource) -> bool:
    """Tell whether a source holds questions on images; its first row decides, errors are those of reading."""
    if text.source == DEMO_VISION:
        return True
    if text.column is not None or not text.source.endswith(".jsonl"):
        return False
    rows = islice(jsonl_rows(data_file(text.source), EXAMPLE), 1)
    return any(row.keys() & {"image", "question"} and "text" not in row for _, row in rows)


def read_questions(text: TextSource) -> list[ImageQuestion]:
    """Read every question of a source; the images are looked for and not opened.

    Args:
        text: A .jsonl file, or "demo-vision" for the built-in questions.

    Raises:
        InputError: The file is missing or damaged, a row has no image or no question, or there is no such
            image.
    """
    path = _DEMO_FILE if text.source == DEMO_VISION else data_file(text.source)
    found = [_question(row, path, f"{path}: line {number}") for number, row in jsonl_rows(path, EXAMPLE)]
    if not found:
        raise InputError(f"{path}: no questions in it", hint=f"one object a line, such as {EXAMPLE}")
    return found


def _question(row: dict[str, Any], path: Path, where: str) -> ImageQuestion:
    values: dict[str, str] = {}
    for key in ("image", "question", "answer", "kind"):
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            values[key] = value
        elif key in row or key in ("image", "question"):
            said = f"holds {value!r:.40}, expected text" if key in row else "is missing"
            raise InputError(f"{where}: key {key!r} {said}", hint=f"a row is such as {EXAMPLE}")
    image = path.parent / values["image"]
    try:
        there = image.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        raise InputError(
            f"{where}: {image!s:.200}: no such image",
            hint="paths are relative to the file of the questions, or whole",
        )
    return ImageQuestion(image, values["question"], values.get("answer"), values.get("kind", ""), where)
