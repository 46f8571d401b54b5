"""What a row of the table of bad inputs is made of: inputs, the command line, and what it must end with.

The rows are in `tests.table_rows`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.checkpoints import change_header, config, header_of, tensors, write
from tests.damage import FILE, HEAD, Q
from tests.forks import ALONE, Around, Stop
from tests.specimens import calibrated, quick
from tests.tiny import LENGTH, VOCABULARY, save_tiny, tokenizer

Line = Callable[[Path], list[object]]


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        what: What is wrong with it, in a few words.
        line: Puts it into a folder and returns the command line.
        code: The exit code.
        told: What stderr must hold.
        stop: How the disk refuses.
        around: What is around the command.
    """

    what: str
    line: Line
    code: int
    told: tuple[str, ...]
    stop: Stop | None = None
    around: Around = field(default=ALONE)


def pruning(*more: object) -> list[object]:
    return ["prune", "model", "out", "--method", "magnitude", *more]


def model(what: str, spoil: Callable[[Path], object], *told: str, code: int = 3) -> Case:
    """Return the pruning of a tiny hand-written model that is damaged."""

    def line(place: Path) -> list[object]:
        spoil(place / "model")
        return pruning()

    return Case(what, line, code, told)


def llama(what: str, change: Callable[[Path], list[object]], *told: str, code: int = 3) -> Case:
    """Return a command on a tiny Llama with a tokenizer; `change` alters what is in the folder."""

    def line(place: Path) -> list[object]:
        save_tiny("llama", place / "model")
        (place / "text.txt").write_text("one follows another, and two come next. " * 60)
        return change(place)

    return Case(what, line, code, told)


def words(what: str, *line: object, told: tuple[str, ...], code: int = 2) -> Case:
    """Return a pruning of the Llama with these words at the end."""
    return llama(what, lambda _: pruning(*line), *told, code=code)


def recipe(what: str, text: str, *told: str, code: int = 2) -> Case:
    """Return the run of a recipe."""

    def change(place: Path) -> list[object]:
        (place / "recipe.yaml").write_text(text)
        return ["prune", "recipe.yaml"]

    return llama(what, change, *told, code=code)


def many_names(folder: Path) -> None:
    """Write 200 000 tensors of no size beside the model's own."""
    path = write(folder) / FILE
    header = json.loads(header_of(path))
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    change_header(path, json.dumps(header | {f"x{n}": empty for n in range(200_000)}).encode())


def hundred_megabytes(folder: Path) -> None:
    with (write(folder) / "config.json").open("ab") as file:
        file.truncate(100_000_000)


def one_constant(folder: Path) -> None:
    content = tensors()
    content[Q].fill_(0.5)
    write(folder, content)


def tied(folder: Path, *, head: torch.Tensor | None) -> None:
    content = {name: tensor for name, tensor in tensors().items() if name != HEAD}
    write(
        folder, content if head is None else content | {HEAD: head}, settings=config(tie_word_embeddings=True)
    )


def mixed(folder: Path) -> None:
    write(folder, tensors(torch.bfloat16) | {HEAD: tensors()[HEAD]}, shards=3)


def inspecting(spoil: Callable[[Path], object], *more: object) -> Line:
    def line(place: Path) -> list[object]:
        spoil(place / "model")
        return ["inspect", "model", *more]

    return line


def large_vocabulary(place: Path) -> list[object]:
    large = tokenizer()
    large.add_tokens([f"<extra{number}>" for number in range(VOCABULARY)])
    large.save_pretrained(place / "model")
    return on_text(place)


def no_tokenizer(place: Path) -> list[object]:
    for path in (place / "model").glob("tokenizer*"):
        path.unlink()
    return on_text(place)


def on_text(place: Path, *more: object) -> list[object]:
    text = place / "text.txt"
    return ["prune", "model", "out", "--method", "wanda", *calibrated(text), *quick(text), *more]


def too_long(place: Path) -> list[object]:
    return on_text(place, "--length", LENGTH + 1)


def text(content: bytes, name: str = "bad.txt") -> Callable[[Path], list[object]]:
    def change(place: Path) -> list[object]:
        (place / name).write_bytes(content)
        return on_text(place, "--calibration", place / name)

    return change


def endless(place: Path) -> list[object]:
    with (place / "bad.txt").open("wb") as file:
        file.truncate(5 * 10**9)
    return on_text(place, "--calibration", place / "bad.txt")


def pruned_already(*more: object) -> Callable[[Path], list[object]]:
    def change(place: Path) -> list[object]:
        content = tensors()
        for name in content:
            if "proj" in name:
                content[name][:, ::2] = 0
        shutil.rmtree(place / "model")
        write(place / "model", content)
        return pruning("--sparsity", 0.75, *more)

    return change


def kept_adapter(place: Path) -> list[object]:
    shutil.copytree(place.parent / "specimens" / "adapter", place / "adapter")
    return ["prune", "adapter", "out", "--method", "magnitude"]


def output(*names: str, overwrite: bool = True) -> Callable[[Path], list[object]]:
    def change(place: Path) -> list[object]:
        (place / "link").symlink_to(place / "model")
        more = ["--overwrite"] if overwrite else []
        return ["prune", "model", Path(*names), "--method", "magnitude", *more]

    return change


def occupied(place: Path) -> list[object]:
    (place / "taken").mkdir()
    (place / "taken" / "thesis.txt").write_text("the only copy")
    return ["prune", "model", "taken", "--method", "magnitude"]
