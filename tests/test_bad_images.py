"""Bad input of runs on images, line by line: one error that names what it is, and its exit code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import structprune
from structprune.calibration.image_questions import ImageQuestion
from structprune.calibration.images import batch_of
from structprune.errors import InputError
from structprune.models.identity import applied
from structprune.models.outputs import logits
from structprune.plan.key import Key
from structprune.plan.plan import Plan
from tests.conftest import Command
from tests.methods import Home, home, quick
from tests.pictures import Pictures
from tests.seeing import ROWS, save_rows, save_seeing

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Home("llava", depth=4, images=True).save(tmp_path_factory.mktemp("seeing") / "model")


def cut_off(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])


def no_image(file: Path) -> None:
    file.write_text("not an image")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def without_pixels(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[16:24] = bytes(8)  # width and height in the header of a PNG
    file.write_bytes(raw)


def bomb(file: Path) -> None:
    """Write an image of a few kilobytes that would take 300 megabytes of memory."""
    Image.new("1", (10_000, 10_000)).save(file)


def pipe(file: Path) -> None:
    import os

    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [cut_off, no_image, empty, without_pixels, bomb])
def test_a_file_that_is_no_readable_image(
    damage: Callable[[Path], None], seeing: Path, tmp_path: Path, command: Command
) -> None:
    rows = save_rows(tmp_path)
    damage(tmp_path / "images/one.png")
    done = command("prune", seeing, tmp_path / "out", "--method", "fitprune", "--calibration", rows)
    assert done.code == 3
    assert f"{rows}: line " in done.err and "one.png is not a readable image" in done.err
    assert "save it as PNG or JPEG, or take the row out" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "image", ["images/three.png", "images", "../gone.png", "/gone.png", "x" * 300, "a\0b"]
)
def test_an_image_that_is_not_there(image: str, seeing: Path, tmp_path: Path, command: Command) -> None:
    rows = save_rows(tmp_path, [*ROWS, {"image": image, "question": "?"}])
    for words in (
        ("prune", seeing, tmp_path / "out", "--method", "fitprune", "--calibration", rows),
        ("evaluate", seeing, "--questions", rows),
    ):
        done = command(*words)
        assert done.code == 3, words
        assert f"{rows}: line 4: " in done.err and "no such image" in done.err
    assert "relative to the file of the questions, or whole" in done.err


def test_a_path_may_lead_anywhere_but_waits_for_nothing(
    seeing: Path, tmp_path: Path, command: Command
) -> None:
    inside = save_rows(tmp_path / "inside")
    whole = [row | {"image": str(inside.parent / str(row["image"]))} for row in ROWS]
    outside = [row | {"image": f"../inside/{row['image']}"} for row in ROWS]
    found = [
        command("evaluate", seeing, "--questions", save_rows(tmp_path / name, rows), "--json").json
        for name, rows in (("whole", whole), ("outside", outside))
    ]
    assert found[0]["questions"] == found[1]["questions"]
    pipe(inside.parent / "images/one.png")
    assert command("evaluate", seeing, "--questions", inside).code == 3


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "What is it?"}, "key 'image' is missing"),
        ({"image": "images/one.png"}, "key 'question' is missing"),
        ({"image": "images/one.png", "question": "Is <image> a cat?"}, "the question holds '<image>'"),
    ],
)
def test_a_row_that_is_no_question_on_an_image(
    row: dict[str, object], told: str, seeing: Path, tmp_path: Path, command: Command
) -> None:
    rows = save_rows(tmp_path, [row | {"answer": "a"}])
    for words in (
        ("prune", seeing, tmp_path / "out", "--method", "fitprune", "--calibration", rows),
        ("evaluate", seeing, "--questions", rows),
    ):
        done = command(*words)
        assert done.code == 3, words
        assert f"{rows}: line 1: " in done.err and told in done.err


def test_prompts_with_another_number_of_placeholders(tmp_path: Path, command: Command) -> None:
    # Patches of 4 where the model has patches of 8: 64 placeholders for 16 features.
    folder = save_seeing(tmp_path / "model", patch_size=4)
    rows = save_rows(tmp_path)
    for words in (
        ("prune", folder, tmp_path / "out", "--method", "fitprune", "--calibration", rows),
        ("evaluate", folder, "--questions", rows),
    ):
        done = command(*words)
        assert done.code == 3, words
        assert "placeholders for " in done.err and "must be the model's" in done.err


class Picky:
    """A processor that takes no image much longer than wide, as that of Qwen2-VL does."""

    def __init__(self, processor: Any, *, alike: bool = False) -> None:
        self._processor, self._alike = processor, alike

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: list[Any], **rest: Any) -> Any:
        if any(image.height > 4 * image.width for image in images):
            raise ValueError("absolute aspect ratio must be\nsmaller than 4")
        if self._alike and len({image.size for image in images}) > 1:
            raise ValueError("sizes differ")
        return self._processor(images=images, **rest)


def test_a_size_that_the_processor_refuses(seeing: Path) -> None:
    def asked(height: int, number: int) -> ImageQuestion:
        return ImageQuestion(torch.zeros(3, height, 8, dtype=torch.uint8), "?", where=f"rows: line {number}")

    processor: Any = structprune.processor(seeing)
    assert batch_of([asked(32, 1)], Picky(processor))["input_ids"].shape[0] == 1  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"line 2: .* refuses an image of 8 x 33 pixels: .*smaller than 4"):
        batch_of([asked(32, 1), asked(33, 2)], Picky(processor))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"line 1: .* makes no batch of 2 images: sizes differ"):
        batch_of([asked(32, 1), asked(16, 2)], Picky(processor, alike=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "said", "told"),
    [
        ("divprune", "keep_ratio=0.01", "keep_ratio can be from 0.0625 to 1"),
        ("divprune", "tokens=0", "greater than or equal to 1"),
        ("fastv", "visual_flops=0.1", "visual_flops can be from 0.5"),
        ("fastv", "avg_tokens=2", "avg_tokens can be from 8.5 to 16"),
        ("fastv", "keep_ratio=nan", "keep_ratio"),
    ],
)
def test_a_budget_that_cannot_be_reached(
    method: str, said: str, told: str, seeing: Path, tmp_path: Path, command: Command
) -> None:
    for more in ((), ("--dry-run",)):
        done = command(
            "prune", seeing, tmp_path / "out", "--method", method, "--set", f"target.{said}", *more
        )
        assert done.code == 2 and told in done.err


@pytest.mark.parametrize(
    ("name", "tokens", "told"),
    [
        (
            "model.language_model.layers.9",
            torch.tensor(4),
            "no such block, the model has .*layers.0 to .*layers.3",
        ),
        ("model.language_model", torch.tensor(4), "no such block"),
        (None, torch.tensor(0), "leaves 0, expected a number of tokens from 1"),
        (None, torch.tensor(-3), "leaves -3"),
        (None, torch.tensor(0.0), "a share above 0 and at most 1"),
        (None, torch.tensor(1.5), r"leaves 1\.5"),
        (None, torch.tensor(float("nan")), "leaves nan"),
        (None, torch.tensor([2, 3]), r"leaves \[2, 3\]"),
    ],
)
def test_a_plan_that_says_what_no_model_can_do(name: str | None, tokens: Tensor, told: str) -> None:
    model = home("divprune").model()
    pruner = quick("divprune", target={"keep_ratio": 0.5})
    sound = pruner.calibrate(model, [])
    (key,) = sound
    writer = pruner.writer(None, model, sound.weights)
    for _ in sound.blocks[:-1]:
        writer.write({}, {})
    writer.write({Key(name or key.name, "tokens"): tokens}, {})
    plan: Plan = writer.finish({})
    picture = Pictures("llava").batch()
    before = logits(model, picture)
    with pytest.raises(InputError, match=told):
        pruner.apply(model, plan)
    assert plan.id not in applied(model) and torch.equal(logits(model, picture), before)
