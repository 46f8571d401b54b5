"""Every vision-language model is proved on an image too, whatever was done to it."""

from pathlib import Path

import pytest
import torch

import structprune
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.proof import fresh_process as fresh
from structprune.proof.image_probe import image_probe
from tests.pictures import FAMILIES, IMAGE, vision_model
from tests.tiny import tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        vision_model(family).save_pretrained(root / family)
        tokenizer().save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def test_every_family_sees_an_image_in_a_fresh_process(folders: dict[str, Path]) -> None:
    jobs, expected = [], []
    for folder in folders.values():
        model = open_model(folder)
        ids = fresh.probe(model.config)
        image = image_probe(model.config, ids[0])
        assert image is not None and int((image["input_ids"] == IMAGE).sum()) > 1
        seen = logits(model, image)
        blind = logits(model, image | {"pixel_values": torch.zeros_like(image["pixel_values"])})
        assert not torch.equal(seen, blind)
        jobs.append(fresh.ReloadJob(folder, ids, Opening(dtype="float32"), image))
        expected.append(seen)
    for how in ("plain", "streamed"):
        for child, seen in zip(fresh.reload(jobs, how=how), expected, strict=True):
            assert child.error == "" and child.image_logits is not None
            assert fresh.difference(child.image_logits, seen)[0]


def test_an_image_in_tiles_has_as_many_tokens_as_its_processor_makes() -> None:
    config = vision_model("llava_next").config
    image = image_probe(config, torch.arange(3, 35))
    assert image is not None
    # 4 x 4 patches of the whole image; two tiles of 4 x 4 side by side or one above the other, 8 x 4 with a
    # token at the end of each of the 8 lines.
    height, width = image["image_sizes"][0].tolist()
    lines, columns = height // 8, width // 8
    assert (height, width) == (32, 64)
    assert int((image["input_ids"] == IMAGE).sum()) == 16 + lines * (columns + 1)
    config.image_grid_pinpoints = [[40, 64]]  # of which no whole number of tiles can be cut
    assert image_probe(config, torch.arange(3, 35)) is None
    config.image_grid_pinpoints = [[32, 64]]
    config.text_config.max_position_embeddings = 64
    assert image_probe(config, torch.arange(3, 35)) is None


@pytest.mark.parametrize(
    "family", ["qwen3_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES[:3])]
)
def test_a_method_that_changes_weights_is_proved_on_an_image(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    report = structprune.prune(
        folders[family], tmp_path / "out", "magnitude", sparsity=0.5, evaluate={"skip": True}
    )
    rows = {row["name"]: row["detail"] for row in report["verification"]["checks"]}
    assert "with an image" in rows["reload"]
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "out/README.md").read_text()
