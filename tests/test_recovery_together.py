"""Several processes that recover one model, as copies or divided: losses and weights are those of one."""

import copy
import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import structprune
from structprune.checkpoint.writing import Writing
from structprune.cli import main
from structprune.errors import UsageError
from structprune.models.identity import names_of
from structprune.pipeline.recover import check_shares
from structprune.pruners.catalogue import find
from structprune.ranks import Ranks
from structprune.recipe.options import EvaluateOptions, RecoverOptions
from structprune.recipe.recipe import assemble
from structprune.recovery.merged import MergedReader
from structprune.recovery.outcome import Recovery
from structprune.storage.header import read_header
from structprune.storage.tensor_file import read_tensors
from tests.groups import run_group
from tests.recovering import prune, trained
from tests.test_ranks import torchrun, worker_of
from tests.tiny import save_tiny, tiny, tokenizer
from tests.training_together import DEEP, DENSE, FAMILIES, FEW, STEPS, WORKERS, copied, facts, streamed

Trainings = Callable[..., tuple[Recovery, Any]]


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
    run_group("tests.training_together", folder, WORKERS)
    said = {
        (count, rank): json.loads((folder / f"{count}-{rank}.json").read_text())
        for count in (2, 3)
        for rank in range(count)
    }
    return folder, said


@pytest.fixture(scope="module")
def alone(together: Any) -> Trainings:
    """Return a function that trains a model in one process, once for all tests that ask for the same."""
    folder, _ = together
    return cache(lambda name, **options: copied(folder / name, **options))


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert len(one["train"]) == len(other["train"]) > 0
    assert one["train"] == pytest.approx(other["train"], abs=1e-4)
    assert one["held_out"] == pytest.approx(other["held_out"], abs=1e-4)


class TestLosses:
    @pytest.mark.parametrize("way", ["copied", "divided"])
    def test_fifty_steps_of_two_processes_lose_what_those_of_one_do(
        self, together: Any, alone: Trainings, way: str
    ) -> None:
        _, said = together
        one = facts(alone("llama", steps=STEPS, check_every=1, learning_rate=5e-3)[0])
        assert len(one["train"]) == STEPS
        assert one["held_out"][-1] < 0.7 * one["start"]
        assert_close(said[2, 0][f"long {way}"], one)

    @pytest.mark.parametrize("way", ["copied", "divided"])
    def test_three_processes_lose_what_one_does(self, together: Any, alone: Trainings, way: str) -> None:
        _, said = together
        assert_close(said[3, 0][way], facts(alone("llama", **FEW, batch_size=6)[0]))

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

    @pytest.mark.parametrize("family", ["llama", "mixtral"])
    def test_checkpointing_changes_none(self, together: Any, family: str) -> None:
        _, said = together
        for rank in range(2):
            found = said[2, rank]
            assert found[family] == found[f"checkpointing {family}"] | {"left": found[family]["left"]}

    def test_a_teacher_is_divided_too(self, together: Any) -> None:
        folder, said = together
        alone = facts(copied(folder / "llama", folder / DENSE, **FEW)[0])
        assert_close(said[2, 0]["teacher"], alone)
        assert said[2, 0]["teacher"]["train"] != said[2, 0]["llama"]["train"]


class TestWeights:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_parameter_is_divided_and_learns_what_it_learns_whole(
        self, together: Any, alone: Trainings, family: str
    ) -> None:
        folder, said = together
        assert said[2, 0][family]["left"] == []
        recovery, _ = alone(family, **FEW)
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
        self, together: Any, alone: Trainings, family: str
    ) -> None:
        folder, _ = together
        recovery, model = alone(family, **FEW)
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
    def test_a_recipe_of_one_process_is_refused_before_it_prunes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = save_tiny("llama", tmp_path / "model")
        line = ["prune", str(model), str(tmp_path / "out"), "--method", "magnitude", "--no-evaluate"]
        assert main([*line, "--set", "recover.data=demo", "--set", "recover.shard=true"]) == 2
        assert "recover.shard: the model is divided among processes" in capsys.readouterr().err
        assert not [*tmp_path.glob("out*")]

    def test_float16_has_not_the_range(self) -> None:
        with pytest.raises(UsageError, match=r"recover\.dtype: found 'float16', expected 'float32' or"):
            assemble({"model": "m", "output": "o", "prune": "wanda", "recover": {"dtype": "float16"}})

    def test_one_process_cannot_divide_a_model(self) -> None:
        with pytest.raises(UsageError, match=r"recover\.shard") as refused:
            check_shares(RecoverOptions(shard=True), Ranks())
        assert "torchrun" in refused.value.hint
        check_shares(RecoverOptions(shard=True), Ranks(0, 2))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that wanda pruned, and a text."""
    folder = tmp_path_factory.mktemp("launched")
    text = "".join(
        f"{number} follows {number - 1}, and {number + 1} comes next. " for number in range(1, 400)
    )
    (folder / "text.txt").write_text(text)
    source = save_tiny("llama", folder / "dense", dtype=torch.bfloat16)
    calibration = {"source": str(folder / "text.txt"), "samples": 6, "length": 32}
    structprune.prune(
        source,
        folder / "pruned",
        find("wanda")(sparsity="2:4"),
        calibration=calibration,
        evaluate=EvaluateOptions(skip=True),
        writing=Writing(reload=False),
    )
    return folder


def words(pruned: Path, output: Path, *more: object) -> list[object]:
    sizes = ["--steps", 120, "--set", "recover.check_every=4", "--length", 32, "--learning-rate", 0.01]
    return ["recover", pruned / "pruned", output, "--data", pruned / "text.txt", "--rank", 4, *sizes, *more]


@pytest.mark.slow
class TestTorchrun:
    def test_a_killed_launch_resumes_and_no_removed_weight_comes_back(
        self, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = torchrun(2, *words(pruned, tmp_path / "whole", "--shard", "--json"))
        said, errors = whole.communicate(timeout=600)
        assert whole.returncode == 0, errors
        assert json.loads(said)["sparsity"] == 0.5
        before, after = (
            read_tensors(at / "model.safetensors") for at in (pruned / "pruned", tmp_path / "whole")
        )
        assert all(torch.equal(value == 0, after[name] == 0) for name, value in before.items())
        assert any(not torch.equal(value, after[name]) for name, value in before.items())
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").dtype == torch.bfloat16
        assert main(["verify", str(tmp_path / "whole")]) == 0

        killed = torchrun(2, *words(pruned, tmp_path / "out", "--shard"))
        while not [*tmp_path.glob("out.partial-*/structprune/training/state.json")]:
            assert killed.poll() is None
            time.sleep(0.01)
        os.kill(worker_of(killed.pid, 1), signal.SIGKILL)
        _, errors = killed.communicate(timeout=60)
        assert killed.returncode != 0 and errors.count("rank 0: another process of the run has ended") == 1
        other = torchrun(2, *words(pruned, tmp_path / "out"))
        assert "an interrupted run differs in recover.shard" in other.communicate(timeout=600)[1]
        capsys.readouterr()
        assert main([str(word) for word in words(pruned, tmp_path / "out")]) == 4
        assert "an interrupted run differs in ranks" in capsys.readouterr().err
        again = torchrun(2, *words(pruned, tmp_path / "out", "--shard", "--json"))
        said, errors = again.communicate(timeout=600)
        assert again.returncode == 0, errors
        assert json.loads(said)["recovery"]["steps_resumed"] >= 4
        files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_an_adapter_of_a_divided_model_says_what_merging_says(self, pruned: Path, tmp_path: Path) -> None:
        more = ["--shard", "--set", "evaluate.skip=true", "--teacher", pruned / "dense"]
        for name, flags in (("merged", []), ("adapter", ["--keep-adapter"])):
            run = torchrun(2, *words(pruned, tmp_path / name, *more, *flags))
            _, errors = run.communicate(timeout=600)
            assert run.returncode == 0, errors
        merged, _ = structprune.load(tmp_path / "merged")
        opened, _ = structprune.load(tmp_path / "adapter")
        assert all(torch.equal(p, opened.get_parameter(name)) for name, p in merged.named_parameters())
        assert structprune.verify(tmp_path / "adapter")["ok"]
