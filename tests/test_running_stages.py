"""Stages that work while the model runs, in whole runs: their place, their words, what becomes of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import structprune
from structprune.checkpoint.plans import plans_of, stages
from structprune.cli.inspection import inspection_lines
from structprune.cli.summary import run_lines
from structprune.errors import InputError, UsageError
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model, open_skeleton
from structprune.pipeline.inspect import abilities
from structprune.plan.promise import Computed
from structprune.proof import fresh_process as fresh
from structprune.proof.image_probe import image_probe
from structprune.proof.verify import verify
from structprune.pruners import catalogue
from structprune.recipe.recipe import assemble
from tests.conftest import Command
from tests.methods import QUICK, TOKEN_METHODS, Home, home, quick, reachable, short_runs
from tests.oracle import pictures
from tests.pictures import Pictures, vision_model
from tests.seeing import save_rows
from tests.specimens import leave_out_fresh_process
from tests.tiny import save_tiny

pytest.importorskip("PIL")

HALF = {"method": "divprune", "target": {"keep_ratio": 0.5}}
WITHOUT_RELOAD = {"writing": QUICK["writing"]}


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    with short_runs():
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def pruned(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of which half of the visual tokens are dropped before the first block."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    structprune.prune(seeing, out, catalogue.find("divprune")(target={"keep_ratio": 0.5}), **WITHOUT_RELOAD)
    return out


@pytest.fixture(scope="module")
def picture() -> dict[str, Tensor]:
    return Pictures("llava").batch()


class TestPlace:
    def test_what_changes_weights_comes_before(self) -> None:
        with pytest.raises(UsageError, match="magnitude after divprune") as caught:
            assemble({"model": "demo-vision", "output": "out", "prune": ["wanda", "divprune", "magnitude"]})
        assert "put divprune last" in str(caught.value.hint)
        assert assemble({"model": "demo-vision", "output": "out", "prune": ["wanda", "divprune", "fastv"]})

    def test_nothing_is_recovered_after_it(self) -> None:
        raw = {"model": "demo-vision", "output": "out", "prune": "fastv", "recover": {"data": "demo"}}
        with pytest.raises(UsageError, match=r"recover: .*fastv works while the model runs") as caught:
            assemble(raw)
        assert "recover first" in str(caught.value.hint)

    def test_nothing_is_streamed(
        self, seeing: Path, pruned: Path, rows: Path, tmp_path: Path, command: Command
    ) -> None:
        for words in (
            ["prune", seeing, tmp_path / "out", "--method", "divprune"],
            ["prune", seeing, tmp_path / "out", "--method", "divprune", "--dry-run"],
            ["apply", seeing, tmp_path / "out", "--plan", pruned],
            ["evaluate", pruned, "--questions", rows],
        ):
            done = command(*words, "--stream")
            assert done.code == 2, words
            assert "divprune works while a model runs" in done.err and "leave --stream out" in done.err
        with pytest.raises(UsageError, match="divprune works while a model runs"):
            structprune.load(pruned, Opening(stream=True))

    def test_what_it_wrote_is_no_source_of_another_run(
        self, seeing: Path, pruned: Path, rows: Path, tmp_path: Path, command: Command
    ) -> None:
        out = tmp_path / "out"
        for words in (
            ["prune", pruned, out, "--method", "magnitude"],
            ["prune", pruned, out, "--method", "fastv"],
            ["apply", pruned, out, "--plan", pruned],
            ["recover", pruned, out, "--data", rows],
        ):
            done = command(*words)
            assert done.code == 2, words
            assert "start from the model it was made from, and run divprune last" in done.err
        assert not out.exists()

    def test_a_model_that_reads_no_images_is_refused(
        self, llama: Path, tmp_path: Path, command: Command
    ) -> None:
        done = command("prune", llama, tmp_path / "out", "--method", "divprune")
        assert done.code == 2 and "a llama reads no images" in done.err

    def test_a_method_that_looks_at_images_is_given_no_text(
        self, seeing: Path, tmp_path: Path, command: Command
    ) -> None:
        for more in ((), ("--dry-run",)):
            done = command("prune", seeing, tmp_path / "out", "--method", "fitprune", *more)
            assert done.code == 2 and "demo holds text, and fitprune looks at images" in done.err
            assert "--calibration FILE.jsonl" in done.err


class TestGoals:
    @pytest.mark.parametrize(
        ("said", "left"),
        [("keep_ratio=0.25", 4), ("tokens=5", 5), ("avg_tokens=2", 2), ("visual_flops=0.5", 8)],
    )
    def test_the_command_line_says_how_much_is_left(
        self, said: str, left: int, seeing: Path, tmp_path: Path, command: Command
    ) -> None:
        words = ("prune", seeing, tmp_path / "out", "--method", "grid_tokens", "--set", f"target.{said}")
        planned = command(*words, "--dry-run", "--json").json["stages"][0]
        assert planned["asked"] == said.replace("=", " ")
        assert planned["reachable"] == 1 - left / 16
        assert planned["unit"].startswith("visual tokens")

    @pytest.mark.parametrize(
        ("said", "told"),
        [
            ("target=0.5", "expected keys: keep_ratio, tokens, avg_tokens, visual_flops"),
            ("target.keep_ratio=0.01", "keep_ratio can be from 0.0625 to 1"),
            ("target.keep_ratio=2", "prune.target.keep_ratio: found 2"),
            ("target.ratio=0.5", "did you mean 'keep_ratio'?"),
            ("sparsity=0.5", "one of: target"),
        ],
    )
    def test_what_cannot_be_left_is_refused(
        self, said: str, told: str, seeing: Path, tmp_path: Path, command: Command
    ) -> None:
        done = command("prune", seeing, tmp_path / "out", "--method", "divprune", "--set", said, "--dry-run")
        assert done.code == 2 and told in done.err

    def test_a_choice_that_costs_more_than_it_saves_is_told_before_and_after(
        self, seeing: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leave_out_fresh_process(monkeypatch)
        # One of 16 tokens, in the last block, saves 34688 operations.
        monkeypatch.setattr(catalogue.find("fastv"), "operations", lambda *_: 600_000)
        words = ("prune", seeing, tmp_path / "out", "--method", "fastv", "--set", "block=3")
        words = (*words, "--set", "target.tokens=15", "--json")
        for more in (("--dry-run",), ("--no-evaluate",)):
            done = command(*words, *more)
            assert done.code == 0 and done.err.count("fastv: to choose tokens of an image costs") == 1
            (stage,) = done.json["stages"]
            if "--dry-run" in more:
                assert "more than the" in stage["notes"][0]
        told = stage["while_running"]
        assert told["tokens"] == 15 and told["selection_flops"] > 1 - told["visual_flops"]
        assert (
            f"to choose them costs {told['selection_flops']:.2%}" in (tmp_path / "out/README.md").read_text()
        )

    def test_several_goals_are_several_runs(
        self, seeing: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = tmp_path / "recipe.yaml"
        # What is asked for on the command line takes the place of another unit in the file.
        recipe.write_text("prune: {method: divprune, target: {visual_flops: 0.4}}")
        out = tmp_path / "all"
        words = ("prune", seeing, out, "--config", recipe, "--no-evaluate", "--json", "--target")
        planned = command(*words, "tokens=4,8", "--dry-run").json["runs"]
        assert {name: run["stages"][0]["asked"] for name, run in planned.items()} == {
            "4": "tokens 4",
            "8": "tokens 8",
        }
        leave_out_fresh_process(monkeypatch)
        runs = command(*words, "tokens=4,8").json["runs"]
        left = {name: run["stages"][0]["while_running"]["tokens"] for name, run in runs.items()}
        assert left == {"4": 4, "8": 8}
        assert plans_of(out / "4")[0].config["target"]["tokens"] == 4
        # One more; what is there stays.
        runs = command(*words, "tokens=4,8,12").json["runs"]
        assert {name: "kept" in run for name, run in runs.items()} == {"4": True, "8": True, "12": False}

    @pytest.mark.parametrize("said", ["0.5", "keep_ratio=", "keep_ratio=half", "keep_ratio=0.5,"])
    def test_a_target_without_a_name_or_a_number_is_refused(
        self, said: str, tmp_path: Path, command: Command
    ) -> None:
        done = command("prune", "demo-vision", tmp_path / "out", "--method", "fastv", "--target", said)
        assert done.code == 2 and "expected a name and numbers" in done.err and "tokens=16,64" in done.err

    def test_a_target_that_cannot_be_is_refused_with_all_that_can(
        self, seeing: Path, tmp_path: Path, command: Command
    ) -> None:
        words = ("prune", seeing, tmp_path / "out", "--method", "fastv", "--target")
        for said, told in (
            ("keep_ratio=0.5,2", "less than or equal to 1"),
            ("share=0.5,0.2", "one of: keep_ratio, tokens"),
            ("keep_ratio=0.5,0.01", "keep_ratio can be from 0.0625 to 1"),
        ):
            done = command(*words, said)
            assert done.code == 2 and told in done.err and not (tmp_path / "out").exists()

    def test_an_image_of_any_size_leaves_the_number_open(self) -> None:
        model = vision_model("qwen2_5_vl")
        plan = quick("divprune", target={"keep_ratio": 0.5}).calibrate(model, [])
        (row,) = stages([plan])
        assert row["asked"] == "keep_ratio 0.5" and "reachable" not in row
        # It is told of an image of a size that is said; the tower is left out.
        told = row["while_running"]
        assert (told["visual_tokens"], told["tokens"]) == (1024, 512) and "image_flops" not in told
        assert "of an image of 1024 tokens" in told["counted"]
        with pytest.raises(UsageError, match="depends on the image"):
            quick("divprune", target={"visual_flops": 0.5}).calibrate(model, [])

    def test_what_data_decides_may_be_asked_for_in_operations_for_images_of_any_size(self) -> None:
        model, batch = vision_model("qwen2_5_vl"), pictures("qwen2_5_vl", 2).batch()
        plan = quick("fitprune", target={"visual_flops": 0.5}).calibrate(model, [batch])
        assert 0.3 < plan.facts["visual_flops"] < 0.7 and plan.facts["tokens"] < 1024


class TestWords:
    def test_methods_lists_them_in_a_family_of_their_own(self) -> None:
        listed = {row["name"]: row["family"] for row in structprune.methods()["methods"]}
        assert {name for name, family in listed.items() if family == "token"} == {*TOKEN_METHODS}

    def test_inspect_says_what_can_be_kept(self, seeing: Path, llama: Path) -> None:
        result = structprune.inspect(str(seeing))
        found = {row["name"]: row for row in result["methods"]}
        for name in TOKEN_METHODS:
            row = found[name]
            if reachable(catalogue.find(name)()):
                assert "leaves less than one token of an image of 16" in row["reason"]
                continue
            assert row["reason"] is None and row["unit"].startswith("visual tokens")
            assert row["range"] == "keep_ratio 0.0625 to 1 of the 16 visual tokens of an image"
            assert not row["fractions"] and not row["patterns"]
        assert found["fitprune"]["reads"] == "images" and found["wanda"]["range"] is None
        assert "needs images  keep_ratio 0.0625 to 1" in inspection_lines(result)
        assert "reads no images" in abilities("fitprune", open_skeleton(llama, Opening()))["reason"]

    def test_a_dry_run_says_where_the_saving_is(self, seeing: Path, tmp_path: Path) -> None:
        raw = {"model": str(seeing), "output": str(tmp_path / "out"), "prune": HALF}
        note = structprune.dry_run(assemble(raw))["note"]
        assert "zeros" not in note and "only while structprune runs the model" in note
        both = structprune.dry_run(assemble(raw | {"prune": ["magnitude", HALF]}))["note"]
        assert "zeros" in both and "divprune exists only while structprune runs the model" in both

    def test_the_card_and_the_summary_say_so_too(self, pruned: Path) -> None:
        card = (pruned / "README.md").read_text()
        assert "of the 16 of an image 8 are left in the last block" in card
        assert "**The saving exists only under structprune**" in card
        assert "stored as zeros" not in card and "weights only" not in card
        said = run_lines(json.loads((pruned / "structprune/report.json").read_text()))
        assert "8 of 16 visual tokens of an image left at the end" in said
        assert "while structprune runs it" in said

    def test_the_report_counts_in_every_unit(self, pruned: Path) -> None:
        report = json.loads((pruned / "structprune/report.json").read_text())
        (stage,) = report["stages"]
        left = stage["while_running"]
        assert (left["visual_tokens"], left["tokens"], left["avg_tokens"]) == (16, 8, 8)
        assert left["keep_ratio"] == 0.5 and 0.4 < left["visual_flops"] < 0.5 and left["counted"]
        assert report["sparsity"] == 0 and report["parameters"]["pruned"] == report["parameters"]["dense"]


class TestFolder:
    def test_its_weights_are_the_sources(self, pruned: Path, seeing: Path) -> None:
        for file in seeing.glob("*.safetensors"):
            assert (pruned / file.name).read_bytes() == file.read_bytes()
        assert (pruned / "config.json").read_bytes() == (seeing / "config.json").read_bytes()

    def test_load_lets_it_run_with_fewer_tokens(
        self, pruned: Path, seeing: Path, picture: dict[str, Tensor]
    ) -> None:
        model, _ = structprune.load(pruned)
        dense = open_model(seeing)
        with structprune.pruning(dense, plans_of(pruned)[0]):
            expected = logits(dense, picture)
        assert torch.equal(logits(model, picture), expected)
        assert not torch.equal(expected, logits(dense, picture))
        with structprune.paused(model):
            assert torch.equal(logits(model, picture), logits(dense, picture))

    def test_evaluate_measures_it_as_it_runs(
        self, pruned: Path, seeing: Path, rows: Path, command: Command
    ) -> None:
        found = command("evaluate", pruned, "--compare", seeing, "--questions", rows, "--json").json
        assert found["questions"]["asked"]["kl"] > 0
        same = command("evaluate", pruned, "--compare", pruned, "--questions", rows, "--json").json
        assert same["questions"]["asked"]["kl"] == 0

    def test_its_plan_is_carried_out_on_its_source_again(
        self, pruned: Path, seeing: Path, tmp_path: Path, command: Command
    ) -> None:
        report = structprune.apply(str(seeing), tmp_path / "out", pruned, **WITHOUT_RELOAD)
        assert [plan.id for plan in plans_of(tmp_path / "out")] == [plan.id for plan in plans_of(pruned)]
        assert report["stages"][0]["while_running"]["tokens"] == 8
        other = save_tiny("llava", tmp_path / "other", seed=1, depth=4)
        refused = command("apply", other, tmp_path / "more", "--plan", pruned)
        assert refused.code == 3 and "decided on other weights" in refused.err

    def test_two_stages_of_two_kinds_are_both_there(
        self, seeing: Path, rows: Path, tmp_path: Path, picture: dict[str, Tensor]
    ) -> None:
        stages_ = [{"method": "wanda", "sparsity": 0.5}, HALF]
        raw: dict[str, Any] = {"model": str(seeing), "output": str(tmp_path / "out"), "prune": stages_}
        raw |= {"calibration": {"source": str(rows), "samples": 2}}
        report = structprune.prune(assemble(raw), **WITHOUT_RELOAD)
        assert [stage["unit"] for stage in report["stages"]] == ["weights", "visual tokens in the blocks"]
        assert report["stages"][0]["measured"] == report["sparsity"] == 0.5
        assert report["calibration"]["images"]
        assert verify(tmp_path / "out", seeing, reload=False).ok
        model, _ = structprune.load(tmp_path / "out")
        said = logits(model, picture)
        with structprune.paused(model):
            sparse = logits(model, picture)
        assert not torch.equal(said, sparse)
        assert not torch.equal(sparse, logits(open_model(seeing), picture))


class TestPruning:
    def test_it_lasts_as_long_as_the_with(self, picture: dict[str, Tensor]) -> None:
        model = home("divprune").model()
        dense = logits(model, picture)
        with structprune.pruning(model, "grid_tokens") as plan:
            assert plan.method == "grid_tokens"
            assert not torch.equal(logits(model, picture), dense)
        assert torch.equal(logits(model, picture), dense)
        with pytest.raises(ZeroDivisionError), structprune.pruning(model, plan):
            raise ZeroDivisionError
        assert torch.equal(logits(model, picture), dense)

    def test_it_refuses_what_does_not_run(self) -> None:
        model = home("fitprune").model()
        with (
            pytest.raises(UsageError, match="magnitude changes the weights"),
            structprune.pruning(model, "magnitude"),
        ):
            pass
        with pytest.raises(UsageError, match="fitprune needs data"), structprune.pruning(model, "fitprune"):
            pass
        text = Home("llava", depth=4).batches(1)
        with pytest.raises(InputError, match="hold no images"), structprune.pruning(model, "fitprune", text):
            pass


@pytest.mark.usefixtures("really_fresh")
def test_laws_5_and_8_what_was_asked_is_counted_in_a_fresh_process_and_plain_ones_run_dense(
    seeing: Path, tmp_path: Path
) -> None:
    dense = open_model(seeing)
    ids = fresh.probe(dense.config)
    image = image_probe(dense.config, ids[0])
    assert image is not None
    jobs, promised, expected = [], [], []
    for method in TOKEN_METHODS:
        output = tmp_path / method
        structprune.prune(seeing, output, quick(method), **home(method).short_run(tmp_path))
        (plan,) = plans_of(output)
        assert plan.promises is not None
        said = [one for one in plan.promises.stored if isinstance(one, Computed)]
        promised.append([(one.attention, one.feed_forward, one.at_most) for one in said])
        jobs.append(fresh.ReloadJob(output, ids, Opening(dtype="float32"), image))
        expected.append(logits(structprune.load(output)[0], image))
    for child, counts, ours in zip(fresh.reload(jobs, how="running"), promised, expected, strict=True):
        assert child.error == "" and child.image_logits is not None
        assert len(child.computed) == len(counts)
        for (attention, feed_forward), (entering, leaving, at_most) in zip(
            child.computed, counts, strict=True
        ):
            assert (attention, feed_forward) == (entering, leaving) or (
                at_most and 0 <= feed_forward <= attention <= entering and feed_forward <= leaving
            )
        assert counts[-1][:2] < (16, 16)
        assert torch.equal(child.image_logits, ours)
    for child in fresh.reload(jobs, how="plain"):
        assert child.error == "" and child.image_logits is not None
        assert torch.equal(child.image_logits, logits(dense, image))
