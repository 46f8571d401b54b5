"""What `bench` measures and says: never how fast a model is, which only a bench may ask."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import structprune
from structprune.errors import EnvironmentFailure, UsageError
from structprune.evaluation import footprint, speed
from structprune.evaluation.footprint import bytes_needed, check_room
from structprune.evaluation.speed import Pass, Workload, prompts, timed_pass, timed_rounds, workload_of
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.pipeline.bench import SAME, contender, measure_speed
from structprune.recipe.options import BenchOptions
from structprune.recipe.recipe import Recipe, assemble
from structprune.report.speed import speed_header, speed_notes, speed_rows
from tests.conftest import Command
from tests.methods import CALIBRATION
from tests.specimens import no_fresh_process
from tests.tiny import FAMILIES, LENGTH, save_tiny, tiny, tokens

QUICK = ("--length", 8, "--new", 3, "--repeats", 2)
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds")


@pytest.fixture
def alone() -> Any:
    """Stand-in: no fresh process measures memory."""
    with no_fresh_process():
        yield


class TestAPass:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_its_tokens_are_those_that_the_model_writes_without_a_cache(self, family: str) -> None:
        model, ids = tiny(family), tokens(tiny(family), 2, 20)["input_ids"]
        written = ids
        for _ in range(4):
            with torch.no_grad():
                chosen = model(input_ids=written, use_cache=False).logits[:, -1:].argmax(-1)
            written = torch.cat([written, chosen], dim=1)
        found = timed_pass(model, ids, 4)
        assert torch.equal(found.tokens, written[:, 20:])
        assert 0 < found.prefill <= found.first and found.decode > 0

    def test_its_cache_is_that_of_the_key_value_heads(self) -> None:
        model = tiny("llama", dtype=torch.bfloat16)  # 2 blocks, 2 of 4 heads, 16 each, 2 bytes a number
        load = Workload(12, 5, (3,), 1)
        found = timed_pass(model, prompts(model.config, load, 3), load.new)
        assert found.kv_bytes == 2 * 2 * 2 * 16 * 2 * 3 * load.cached == 2 * 2 * 2 * 16 * 2 * 3 * 16

    def test_its_prompts_are_the_same_each_time_and_hold_no_special_token(self) -> None:
        config, load = tiny("llava").config, Workload(64, 2, (4,), 1)
        assert torch.equal(prompts(config, load, 4), prompts(config, load, 4))
        special = {0, 1, 2, config.image_token_index}
        assert not special & set(prompts(config, load, 4).flatten().tolist())


def test_every_round_runs_the_models_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    models, ran, told = [tiny("llama"), tiny("qwen2")], [], []

    def run(model: Any, ids: Any, new: int) -> Pass:
        ran.append((models.index(model), new))
        return Pass(1, 1, 1, ids, 1)

    monkeypatch.setattr(speed, "timed_pass", run)
    rounds = timed_rounds(models, Workload(4, 7, (2,), 3), 2, told.append)
    assert ran == [(0, 2), (1, 2), *[(0, 7), (1, 7)] * 3]  # the first two only warm up
    assert [len(row) for row in rounds] == [2, 2, 2] and told == [1, 2, 3]


class TestWhatIsSaid:
    def test_all_figures_are_there_and_more_than_nothing(
        self, command: Command, llama: Path, tmp_path: Path, alone: None
    ) -> None:
        small = save_tiny("llama", tmp_path / "small", shards=3)
        done = command("bench", small, "--compare", llama, *QUICK, "--batch", "2,1", "--json")
        assert done.code == 0, done.err
        assert [row["batch"] for row in done.json["batches"]] == [1, 2]
        for row in done.json["batches"]:
            for figure in (row[name][key] for name in RATES for key in ("model", "compared", "speedup")):
                assert 0 < figure["low"] <= figure["median"] <= figure["high"]
            assert row["kv_bytes"] == {"model": 512 * 10 * row["batch"], "compared": 512 * 10 * row["batch"]}
            assert min(row["peak_memory_bytes"].values()) > 0
        assert done.json["models"]["model"]["file_bytes"] == sum(
            file.stat().st_size for file in small.glob("model-*.safetensors")
        )
        assert done.json["protocol"]["length"] == 8 and done.json["protocol"]["device"] == "cpu"
        assert done.json["flags"] == []

    def test_a_model_alone_has_no_other_column(self, command: Command, llama: Path, alone: None) -> None:
        done = command("bench", llama, *QUICK)
        assert done.code == 0 and "dense" not in done.out and "ratio" not in done.out
        assert "KV cache" in done.out and "weight files" in done.out

    def test_the_column_beside_it_is_dense_only_where_the_model_is(
        self, command: Command, specimens: Path, alone: None
    ) -> None:
        pruned, model = specimens / "pruned", specimens / "model"
        assert "dense" in command("bench", pruned, "--compare", model, *QUICK).out
        shown = command("bench", model, "--compare", pruned, *QUICK).out
        assert "dense" not in shown and "compared" in shown

    def test_a_folder_beside_itself_is_told(self, command: Command, llama: Path, alone: None) -> None:
        done = command("bench", llama, "--compare", llama, *QUICK, "--json")
        assert done.json["flags"] == [SAME] and SAME in done.err

    def test_an_adapter_is_timed_with_its_base(self, command: Command, specimens: Path, alone: None) -> None:
        done = command("bench", specimens / "adapter", "--compare", specimens / "pruned", *QUICK, "--json")
        assert done.code == 0, done.err
        sizes = {name: facts["file_bytes"] for name, facts in done.json["models"].items()}
        own = (specimens / "adapter" / "adapter_model.safetensors").stat().st_size
        assert sizes["model"] == sizes["compared"] + own

    @pytest.mark.parametrize(
        "stage",
        [{"method": "flap", "sparsity": 0.4}, {"method": "armor", "sparsity": "2:4", "wrapper_size": 8}],
    )
    def test_sizes_and_products_of_our_own_are_timed_too(
        self, stage: dict[str, Any], command: Command, llama: Path, tmp_path: Path, alone: None
    ) -> None:
        structprune.prune(recipe_of(llama, tmp_path / "out", bench=None, prune=stage))
        assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())
        done = command("bench", tmp_path / "out", "--compare", llama, *QUICK, "--json")
        assert done.code == 0, done.err
        assert done.json["batches"][0]["prefill_tokens_per_second"]["model"]["median"] > 0
        assert done.json["models"]["model"]["pruned"] is True

    def test_what_was_not_measured_is_a_dash_and_null(self) -> None:
        timed = {"model": {"median": 2000.0, "low": 1.0, "high": 2.5}, "compared": None, "speedup": None}
        facts = {"name": "m", "pruned": False, "file_bytes": 3, "dtype": "float32", "parameters": 1}
        result: dict[str, Any] = {
            "models": {"model": facts, "compared": None},
            "batches": [
                {"batch": 1, **dict.fromkeys(RATES, timed)}
                | {"peak_memory_bytes": {"model": None, "compared": None}}
                | {"kv_bytes": {"model": 5, "compared": None}}
            ],
        }
        rows = dict(speed_rows(result))
        assert rows["batch 1: peak memory"] == "-" and rows["batch 1: KV cache"] == "5 bytes"
        assert rows["batch 1: prefill, tokens/s"] == "2,000 (1 to 2.5)"
        assert speed_header(result) == ("", "model")


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "code", "said"),
        [
            (
                ("--length", LENGTH),
                2,
                f"bench.length {LENGTH} and bench.new 32: more than the model's max_pos",
            ),
            (("--new", LENGTH), 2, f"bench.new {LENGTH}: more than"),
            (("--new", 1), 2, "bench.new: found 1, expected"),
            (("--batch", "0,8"), 2, "bench.batch.0: found '0', expected greater than or equal to 1"),
            (("--batch", "a"), 2, "bench.batch"),
            (("--batch", ","), 2, "bench.batch"),
            (("--repeats", 0), 2, "bench.repeats"),
            (("--set", "repeat=3"), 2, "did you mean 'repeats'?"),
            (("--set", "evaluate.windows=3"), 2, "does not read it"),
            (("--length", 8, "--batch", 2**24), 4, "and the cache of 16,777,216 prompts"),
            (("--device", "cuda:77"), 4, "is not there"),
            (("--compare", "no/such/folder"), 3, "no such folder"),
        ],
    )
    def test_what_cannot_be_measured(
        self, flags: tuple[object, ...], code: int, said: str, command: Command, llama: Path
    ) -> None:
        done = command("bench", llama, *flags)
        assert (done.code, done.out) == (code, "") and said in done.err and "hint: " in done.err
        failed = command("bench", llama, *flags, "--json").json
        assert failed["code"] == code and "batches" not in failed

    def test_models_of_two_dtypes(self, command: Command, llama: Path, tmp_path: Path) -> None:
        half = save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
        done = command("bench", half, "--compare", llama, *QUICK)
        assert done.code == 2 and "computes in bfloat16" in done.err and "--dtype" in done.err

    def test_a_damaged_folder_and_a_packed_one(
        self, command: Command, specimens: Path, llama: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(llama, tmp_path / "cut")
        with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        for folder in (tmp_path / "cut", specimens / "packed"):
            done = command("bench", folder, *QUICK)
            assert (done.code, done.out) == (3, "")

    def test_a_model_that_is_to_be_streamed(self, llama: Path) -> None:
        with pytest.raises(UsageError, match="in memory"):
            structprune.bench(str(llama), opening=Opening(stream=True))

    def test_a_batch_that_turns_out_too_large(
        self, command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(speed, "timed_pass", fail)
        done = command("bench", llama, *QUICK, "--batch", 4)
        assert done.code == 4 and "a batch of 4 prompts of 8 tokens" in done.err and done.out == ""

    def test_a_fresh_process_that_ends_early(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(footprint.sys, "executable", shutil.which("false"))
        found = contender("llama", llama, Opening(stream=False))
        with pytest.raises(
            EnvironmentFailure, match="memory could not be measured: the process ended with 1"
        ):
            measure_speed([found], Workload(4, 2, (1,), 1))

    @pytest.mark.usefixtures("really_fresh")
    def test_a_fresh_process_holds_the_weights_and_grows_with_the_batch(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A file of the user's that is called as a module of some library must not be taken for it.
        (tmp_path / "transformers.py").write_text("raise RuntimeError\n")
        monkeypatch.chdir(tmp_path)
        found, load = contender("llama", llama, Opening(stream=False)), Workload(64, 2, (1, 16), 1)
        small, large = footprint.in_fresh_process(found.subject, load)
        assert found.as_json()["parameters"] * 4 < small < large < 2**29

    def test_what_is_needed_is_all_weights_and_the_largest_cache(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, load = tiny("llama"), Workload(16, 2, (1, 4), 1)
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        needed = 2 * weights + 4 * 16 * 2 * 2 * 2 * 16 * 4
        assert bytes_needed([model, model], load) == needed
        monkeypatch.setattr(footprint, "available_memory", lambda: needed)
        check_room([model, model], load, "cpu")
        monkeypatch.setattr(footprint, "available_memory", lambda: needed - 1)
        with pytest.raises(EnvironmentFailure, match="2 models and the cache of 4 prompts"):
            check_room([model, model], load, "cpu")

    def test_the_default_prompt_leaves_room_for_what_is_new(self) -> None:
        assert workload_of(BenchOptions(), [tiny("llama").config]).length == LENGTH - 32


def recipe_of(llama: Path, output: Path, **more: Any) -> Recipe:
    stage = {"method": "flap", "sparsity": 0.5, "budget": "uniform", "repair": None}
    asked = {"bench": {"length": 8, "new": 3, "repeats": 2, "batch": 2}, "evaluate": False} | more
    return assemble(
        {"model": str(llama), "output": str(output), "prune": stage, "calibration": CALIBRATION} | asked
    )


class TestInARecipe:
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_dense_model_stands_beside_the_pruned_one_in_report_and_card(
        self, stream: bool, llama: Path, tmp_path: Path, alone: None
    ) -> None:
        structprune.prune(recipe_of(llama, tmp_path / "out"), opening=Opening(stream=stream))
        found = json.loads((tmp_path / "out" / "structprune" / "report.json").read_text())["bench"]
        (row,) = found["batches"]
        assert row["kv_bytes"]["model"] * 2 == row["kv_bytes"]["compared"] == 512 * 2 * 10
        assert row["decode_tokens_per_second"]["model"]["median"] > 0
        assert found["models"]["model"]["parameters"] < found["models"]["compared"]["parameters"]
        assert found["models"]["model"]["name"] == str(tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "|  | dense | pruned | ratio |" in card and "| batch 2: KV cache | " in card
        assert all(note in card for note in speed_notes(found))

    def test_it_is_off_unless_asked_for(self, llama: Path, tmp_path: Path) -> None:
        with no_fresh_process():
            report = structprune.prune(recipe_of(llama, tmp_path / "out", bench=False))
        assert "bench" not in report and "## Speed" not in (tmp_path / "out" / "README.md").read_text()
        assert recipe_of(llama, tmp_path, bench=True).bench == BenchOptions()

    def test_a_recovered_model_is_timed_once_beside_the_dense_one(
        self, llama: Path, tmp_path: Path, alone: None
    ) -> None:
        training = {"data": CALIBRATION["source"], "steps": 2, "length": 16, "batch_size": 2, "rank": 2}
        report = structprune.prune(recipe_of(llama, tmp_path / "out", prune="magnitude", recover=training))
        assert report["bench"]["models"]["compared"]["name"] == str(llama)
        middle = json.loads((tmp_path / "out.pruned" / "structprune" / "report.json").read_text())
        assert "bench" not in middle

    def test_an_adapter_kept_apart_is_refused(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="an adapter that is kept apart"):
            recipe_of(llama, tmp_path / "out", recover={"keep_adapter": True})

    @pytest.mark.parametrize(
        ("bench", "said"),
        [
            ({"length": LENGTH}, "max_position_embeddings"),
            ({"length": 8, "batch": 2**24}, "16,777,216 prompts"),
        ],
    )
    @pytest.mark.parametrize("dry", [False, True])
    def test_sizes_are_checked_before_anything_is_computed(
        self, dry: bool, bench: dict[str, Any], said: str, llama: Path, tmp_path: Path
    ) -> None:
        recipe = recipe_of(llama, tmp_path / "out", bench=bench)
        with pytest.raises((UsageError, EnvironmentFailure), match=said):
            structprune.dry_run(recipe) if dry else structprune.prune(recipe)
        assert not list(tmp_path.iterdir())

    def test_the_dry_run_says_what_will_be_run(self, llama: Path, tmp_path: Path) -> None:
        found = structprune.dry_run(recipe_of(llama, tmp_path / "out"))
        assert found["bench"] == {"length": 8, "new": 3, "batches": (2,), "repeats": 2}
        without = structprune.dry_run(recipe_of(llama, tmp_path / "out", bench=None))
        assert without["bench"] is None and without["memory_bytes"] <= found["memory_bytes"]


def test_models_are_opened_alike_in_memory_and_skeleton(llama: Path) -> None:
    found = contender("llama", llama, Opening(stream=False, dtype="bfloat16"))
    assert found.skeleton.dtype == found.subject.open().dtype == torch.bfloat16
    assert type(found.subject.open()) is type(open_model(llama))
