"""Several processes that share a run: what they add up, and that all decide what one alone would."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune.calibration.data import Calibration
from structprune.calibration.statistics import input_parts
from structprune.cli import main
from structprune.errors import UsageError
from structprune.models import opening
from structprune.models.opening import Opening
from structprune.models.rank_batches import RankBatches
from structprune.models.streamed import open_skeleton
from structprune.pipeline.shared import check_shared
from structprune.plan.plan import Plan
from structprune.proof.fresh_process import child_environment
from structprune.pruners.blockwise import BlockwisePruner
from structprune.pruners.demand import Sharing
from structprune.ranks import Ranks
from structprune.recipe.fields import build
from structprune.recipe.recipe import Recipe
from tests.counted import BATCH, LENGTH, SAMPLES, counted_methods
from tests.counted import WORKERS as PAIR
from tests.groups import run_group
from tests.methods import TEXT, Home, home, quick
from tests.ranked import CASES, STREAMED, WORKERS

ROOT = Path(__file__).parents[1]
DAMAGED = "model.layers.1.mlp.down_proj.weight"


def sums_may_differ(name: str) -> bool:
    """Tell whether what decides are sums whose order may show: Gram matrices, gradients or fits."""
    pruner = CASES[name].pruner
    assert isinstance(pruner, BlockwisePruner)
    parts = pruner.solving | pruner.measuring
    return "gram" in parts or parts != input_parts(parts) or pruner.solves_passes


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, int], Any]]:
    """Let three processes decide together, then two, then one; return the folder and what each said."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES.values():
        case.home.save(folder / case.home.family)
    for number in range(WORKERS):
        shutil.copytree(folder / "llama", folder / f"copy-{number}")
    damage(shutil.copytree(folder / "llama", folder / "damaged"))
    run_group("tests.ranked", folder, WORKERS)
    said = {
        (count, rank): json.loads((folder / f"{count}-{rank}.json").read_text())
        for count in range(1, WORKERS + 1)
        for rank in range(count)
    }
    return folder, said


def damage(model: Path) -> None:
    """Put one value that is not a number into a tensor."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[DAMAGED].view(-1)[0] = torch.nan
    save_file(tensors, file, {"format": "pt"})


class TestAGroup:
    @pytest.mark.parametrize("name", CASES)
    def test_all_of_a_group_decide_alike_streamed_and_resident(self, decided: Any, name: str) -> None:
        _, said = decided
        for (count, _), found in said.items():
            assert len({*map(str, found[name].values())}) == 1
            assert ("streamed" in found[name]) == (count == STREAMED and name == CASES[name].method)
            assert found[name] == said[count, 0][name]

    @pytest.mark.parametrize("name", [one for one in CASES if not sums_may_differ(one)])
    def test_what_only_ranks_decides_alike_in_groups_of_any_size(self, decided: Any, name: str) -> None:
        _, said = decided
        one, two, three = (said[count, 0][name]["resident"] for count in range(1, WORKERS + 1))
        assert one == two == three

    @pytest.mark.parametrize("name", [one for one in CASES if sums_may_differ(one)])
    def test_the_order_of_sums_hardly_shows(self, decided: Any, name: str) -> None:
        folder, _ = decided
        alone, *others = (Plan.load(folder / f"{count}-{name}") for count in range(1, WORKERS + 1))
        for other in others:
            same = {"mask": [0, 0], "keep": [0, 0]}
            for key in alone:
                one, two = alone[key], other[key]
                if key.edit in same:
                    same[key.edit][0] += int((one == two).sum())
                    same[key.edit][1] += one.numel()
                elif key.kind == "value":
                    assert float((one.float() - two.float()).norm()) < 0.001 * float(one.float().norm())
            for equal, of in same.values():
                assert equal >= 0.999 * of

    def test_what_one_says_all_hear(self, decided: Any) -> None:
        _, said = decided
        for (count, _), found in said.items():
            heard = found[""]
            each = [torch.tensor(0.1).item()] * count
            assert heard["told"] == [[number, each] for number in range(count)]
            assert heard["copied"] == [*range(256)]
            total = torch.tensor(0.1)
            for number in range(1, count):
                total = total + torch.tensor(0.1) * (number + 1)
            assert torch.tensor(heard["ordered"]).eq(total).all()

    def test_what_one_meets_all_raise_alike(self, decided: Any) -> None:
        _, said = decided
        for (count, _), found in said.items():
            last = count - 1 if count > 1 else None
            assert found[""]["met"] == [[kind, "no factor", last] for kind in ("QualityError", "MethodError")]

    def test_each_gets_the_rows_that_all_send_it(self, decided: Any) -> None:
        _, said = decided
        for (count, rank), found in said.items():
            assert found[""]["exchanged"] == [10 * number + rank for number in range(count)]

    def test_a_gram_matrix_is_in_one_process(self, decided: Any) -> None:
        _, said = decided
        alone = said[1, 0][""]["grams"]
        for count in range(2, WORKERS + 1):
            parts = [said[count, rank][""]["grams"] for rank in range(count)]
            assert sum(map(len, parts)) == len(alone)
            # Of four experts' two matrices everybody has some.
            assert all(sum("experts" in label for label in part) >= 2 for part in parts)
            assert {key: value for part in parts for key, value in part.items()} == pytest.approx(alone)

    def test_weights_are_read_once_by_all_together(self, decided: Any) -> None:
        _, said = decided
        for (count, _), found in said.items():
            whole = [said[count, rank][""] for rank in range(count)]
            assert sum(one["read"] for one in whole) == found[""]["of"]
            assert found[""]["weights"] == said[1, 0][""]["weights"] == found[""]["own"]

    def test_a_damaged_tensor_stops_all_with_one_message(self, decided: Any) -> None:
        _, said = decided
        (_, message, _) = said[1, 0][""]["damaged"]
        assert DAMAGED in message
        for (count, _), found in said.items():
            kind, found_message, rank = found[""]["damaged"]
            assert (kind, found_message) == ("InputError", message)
            assert (rank is None) == (count == 1)

    def test_a_process_with_another_model_is_named(self, decided: Any) -> None:
        _, said = decided
        for (count, _), found in said.items():
            wanted = "this run: rank 1 differs from rank 0 in weights" if count > 1 else ""
            assert found[""]["refused"].startswith(wanted)
            assert bool(found[""]["refused"]) == (count > 1)


def torchrun(count: int, *words: object, **variables: str) -> "subprocess.Popen[str]":
    """Start a command line in several processes on the loopback."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*launcher, "-m", "structprune", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def worker_of(launcher: int, rank: int) -> int:
    """Return the process id of one of the workers of a launcher."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            place = (folder / "environ").read_bytes().split(b"\0")
            if int(parent) == launcher and b"RANK=%d" % rank in place:
                return int(folder.name)
    raise LookupError(f"launcher {launcher} has no worker {rank}")


class TestTorchrun:
    def text(self, model: Path) -> Path:
        """Write a text that lasts for some thousand batches beside a model."""
        path = model.with_name("text.txt")
        path.write_text(Path(TEXT).read_text() * 40)
        return path

    def words(self, output: Path, model: Path, *more: object) -> list[object]:
        data = ["--calibration", self.text(model), "--length", 32, "--set", "calibration.batch_size=2"]
        return ["prune", model, output, "--no-evaluate", *data, *more]

    def test_two_processes_write_what_one_does(self, tmp_path: Path) -> None:
        model = home("wanda").save(tmp_path / "model")
        more = ["--method", "wanda", "--samples", 6, "--json"]
        two = torchrun(2, *self.words(tmp_path / "two", model, *more))
        said, errors = two.communicate(timeout=600)
        assert two.returncode == 0, errors
        assert json.loads(said)["status"] == "ok"
        assert main([str(word) for word in self.words(tmp_path / "one", model, *more)]) == 0
        one, other = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
        assert one.read_bytes() == other.read_bytes()

    @pytest.mark.parametrize(
        ("method", "more", "said"),
        [
            ("wanda", {}, "3 processes for 2 batches"),
            ("wanda", {"recover": {"steps": 2}}, "recover: "),
            ("fastv", {}, "fastv: works while a model runs"),
        ],
    )
    def test_what_cannot_be_shared_is_refused(self, method: str, more: dict[str, Any], said: str) -> None:
        recipe = build(Recipe, {"model": "demo", "output": "out", "prune": {"method": method}, **more})
        calibration = Calibration([{"input_ids": torch.zeros(2, 4)}] * 2, {}, [])
        with pytest.raises(UsageError, match=said) as refused:
            check_shared(recipe, calibration, {}, Ranks(0, 3))
        if not more and method == "wanda":
            assert refused.value.hint == "--set calibration.batch_size=1"

    def test_scores_are_not_shared(self) -> None:
        recipe = build(Recipe, {"model": "demo", "output": "out", "prune": {"method": "wanda"}})
        with pytest.raises(UsageError, match="--scores"):
            check_shared(recipe, None, {"scores": "1"}, Ranks(0, 2))

    def test_one_takes_the_card_of_its_number(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(opening, "devices", lambda: ["cpu", "cuda", "cuda:0", "cuda:1"])
        assert Opening().resolve(tmp_path, 0).device == "cuda:1"
        assert Opening(device="cuda").resolve(tmp_path, 0).device == "cuda:1"
        assert Opening(device="cpu").resolve(tmp_path, 0).device == "cpu"
        with pytest.raises(UsageError, match="4 processes were launched"):
            Opening(device="cuda:0").resolve(tmp_path, 0)
        assert "RANK" not in child_environment(ours=True)

    def test_other_commands_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for rank, said in (("0", "error: rank 0: inspect is the work of one process"), ("1", "")):
            for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
            assert main(["inspect", "demo"]) == 2
            assert capsys.readouterr().err.startswith(said)

    @pytest.mark.slow
    def test_when_one_is_killed_all_end_and_the_same_command_resumes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = home("sparsegpt").save(tmp_path / "model")
        more = ["--method", "sparsegpt", "--samples", 900]
        whole = torchrun(2, *self.words(tmp_path / "whole", model, *more))
        assert whole.communicate(timeout=600) and whole.returncode == 0
        killed = torchrun(2, *self.words(tmp_path / "out", model, *more))
        while not [*tmp_path.glob("out.partial-*/structprune/plans/*/block-0000.safetensors")]:
            assert killed.poll() is None
            time.sleep(0.01)
        os.kill(worker_of(killed.pid, 1), signal.SIGKILL)
        before = time.monotonic()
        killed.communicate(timeout=120)
        assert killed.returncode != 0
        assert time.monotonic() - before < 60
        assert main([str(word) for word in self.words(tmp_path / "out", model, *more)]) == 4
        assert "an interrupted run differs in ranks" in capsys.readouterr().err
        again = torchrun(2, *self.words(tmp_path / "out", model, *more), "--json")
        said, errors = again.communicate(timeout=600)
        assert again.returncode == 0, errors
        assert json.loads(said)["blocks_resumed"] >= 1
        files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
        assert files[0].read_bytes() == files[1].read_bytes()


class TestDivision:
    @pytest.mark.parametrize("batches", [1, 2, 5, 8, 9, 20])
    def test_every_batch_is_run_by_one_process_in_chunks_that_do_not_depend_on_them(
        self, batches: int
    ) -> None:
        every = [{"input_ids": torch.tensor([[number]])} for number in range(batches)]
        alone = RankBatches(every)
        chunks = {number: alone.chunk(number) for number in range(batches)}
        assert alone.chunks == min(8, batches) == len({*chunks.values()})
        for count in range(1, min(batches, 8) + 1):
            shares = [RankBatches(every, Ranks(number, count)) for number in range(count)]
            run = [int(batch["input_ids"]) for share in shares for batch in share]
            assert run == [*range(batches)]
            assert all(len(share) for share in shares)
            for share in shares:
                for position in range(len(share)):
                    assert share.chunk(position) == chunks[share.number(position)]

    def test_more_processes_than_chunks_have_a_chunk_each(self) -> None:
        every = [{"input_ids": torch.zeros(1, 1)} for _ in range(30)]
        shares = [RankBatches(every, Ranks(number, 12)) for number in range(12)]
        assert shares[0].chunks == 12
        assert sum(map(len, shares)) == 30
        assert min(map(len, shares)) >= 2

    def test_jobs_go_to_whoever_has_least_to_do(self) -> None:
        assert Ranks(0, 2).divide([1, 5, 3, 2]) == [0, 0, 1, 1]
        assert Ranks(0, 1).divide([1, 5]) == [0, 0]


class TestMemory:
    def test_what_each_remembers_of_experts_falls_with_the_processes(self) -> None:
        pruner = quick("sparsegpt")
        mixture, dense = (home.model() for home in (Home("mixtral"), Home("llama")))
        found = [pruner.remembered_bytes(mixture, count) for count in (1, 2, 4)]
        assert found == sorted({*found}, reverse=True)
        assert pruner.remembered_bytes(dense, 1) == pruner.remembered_bytes(dense, 4)


class TestAlone:
    def test_what_is_said_is_heard(self) -> None:
        tensors = {"a": torch.ones(2)}
        assert Ranks().tell_each({"x": 1}, tensors) == [({"x": 1}, tensors)]
        values = torch.tensor([1.0, 2.0])
        Ranks().add_in_order(values)
        Ranks().add_apart(values)
        assert values.tolist() == [1.0, 2.0]
        assert Ranks.here() == Ranks()


class TestWhatIsSaidBefore:
    @pytest.mark.parametrize("method", counted_methods())
    def test_two_processes_read_and_send_what_was_said(self, decided: Any, method: str) -> None:
        folder, said = decided
        model = open_skeleton(folder / "llama")
        demand = counted_methods()[method].demand(model, Sharing(SAMPLES, LENGTH, BATCH, PAIR, streamed=True))
        assert demand is not None
        counted = [said[PAIR, rank]["counted"][method] for rank in range(PAIR)]
        # The last norm is read with the head, too, where gradients begin there.
        norm = 64 * 4 if method == "gblm" else 0
        assert [one["read"] for one in counted] == [demand.read_bytes + norm] * PAIR
        sent = sum(one["sent"] for one in counted)
        if method == "wanda_sp":  # of which only the columns that stay are told
            assert 0.8 * demand.sent_bytes < sent < demand.sent_bytes
        else:
            assert sent == demand.sent_bytes

    def test_processes_that_measure_together_agree_on_the_slowest(self, decided: Any) -> None:
        _, said = decided
        first, second = (said[PAIR, rank]["counted"]["rates"] for rank in range(PAIR))
        assert first == second
        assert first["place"]["ranks"] == PAIR
        assert first["sent_bytes"] > 0
