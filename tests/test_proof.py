"""`verify` measures a folder from its files, and notices every way in which it is not what was asked for."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from structprune.checkpoint.side_files import copy_side_files
from structprune.errors import InputError
from structprune.proof.verify import Verification, verify
from tests.by_hand import PLAN, Pruned, every_second, half_of
from tests.tiny import save_tiny

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "llama", shards=2, dtype=torch.bfloat16)


@pytest.fixture
def half(source: Path, tmp_path: Path) -> Pruned:
    """Llama with every second input removed, half of every row."""
    return half_of(source, tmp_path / "out")


@pytest.fixture
def pattern(source: Path, tmp_path: Path) -> Pruned:
    """The same weights, asked for as 2:4."""
    return half_of(source, tmp_path / "out", "2:4")


def the_failing_row(found: Verification) -> tuple[str, str]:
    assert not found.ok
    assert len(found.failed) == 1, found.failed
    return found.failed[0].name, found.failed[0].detail


class TestAFaithfulFolder:
    def test_passes_every_check_and_is_measured_exactly(self, half: Pruned, source: Path) -> None:
        found = verify(half.write(), source, reload=False)
        assert [check.name for check in found.checks] == [
            "manifest", "files", "plans", "finite", "masks", "count", "source", "side files",
        ]  # fmt: skip
        assert found.ok
        assert found.sparsity == 0.5
        assert found.pattern == "2:4"
        prunable = sum(mask.numel() for mask in half.masks.values())
        assert found.parameters == sum(
            value.numel() for shard in half.shards.values() for value in shard.values()
        )
        zeros = sum(int((value == 0).sum()) for shard in half.shards.values() for value in shard.values())
        assert found.nonzero == found.parameters - zeros
        assert zeros >= prunable // 2
        assert found.bytes == sum(file.stat().st_size for file in half.folder.glob("*.safetensors"))
        assert [block["sparsity"] for block in found.blocks] == [0.5, 0.5]
        assert found.blocks[1]["matrices"]["self_attn.k_proj"] == {"parameters": 32 * 64, "zeros": 32 * 32}

    def test_the_json_has_the_promised_keys(self, half: Pruned) -> None:
        found = json.loads(json.dumps(verify(half.write(), reload=False).as_json()))
        assert found.keys() >= {"ok", "sparsity", "pattern", "parameters", "checks"}
        assert all(row.keys() == {"name", "ok", "detail"} for row in found["checks"])

    def test_needs_no_manifest_while_it_is_being_written(self, half: Pruned) -> None:
        folder = half.write(manifest=False)
        assert verify(folder, written={}, reload=False).ok
        assert the_failing_row(verify(folder, reload=False))[0] == "manifest"

    def test_zeros_of_the_source_count_as_zeros(self, half: Pruned) -> None:
        half.edit(lambda name, value: value.zero_() if name == Q else value)
        found = verify(half.write(), reload=False)
        assert found.ok
        total = sum(mask.numel() for mask in half.masks.values())
        assert found.sparsity == (total / 2 + 64 * 64 / 2) / total

    def test_a_minus_zero_is_a_zero(self, half: Pruned) -> None:
        half.edit(lambda name, value: torch.where(value == 0, -0.0, value) if name == Q else value)
        assert verify(half.write(), reload=False).ok

    def test_tells_its_progress(self, half: Pruned) -> None:
        told: list[tuple[str, int, int]] = []
        verify(half.write(), reload=False, progress=lambda *step: told.append(step))
        assert told[-1][1] == told[-1][2] == len(half.shapes)


class TestDamage:
    def test_a_revived_weight(self, half: Pruned, source: Path) -> None:
        def revive(name: str, value: Tensor) -> Tensor:
            if name == Q:
                value[3, 5] = 0.25
            return value

        half.edit(revive)
        name, detail = the_failing_row(verify(half.write(), source, reload=False))
        assert name == "masks"
        assert detail == f"{Q}: 1 removed weights are not zero"

    def test_one_zero_too_few_in_one_row(self, half: Pruned) -> None:
        masks = half.masks | {Q: half.masks[Q].clone()}
        masks[Q][7, 1] = True
        name, detail = the_failing_row(verify(half.write(masks=masks), reload=False))
        assert name == "count"
        assert "31 weights removed from row 7, expected 32" in detail

    def test_a_matrix_that_was_forgotten(self, half: Pruned) -> None:
        masks = {name: mask for name, mask in half.masks.items() if name != Q}
        name, detail = the_failing_row(verify(half.write(masks=masks), reload=False))
        assert name == "count"
        assert f"{Q}: no weight removed" in detail

    def test_a_broken_group_of_a_pattern(self, pattern: Pruned) -> None:
        def move(name: str, value: Tensor) -> Tensor:
            if name == Q:
                value[0, 0], value[0, 1], value[0, 4] = 1.0, 1.0, 0.0
            return value

        pattern.edit(move)
        masks = pattern.masks | {Q: pattern.masks[Q].clone()}
        masks[Q][0, 1], masks[Q][0, 4] = True, False
        found = verify(pattern.write(masks=masks), reload=False)
        name, detail = the_failing_row(found)
        assert name == "count"
        assert "1 to 3 removed from a group of 4 inputs, expected 2" in detail
        assert found.pattern == "4:8"

    def test_a_changed_kept_weight(self, half: Pruned, source: Path) -> None:
        def nudge(name: str, value: Tensor) -> Tensor:
            if name == Q:
                value[2, 2] = torch.nextafter(value[2, 2], torch.tensor(9.0, dtype=value.dtype))
            return value

        half.edit(nudge)
        folder = half.write()
        assert verify(folder, reload=False).ok
        name, detail = the_failing_row(verify(folder, source, reload=False))
        assert (name, detail) == ("source", f"{Q}: 1 kept weights differ from the source")
        exempt = verify(folder, source, reload=False, revalued=[Q])
        assert exempt.ok
        assert "1 whose values were changed on purpose" in exempt.checks[-2].detail

    def test_a_changed_tensor_outside_the_plan(self, half: Pruned, source: Path) -> None:
        half.edit(lambda name, value: value + 1 if name == "model.norm.weight" else value)
        assert the_failing_row(verify(half.write(), source, reload=False))[0] == "source"

    def test_a_deleted_tokenizer_file(self, half: Pruned, source: Path) -> None:
        folder = half.write()
        (folder / "tokenizer.json").unlink()
        found = verify(folder, source, reload=False)
        assert [check.name for check in found.failed] == ["manifest", "side files"]
        assert all("tokenizer.json" in check.detail for check in found.failed)

    def test_a_flipped_byte(self, half: Pruned) -> None:
        folder = half.write()
        file = sorted(folder.glob("*.safetensors"))[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        first = verify(folder, reload=False).failed[0]
        assert first.name == "manifest"
        assert first.detail.startswith(f"{file.name} was changed")

    def test_a_missing_shard(self, half: Pruned) -> None:
        folder = half.write()
        file = sorted(folder.glob("*.safetensors"))[-1]
        file.unlink()
        found = verify(folder)
        assert [check.name for check in found.failed] == ["manifest", "files"]
        assert all(file.name in check.detail for check in found.failed)
        assert found.sparsity is None

    def test_a_weight_that_is_not_finite(self, half: Pruned) -> None:
        def spoil(name: str, value: Tensor) -> Tensor:
            if name == Q:
                value[0, 0], value[0, 2] = float("nan"), float("inf")
            return value

        half.edit(spoil)
        assert the_failing_row(verify(half.write(), reload=False)) == (
            "finite",
            f"{Q}: 2 NaN or infinite values",
        )

    def test_a_plan_with_other_masks(self, half: Pruned) -> None:
        found = verify(half.write(masks={name: ~mask for name, mask in half.masks.items()}), reload=False)
        name, detail = the_failing_row(found)
        assert name == "masks"
        assert f"and {len(half.masks) - 1} more" in detail

    def test_a_plan_with_masks_of_another_shape(self, half: Pruned) -> None:
        found = verify(half.write(masks=half.masks | {Q: every_second((64, 32))}), reload=False)
        assert found.failed[0].name == "plans"
        assert found.failed[0].detail == f"01-magnitude: {Q}: mask of shape [64, 32], in the files [64, 64]"

    def test_a_plan_for_another_architecture(self, half: Pruned) -> None:
        name, detail = the_failing_row(verify(half.write(architecture="f" * 64), reload=False))
        assert (name, detail) == (
            "plans",
            "01-magnitude: made for another architecture than the one in the files",
        )

    def test_a_plan_whose_file_was_cut(self, half: Pruned) -> None:
        folder = half.write()
        (folder / PLAN / "block-0000.safetensors").unlink()
        found = verify(folder, written={})
        assert the_failing_row(found)[0] == "files"

    def test_a_manifest_that_is_no_manifest_is_a_row_and_no_traceback(self, half: Pruned) -> None:
        folder = half.write()
        (folder / "structprune.json").write_text("{}")
        name, detail = the_failing_row(verify(folder, reload=False))
        assert name == "manifest"
        assert "version" in detail


class TestAForeignFolder:
    def test_is_measured(self, source: Path) -> None:
        found = verify(source, reload=False)
        assert found.ok
        assert found.checks[0].detail == "not written by structprune (no structprune.json); measured only"
        assert found.sparsity is not None
        assert found.sparsity < 0.01
        assert [block["parameters"] for block in found.blocks] == [
            64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3
        ] * 2

    def test_that_is_damaged_is_an_input_error(self, source: Path, tmp_path: Path) -> None:
        copy_side_files(source, tmp_path)
        with pytest.raises(InputError):
            verify(tmp_path)
