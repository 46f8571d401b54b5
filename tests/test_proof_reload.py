"""`verify` on every layout of weights, and what a fresh process makes of a folder."""

from pathlib import Path

import pytest
import torch

from structprune.checkpoint.side_files import copy_side_files
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import StreamedModel, open_model
from structprune.plan.promise import Removed
from structprune.proof import fresh_process as fresh
from structprune.proof.measure import measure
from structprune.proof.verify import verify
from structprune.storage.reader import CheckpointReader
from tests.by_hand import Pruned, half_of, linear_names
from tests.tiny import FAMILIES, save_tiny


class TestLayouts:
    @pytest.mark.parametrize(
        "family", [name for name in FAMILIES if name not in ("llama", "mistral", "qwen2")]
    )
    def test_patterns_are_seen_along_the_inputs_in_every_family(self, family: str, tmp_path: Path) -> None:
        source = save_tiny(family, tmp_path / "source")
        pruned = half_of(source, tmp_path / "out", "2:4")
        found = verify(pruned.write(), source, reload=False)
        assert found.ok, found.failed
        assert (found.sparsity, found.pattern) == (0.5, "2:4")
        assert sum(block["parameters"] for block in found.blocks) == sum(
            mask.numel() for mask in pruned.masks.values()
        )

    def test_a_fraction_of_whole_matrices_is_counted_per_expert_over_fused_parts(
        self, tmp_path: Path
    ) -> None:
        source = save_tiny("mixtral", tmp_path / "source")
        shapes = CheckpointReader(source).shapes
        masks = {name: torch.ones(shapes[name], dtype=torch.bool) for name in linear_names(source)}
        gates = [name for name in masks if name.endswith("w1.weight")]
        # Gate and up are one matrix in the model: here all of an expert's half leaves from the gate part.
        for name, mask in masks.items():
            if not name.endswith(("w1.weight", "w3.weight")):
                mask.view(-1)[: mask.numel() // 2] = False
        for name in gates:
            masks[name][:] = False
        pairs = [(name, name.replace("w1.weight", "w3.weight")) for name in gates]
        alone = [(name,) for name in masks if not name.endswith(("w1.weight", "w3.weight"))]
        half = {names: sum(masks[name].numel() for name in names) // 2 for names in (*pairs, *alone)}
        promised = [Removed(tensors=names, per="matrix", removed=due) for names, due in half.items()]
        assert verify(Pruned(source, tmp_path / "out", promised, masks).write(), reload=False).ok
        masks[gates[2]][0, 0] = True
        found = verify(Pruned(source, tmp_path / "off", promised, masks).write(), reload=False)
        assert [check.name for check in found.failed] == ["count"]
        assert f"{gates[2]}: 6143 weights removed, expected 6144" in found.failed[0].detail


def test_a_matrix_counted_by_hand() -> None:
    weight = torch.tensor(
        [[1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0], [0.0, 5.0, 0.0, 6.0, 7.0, 8.0, 0.0, float("inf")]]
    )
    mask = torch.tensor([[1, 0, 1, 0, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0, 1, 1]]).bool()
    before = weight.clone()
    before[0, 0] = -1
    found = measure(weight, "last", [mask, None], before, {4: True, 8: True, 3: False})
    assert (found.size, found.width, found.zeros, found.not_finite) == (16, 8, 7, 1)
    assert (found.revived, found.changed) == (1, 1)
    assert found.fullest == {4: 3, 8: 5, 3: 3}
    rows = found.rows[0]
    assert rows is not None
    assert rows.removed.tolist() == [4, 3]
    assert found.rows[1] is None
    assert rows.groups == {4: (1, 2), 8: (3, 4)}
    assert measure(weight.T.contiguous(), "first", [mask.T], None, {4: True}).fullest == {4: 3}


@pytest.mark.usefixtures("really_fresh")
class TestTheFreshProcess:
    @pytest.fixture
    def half(self, tmp_path: Path) -> Pruned:
        return half_of(save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16), tmp_path / "out")

    @pytest.fixture
    def folders(self, half: Pruned, tmp_path: Path) -> tuple[Path, Path, Path]:
        broken = tmp_path / "broken"
        broken.mkdir()
        copy_side_files(half.source, broken)
        return half.write(), save_tiny("llava", tmp_path / "llava"), broken

    def test_plain_transformers_gives_the_same_logits_and_a_folder_it_cannot_open_is_reported(
        self, folders: tuple[Path, Path, Path]
    ) -> None:
        models = {folder: open_model(folder) for folder in folders[:2]}
        ids = {folder: fresh.probe(model.config) for folder, model in models.items()}
        ids[folders[2]] = ids[folders[0]]
        dtypes = ("bfloat16", "float32", "bfloat16")
        jobs = [
            fresh.ReloadJob(folder, ids[folder], Opening(dtype=dtype))
            for folder, dtype in zip(folders, dtypes, strict=True)
        ]
        results = fresh.reload(jobs)
        assert [bool(one.error) for one in results] == [False, False, True]
        assert "no file named" in results[2].error
        for folder, found in zip(folders[:2], results[:2], strict=True):
            assert found.missing == ()
            assert found.same_with_cache is True
            assert found.logits is not None
            expected = logits(models[folder], {"input_ids": ids[folder]})
            assert fresh.difference(found.logits, expected)[0]
        assert "AutoModelForCausalLM" in results[0].loader
        assert "AutoModelForImageTextToText" in results[1].loader

    def test_a_streamed_folder_is_reloaded_streamed_and_compared_with_the_run_that_wrote_it(
        self, half: Pruned
    ) -> None:
        folder = half.write()
        model = open_model(folder, Opening(stream=True))
        assert isinstance(model, StreamedModel)
        found = verify(folder, opening=Opening(stream=True), reference=model)
        assert found.ok, found.failed
        assert [check.name for check in found.checks][-2:] == ["logits", "reload"]
        pair = "this folder opened by structprune here and by structprune"
        assert found.checks[-1].detail.startswith(pair)
        assert found.checks[-1].detail.endswith("the same logits to the last bit on 64 tokens")
        assert all(loader.startswith("structprune") for loader in found.loads_in)
        assert len(found.loads_in) == 2


class TestDifference:
    def test_tells_apart_equal_close_far_and_not_finite_logits(self) -> None:
        logits = torch.tensor([[1.0, -4.0]])
        assert fresh.difference(logits, logits) == (True, "the same logits to the last bit")
        assert fresh.difference(logits + 1e-5, logits)[0]
        assert fresh.difference(logits + 1e-3, logits) == (
            False,
            "logits differ by 0.001, the largest is 4",
        )
        assert fresh.difference(logits * float("nan"), logits) == (False, "2 logits are not finite")
        assert fresh.difference(logits[:, :1], logits) == (
            False,
            "logits of shape [1, 1], expected [1, 2]",
        )
