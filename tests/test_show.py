"""What `structprune show` draws is what the model computes; bad input is refused in a line."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

import structprune
from structprune.calibration.image_questions import ImageQuestion
from structprune.calibration.images import batch_of
from structprune.errors import UsageError
from structprune.models.processor import processor
from structprune.pipeline.show import _drops
from structprune.pruners import catalogue
from structprune.report.kept_tokens import DIMMED, kept_tokens
from structprune.report.patches import Patches, patches_of
from structprune.runtime.attach import engine_of
from tests.conftest import Command
from tests.methods import QUICK, short_runs
from tests.oracle import token_pruner
from tests.pictures import BLOCKS, END, FAMILIES, IMAGE, START, Pictures, vision_model
from tests.seeing import save_rows

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    with short_runs():
        yield


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows")).parent / "images/one.png"


@pytest.fixture(scope="module")
def pruned(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    pruner = catalogue.find("fastv")(target={"keep_ratio": 0.25})
    structprune.prune(seeing, out, pruner, writing=QUICK["writing"])
    return out


class TestCommand:
    def test_it_shows_the_tokens_that_the_model_computes_to_the_end(
        self, pruned: Path, picture: Path, tmp_path: Path, command: Command
    ) -> None:
        file = tmp_path / "new/kept.png"
        words = ("show", pruned, "--image", picture, "--question", "What is it?", "-o", file)
        found = command(*words, "--json").json
        assert found["drops"] == [{"block": 2, "place": "before", "kept": 4}]
        assert (found["tokens"], found["rows"], found["columns"]) == (16, 4, 4)
        # Tokens that were dropped end as zeros.
        model, _ = structprune.load(pruned)
        batch = batch_of([ImageQuestion(picture, "What is it?")], processor(pruned))
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[-1][0]
        alive = states[batch["input_ids"][0] == model.config.image_token_id].ne(0).any(-1)
        assert found["kept"] == alive.nonzero()[:, 0].tolist()
        assert len(found["at_random"]) == 4 and found["at_random"] != found["kept"]
        with Image.open(file) as drawn:
            assert drawn.format == "PNG" and drawn.width > 2 * 384
        first = file.read_bytes()
        again = command(*words, "--overwrite")
        assert again.code == 0 and file.read_bytes() == first
        assert "before block 2  4 of 16 visual tokens kept" in again.out
        other = command(*words, "--overwrite", "--seed", 1, "--json").json
        assert other["kept"] == found["kept"] and other["at_random"] != found["at_random"]

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
    def test_images_of_any_size_are_shown_too(
        self, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import Qwen2VLImageProcessorPil

        # Their processors need torchvision for videos: what is put into a prompt is made by hand.
        images = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=256, max_pixels=4096)
        reader = type("Reader", (), {"image_processor": images})()

        def batch(questions: list[ImageQuestion], _: object) -> dict[str, Tensor]:
            made = images(questions[0].open_image(), return_tensors="pt")
            count = int(made["image_grid_thw"].prod()) // 4
            ids = torch.tensor([[1, START, *[IMAGE] * count, END, 5, 6]])
            return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **made}

        monkeypatch.setattr("structprune.pipeline.show.processor", lambda *_: reader)
        monkeypatch.setattr("structprune.pipeline.show.batch_of", batch)
        vision_model(family).save_pretrained(tmp_path / "model")
        pruner = catalogue.find("fastv")(target={"tokens": 2}, block=1)
        structprune.prune(tmp_path / "model", tmp_path / "out", pruner, writing=QUICK["writing"])
        Image.new("RGB", (96, 64), "red").save(tmp_path / "wide.png")
        found = structprune.show(
            tmp_path / "out", tmp_path / "wide.png", "What is it?", tmp_path / "kept.png"
        )
        assert found["drops"] == [{"block": 1, "place": "before", "kept": 2}] and len(found["kept"]) == 2
        assert found["columns"] > found["rows"] and found["tokens"] == found["rows"] * found["columns"]
        assert (tmp_path / "kept.png").is_file()

    @pytest.mark.parametrize(
        ("flag", "value", "code", "said"),
        [
            ("--image", "none.png", 3, "none.png: no such image"),
            ("--image", "words.txt", 3, "is not a readable image"),
            ("-o", "kept.jpg", 2, "a name that ends in .png"),
            ("-o", "there.png", 4, "exists"),
            ("--question", "What <image> is it?", 3, "which stands for an image"),
        ],
    )
    def test_bad_input_is_refused(
        self,
        flag: str,
        value: str,
        code: int,
        said: str,
        pruned: Path,
        picture: Path,
        tmp_path: Path,
        command: Command,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "there.png").write_text("mine")
        (tmp_path / "words.txt").write_text("words")
        usual = {"--image": picture, "--question": "What?", "-o": "kept.png"} | {flag: value}
        done = command("show", pruned, *(word for pair in usual.items() for word in pair))
        assert done.code == code and said in done.err
        assert (tmp_path / "there.png").read_text() == "mine" and not (tmp_path / "kept.png").exists()

    def test_a_folder_whose_model_computes_all_tokens_is_refused(
        self, seeing: Path, picture: Path, tmp_path: Path, command: Command
    ) -> None:
        for model in (seeing, "demo"):
            done = command(
                "show", model, "--image", picture, "--question", "What?", "-o", tmp_path / "kept.png"
            )
            assert done.code == 2 and "no plan in it drops visual tokens" in done.err

    def test_a_folder_whose_images_are_made_smaller_is_refused(
        self, seeing: Path, picture: Path, tmp_path: Path, command: Command
    ) -> None:
        pruner = catalogue.find("downsample")(target={"tokens": 4})
        structprune.prune(seeing, tmp_path / "out", pruner, writing=QUICK["writing"])
        words = ("show", tmp_path / "out", "--image", picture, "--question", "What?")
        done = command(*words, "-o", tmp_path / "kept.png")
        assert done.code == 2 and "its vision tower computes fewer features" in done.err

    def test_no_input_is_written_over(self, pruned: Path, picture: Path, command: Command) -> None:
        before = picture.read_bytes()
        for file in (picture, pruned / "kept.png"):
            done = command(
                "show", pruned, "--image", picture, "--question", "What?", "-o", file, "--overwrite"
            )
            assert done.code == 2 and "never written to" in done.err
        assert picture.read_bytes() == before and not (pruned / "kept.png").exists()

    def test_what_reads_images_is_named_where_it_is_missing(
        self, pruned: Path, picture: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("structprune.models.processor.find_spec", lambda name: None)
        done = command("show", pruned, "--image", picture, "--question", "What?", "-o", tmp_path / "kept.png")
        assert done.code == 4 and "structprune[vision]" in done.err


class TestWatching:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_engine_says_which_tokens_each_block_computes(self, family: str) -> None:
        model, batch = vision_model(family), Pictures(family, (1,)).batch()
        pruner = token_pruner("fastv", target={"tokens": 2})
        with structprune.pruning(model, pruner), torch.no_grad():
            engine = engine_of(model)
            assert engine is not None
            with engine.watching() as watched:
                states = model(**batch, output_hidden_states=True).hidden_states[-1]
            visual = batch["input_ids"] == IMAGE
            assert [*watched] == [*range(BLOCKS)]
            for index, (entering, leaving) in watched.items():
                expected = visual if index < 2 else visual & states.ne(0).any(-1)
                assert torch.equal(entering, expected) and torch.equal(leaving, expected)
            assert int(watched[2][0].sum()) == 2
            with engine.watching() as watched:  # what follows is no image
                model.generate(**batch, max_new_tokens=3, do_sample=False)
            assert int(watched[2][0].sum()) == 2

    def test_drops_are_told_where_they_are(self) -> None:
        def mask(count: int) -> Tensor:
            return torch.arange(9) < count

        watched = {0: (mask(9), mask(9)), 1: (mask(9), mask(5)), 2: (mask(5), mask(5)), 3: (mask(2), mask(1))}
        assert _drops(watched, 9) == [
            {"block": 1, "place": "within", "kept": 5},
            {"block": 3, "place": "before", "kept": 2},
            {"block": 3, "place": "within", "kept": 1},
        ]


class TestPicture:
    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
    def test_patches_that_are_merged_are_put_back_in_their_places(self, family: str) -> None:
        from transformers import Qwen2VLImageProcessorPil

        reader = type("Reader", (), {"image_processor": Qwen2VLImageProcessorPil(patch_size=8)})()
        pixels = torch.arange(3 * 64 * 96).mul(7).remainder(256).to(torch.uint8).view(3, 64, 96)
        config = vision_model(family).config
        made = reader.image_processor(
            Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt", do_resize=False
        )
        found = patches_of(config, made, reader, 24)
        assert torch.equal(found.pixels, pixels) and (found.rows, found.columns) == (4, 6)

    def test_a_token_that_stands_for_all_of_it_has_no_place(self, seeing: Path, picture: Path) -> None:
        reader = processor(seeing)
        batch = batch_of([ImageQuestion(picture, "What?")], reader)
        config = vision_model("llava").config
        found = patches_of(config, batch, reader, 17)
        assert found.parts(torch.arange(17)).flatten().tolist() == [*range(1, 17)]
        # A tower whose first token is no such token may lack that of the first patch.
        found = patches_of(config, batch, reader, 15)
        kept = found.parts(torch.ones(15, dtype=torch.bool))
        assert kept.dtype == torch.bool and kept.flatten().tolist() == [False] + [True] * 15
        with pytest.raises(UsageError, match="llava: where its 20 visual tokens stand"):
            patches_of(config, batch, reader, 20)

    def test_tokens_of_tiles_are_refused_by_name(self, seeing: Path) -> None:
        made = Pictures("llava_next", (1,)).batch()
        with pytest.raises(UsageError, match="llava_next: where its 26 visual tokens stand") as caught:
            patches_of(vision_model("llava_next").config, made, processor(seeing), 26)
        assert "LLaVA-1.5" in str(caught.value.hint)

    def test_kept_patches_are_as_they_are_and_the_others_dimmed(self) -> None:
        pixels = torch.full((3, 40, 80), 200, dtype=torch.uint8)
        pixels[0] = 80
        kept = torch.tensor([True, False])
        drawn = kept_tokens(Patches(pixels, 1, 2), {"kept": kept, "at random": ~kept}, "Why? " * 99)
        with Image.open(BytesIO(drawn)) as card:
            # The lower corners of both panels lie 24 pixels above the lower edge; edges are 2 pixels wide.
            row, wide = card.height - 24 - 20, (card.width - 3 * 24) // 2
            found = [
                card.getpixel((24 + panel * (wide + 24) + place * wide // 4, row))
                for panel in (0, 1)
                for place in (1, 3)
            ]
        grey = round(160 * DIMMED)
        assert found == [(80, 200, 200), (grey,) * 3, (grey,) * 3, (80, 200, 200)]
