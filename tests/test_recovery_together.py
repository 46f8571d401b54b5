"""Several processes that recover one model, as copies or divided: losses and weights are those of one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune.errors import UsageError
from structprune.models.identity import names_of
from structprune.pipeline.recover import check_shares
from structprune.ranks import Ranks
from structprune.recipe.options import RecoverOptions
from structprune.recipe.recipe import assemble
from structprune.recovery.merged import MergedReader
from structprune.storage.header import read_header
from structprune.storage.tensor_file import read_tensors
from tests.recovering import prune, trained
from tests.tiny import tiny, tokenizer
from tests.training_together import DEEP, DENSE, FAMILIES, FEW, STEPS, WORKERS, copied, facts, streamed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, int], Any]]:
    """Let three processes train together, then two; return the folder and what each said."""
    folder = tmp_path_factory.mktemp("together")
    models = {family: tiny(family, dtype=torch.bfloat16) for family in FAMILIES}
    models |= {"llama": copy.deepcopy(trained()), DEEP: tiny("llama", depth=12), DENSE: trained()}
    for name, model in models.items():
        if name != DENSE:
            prune(model, 0.6)
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.training_together",
                str(folder / "meeting"),
                str(rank),
                str(folder),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORKERS)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors
    said = {
        (count, rank): json.loads((folder / f"{count}-{rank}.json").read_text())
        for count in (2, 3)
        for rank in range(count)
    }
    return folder, said


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert len(one["train"]) == len(other["train"]) > 0
    assert one["train"] == pytest.approx(other["train"], abs=1e-4)
    assert one["held_out"] == pytest.approx(other["held_out"], abs=1e-4)


class TestLosses:
    @pytest.mark.parametrize("way", ["copied", "divided"])
    def test_fifty_steps_of_two_processes_lose_what_those_of_one_do(self, together: Any, way: str) -> None:
        folder, said = together
        alone = facts(copied(folder / "llama", steps=STEPS, check_every=1, learning_rate=5e-3)[0])
        assert len(alone["train"]) == STEPS
        assert alone["held_out"][-1] < 0.7 * alone["start"]
        assert_close(said[2, 0][f"long {way}"], alone)

    @pytest.mark.parametrize("way", ["copied", "divided"])
    def test_three_processes_lose_what_one_does(self, together: Any, way: str) -> None:
        folder, said = together
        assert_close(said[3, 0][way], facts(copied(folder / "llama", **FEW, batch_size=6)[0]))

    def test_all_of_a_group_say_the_same(self, together: Any) -> None:
        _, said = together
        for key in said[2, 0].keys() - {"memory"}:
            assert said[2, 0][key] == said[2, 1][key]
        assert said[3, 0] == said[3, 1] == said[3, 2]

    def test_products_in_bfloat16_hardly_show(self, together: Any) -> None:
        folder, said = together
        alone = facts(copied(folder / "llama", dtype="bfloat16", **FEW)[0])
        assert said[2, 0]["bfloat16"]["train"] == pytest.approx(alone["train"], abs=5e-3)
        difference = abs(alone["train"][-1] - said[2, 0]["llama"]["train"][-1])
        assert 0 < difference < 0.02

    def test_a_teacher_is_divided_too(self, together: Any) -> None:
        folder, said = together
        alone = facts(copied(folder / "llama", folder / DENSE, **FEW)[0])
        assert_close(said[2, 0]["teacher"], alone)
        assert said[2, 0]["teacher"]["train"] != said[2, 0]["llama"]["train"]


class TestWeights:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_parameter_is_divided_and_learns_what_it_learns_whole(
        self, together: Any, family: str
    ) -> None:
        folder, said = together
        assert said[2, 0][family]["left"] == []
        recovery, _ = copied(folder / family, **FEW)
        assert_close(said[2, 0][family], facts(recovery))
        found = read_tensors(folder / f"divided-{family}")
        assert len(found) == 2 * len(recovery.factors)
        for name, factors in recovery.factors.items():
            left, right = found[f"{name}.left"], found[f"{name}.right"]
            # Adam's first steps go by the sign of the gradient, which is noise where there is hardly any.
            assert float((left - factors.left).norm()) < 0.02 * float(factors.left.norm())
            assert float((right - factors.right).norm()) < 0.02 * float(factors.right.norm())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_is_written_block_by_block_is_what_is_merged_in_memory(
        self, together: Any, family: str
    ) -> None:
        folder, _ = together
        recovery, model = copied(folder / family, **FEW)
        reader = MergedReader(streamed(folder / family), [], recovery)
        stored = names_of(model).to_stored(dict(model.named_parameters()))
        before = streamed(folder / family).reader
        assert set(reader.changed) < stored.keys() == reader.tensors.keys()
        for name, value in stored.items():
            found = reader.read(name)
            assert torch.equal(found, value) and found.dtype == value.dtype, name
            assert torch.equal(found == 0, before.read(name) == 0), name
            assert torch.equal(found, before.read(name)) == (name not in reader.changed), name

    def test_two_processes_hold_less_each(self, together: Any) -> None:
        _, said = together
        for rank in range(2):
            found = said[2, rank]["memory"]
            assert found["whole"] == []
            # One row more at most, of the tensors whose rows are odd.
            assert found["bytes"] / 2 <= found["rest"] < 0.55 * found["bytes"]
            assert found["peak"] < 0.75 * found["whole_peak"]


class TestResuming:
    def test_an_interrupted_training_ends_like_a_whole_one(self, together: Any) -> None:
        folder, said = together
        assert said[2, 0]["state"] == [
            "best-00000003.safetensors",
            "state-00000003.safetensors",
            "state.json",
        ]
        assert said[2, 0]["resumed"].pop("steps") == 3
        found = said[2, 0]["resumed"]
        assert found == {key: said[2, 0]["llama"][key] for key in found}
        assert (folder / "resumed").read_bytes() == (folder / "divided-llama").read_bytes()

    def test_the_state_is_that_of_a_training_in_copies(self, together: Any) -> None:
        folder, _ = together
        name = f"state-{FEW['steps']:08d}.safetensors"
        one, other = (read_header(folder / way / name).tensors for way in ("state", "copied"))
        assert {key: (info.dtype, info.shape) for key, info in one.items()} == {
            key: (info.dtype, info.shape) for key, info in other.items()
        }


class TestRefusals:
    def test_float16_has_not_the_range(self) -> None:
        with pytest.raises(UsageError, match=r"recover\.dtype: found 'float16', expected 'float32' or"):
            assemble({"model": "m", "output": "o", "prune": "wanda", "recover": {"dtype": "float16"}})

    def test_one_process_cannot_divide_a_model(self) -> None:
        with pytest.raises(UsageError, match=r"recover\.shard") as refused:
            check_shares(RecoverOptions(shard=True), Ranks())
        assert "torchrun" in refused.value.hint
        check_shares(RecoverOptions(shard=True), Ranks(0, 2))
