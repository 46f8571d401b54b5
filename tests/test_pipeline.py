"""Whole runs on tiny models: what is asked lies on disk, and a killed run goes on where it stopped."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import structprune
import structprune.pipeline.prune as prune_module
from structprune.calibration.notebook import Notebook
from structprune.checkpoint.writing import Writing
from structprune.errors import (
    EnvironmentFailure,
    InputError,
    Interrupted,
    QualityError,
    StructpruneError,
    UsageError,
)
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.proof import fresh_process as fresh
from structprune.pruners import catalogue
from tests.methods import CALIBRATION, STORED_METHODS, STRUCTURE_METHODS, TEXT, accepts, home, quick
from tests.tiny import save_tiny, tiny

EVALUATION = {"text": TEXT, "windows": 2, "length": 32, "generations": False}
RESTART = Writing(restart=True, reload=False)
ANEW = Writing(restart=True, overwrite=True, reload=False)
QUICK: dict[str, Any] = {"calibration": CALIBRATION, "evaluate": EVALUATION, "writing": Writing(reload=False)}


def digests(folder: Path, *, of: str = "*.safetensors") -> dict[str, str]:
    """Return the sha256 of every weight and plan file in a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(of))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"), shards=2, dtype=torch.bfloat16)


@pytest.mark.usefixtures("really_fresh")
def test_laws_5_and_8_every_method_holds_what_was_asked_and_reloads_to_the_same_logits(
    tmp_path: Path,
) -> None:
    jobs, expected = [], []
    for method in STORED_METHODS:
        source = tmp_path / home(method).family
        if not source.exists():
            home(method).save(source, shards=2, dtype=torch.bfloat16)
        ids = fresh.probe(open_model(source, Opening(stream=True)).config)
        for sparsity in (0.5,) if method in STRUCTURE_METHODS else (0.25, "2:4"):
            if not accepts(method, sparsity=sparsity):
                continue
            output = tmp_path / f"{method}-{sparsity}".replace(":", "-")
            report = structprune.prune(source, output, quick(method, sparsity=sparsity), **QUICK)
            (stage,) = report["stages"]
            assert stage["asked"] == sparsity
            assert stage["reachable"] == stage["measured"]
            assert report["verification"]["ok"]
            if stage["unit"] == "weights":
                assert report["sparsity"] == stage["measured"] == (0.25 if sparsity == 0.25 else 0.5)
            else:
                assert stage["measured"] == pytest.approx(sparsity, abs=0.1)
                assert report["parameters"]["pruned"] < report["parameters"]["dense"]
            model, tokenizer = structprune.load(output)
            assert tokenizer is not None
            shipped = bool(list(output.glob("*.py")))  # our own modelling file, for transformers
            jobs.append(fresh.ReloadJob(output, ids, Opening(dtype="bfloat16", trust_remote_code=shipped)))
            expected.append(logits(model, {"input_ids": ids}))
    for child, ours in zip(fresh.reload(jobs), expected, strict=True):
        assert child.error == ""
        assert child.logits is not None
        assert torch.equal(child.logits.float(), ours.float())


@pytest.mark.usefixtures("plots")
def test_the_input_is_never_touched_and_the_output_is_complete(llama: Path, tmp_path: Path) -> None:
    before = digests(llama, of="*.*")
    report = structprune.prune(llama, tmp_path / "out", "wanda", **QUICK)
    assert digests(llama, of="*.*") == before
    assert structprune.verify(tmp_path / "out", str(llama))["ok"]
    for name in ("README.md", "structprune.json", "structprune/report.json", "structprune/recipe.yaml"):
        assert (tmp_path / "out" / name).is_file()
    assert not list(tmp_path.glob("*.partial-*")) and not list(tmp_path.glob("*.lock"))
    wanted = {"output", "method", "stages", "sparsity", "parameters", "bytes", "seconds"}
    assert wanted | {"peak_rss_bytes", "blocks_resumed", "loads_in"} <= report.keys()
    assert json.loads((tmp_path / "out" / "structprune" / "report.json").read_text())["sparsity"] == 0.5
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "structprune" / "plots" / "sparsity.png").is_file()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_run_stopped_after_any_block_resumes_with_the_same_bytes(
    llama: Path, tmp_path: Path, killed_after: int, stream: bool
) -> None:
    structprune.prune(llama, tmp_path / "whole", "wanda", opening=Opening(stream=stream), **QUICK)

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("calibrate") and done == killed_after:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        structprune.prune(
            llama, tmp_path / "out", "wanda", opening=Opening(stream=stream), progress=stop, **QUICK
        )
    assert not (tmp_path / "out").exists()
    report = structprune.prune(llama, tmp_path / "out", "wanda", opening=Opening(stream=stream), **QUICK)
    assert report["blocks_resumed"] == killed_after
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_for_good_resumes_from_the_command_line(llama: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "structprune",
        "prune",
        str(llama),
        str(tmp_path / "out"),
        "--method",
        "wanda",
    ]
    command += [
        "--samples",
        "64",
        "--length",
        "128",
        "--set",
        "evaluate.windows=1",
        "--set",
        "evaluate.length=32",
    ]
    command += ["--set", "calibration.batch_size=1", "--set", "evaluate.generations=false", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if list(tmp_path.glob("out.partial-*/structprune/plans/01-wanda/block-0000.safetensors")):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["blocks_resumed"] >= 1
    assert report["sparsity"] == 0.5
    assert not list(tmp_path.glob("*.partial-*")) and not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(
    ("method", "fields"), [("wanda", {"budget": "owl"}), ("gblm", {})], ids=["owl", "gblm"]
)
def test_a_run_stopped_while_it_looks_at_the_whole_model_resumes_with_the_same_bytes(
    method: str, fields: dict[str, str], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = catalogue.find(method).model_validate(fields)
    structprune.prune(llama, tmp_path / "whole", pruner, opening=Opening(stream=True), **QUICK)
    write = Notebook.write

    def stop(self: Notebook, block: int, tensors: dict[str, torch.Tensor]) -> None:
        write(self, block, tensors)
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Notebook, "write", stop)
        with pytest.raises(Interrupted):
            structprune.prune(llama, tmp_path / "out", pruner, opening=Opening(stream=True), **QUICK)
    (noted,) = (path.name for path in tmp_path.glob(f"out.partial-*/structprune/plans/01-{method}/*"))
    assert noted.startswith(("budget-0000", "gradients-0001"))  # gradients come last block first
    structprune.prune(llama, tmp_path / "out", pruner, opening=Opening(stream=True), **QUICK)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_unfinished_run_of_another_kind_is_named_and_forgotten_only_when_told(
    llama: Path, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("calibrate") and done:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        structprune.prune(llama, tmp_path / "out", "wanda", progress=stop, **QUICK)
    other = QUICK | {"seed": 1}
    with pytest.raises(EnvironmentFailure, match=r"differs in .*calibration\.seed") as caught:
        structprune.prune(llama, tmp_path / "out", "wanda", **other)
    assert "it left 01-wanda (1 block decided); " in caught.value.message
    left = next(tmp_path.glob("out.partial-*"))
    assert f"finish it with `structprune prune {left}/structprune/recipe.yaml`" in caught.value.hint
    assert "--restart" in caught.value.hint
    assert (
        structprune.prune(llama, tmp_path / "out", "wanda", **other | {"writing": RESTART})["blocks_resumed"]
        == 0
    )
    assert not list(tmp_path.glob("*.partial-*"))


def test_fields_of_a_method_and_keys_of_a_recipe_may_be_given_side_by_side(
    llama: Path, tmp_path: Path
) -> None:
    report = structprune.prune(llama, tmp_path / "out", "magnitude", sparsity="1:4", seed=3, **QUICK)
    assert (report["stages"][0]["asked"], report["sparsity"], report["pattern"]) == ("1:4", 0.75, "1:4")
    with pytest.raises(UsageError, match="sparisty"):
        structprune.prune(llama, tmp_path / "other", "magnitude", sparisty=0.5, **QUICK)
    with pytest.raises(UsageError, match="output"):
        structprune.prune(llama, None, "magnitude", **QUICK)


def test_several_stages_leave_one_plan_each(llama: Path, tmp_path: Path) -> None:
    stages = [{"method": "magnitude", "sparsity": 0.25, "skip": "1"}, {"method": "wanda", "sparsity": 0.5}]
    recipe = structprune.Recipe.model_validate(
        {"model": str(llama), "output": tmp_path / "out", "prune": stages, "evaluate": EVALUATION}
        | {"calibration": CALIBRATION}
    )
    for stream in (False, True):
        report = structprune.prune(
            recipe, opening=Opening(stream=stream), writing=Writing(overwrite=True, reload=False)
        )
        plans = [stage["folder"] for stage in report["stages"]]
        assert plans == ["01-magnitude", "02-wanda"]
        assert report["sparsity"] == 0.5
        if not stream:
            resident = digests(tmp_path / "out")
    assert digests(tmp_path / "out") == resident


def test_apply_gives_the_bytes_of_the_run_that_made_the_plan(llama: Path, tmp_path: Path) -> None:
    structprune.prune(llama, tmp_path / "out", "wanda", **QUICK)
    report = structprune.apply(
        str(llama), tmp_path / "again", tmp_path / "out", writing=Writing(reload=False)
    )
    assert report["sparsity"] == 0.5
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_apply_refuses_a_plan_of_other_weights(llama: Path, tmp_path: Path) -> None:
    structprune.prune(llama, tmp_path / "out", "magnitude", **QUICK)
    other = save_tiny("llama", tmp_path / "other", seed=1, shards=2, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="other weights"):
        structprune.apply(str(other), tmp_path / "again", tmp_path / "out")
    assert not (tmp_path / "again").exists()


def test_a_missed_quality_gate_publishes_nothing(llama: Path, tmp_path: Path) -> None:
    strict = QUICK | {"evaluate": EVALUATION | {"max_ppl_ratio": 0.001}}
    with pytest.raises(QualityError, match="perplexity"):
        structprune.prune(llama, tmp_path / "out", "wanda", **strict)
    assert not (tmp_path / "out").exists()
    # The corrected command is not in the way of the missed one; the same one with another gate resumes.
    assert structprune.prune(llama, tmp_path / "out", "wanda", **QUICK)["blocks_resumed"] == 2
    with pytest.raises(QualityError, match="perplexity"):
        structprune.prune(llama, tmp_path / "less", "wanda", sparsity=0.5, **strict)
    assert structprune.prune(llama, tmp_path / "less", "wanda", sparsity=0.25, **QUICK)["blocks_resumed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less", "out"]


@pytest.mark.parametrize("output", [None, "other"])
def test_a_recipe_given_as_a_model_is_told_how_it_is_read(
    output: str | None, llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    said = {"model": str(llama), "output": str(tmp_path / "out"), "prune": "magnitude", "evaluate": False}
    file.write_text(json.dumps(said))
    place = output and tmp_path / output
    with pytest.raises(UsageError, match="a recipe's file, expected a model") as refused:
        structprune.prune(file, place)
    report = eval(refused.value.hint.partition(": ")[2], {"structprune": structprune})
    assert report["output"] == str(place or tmp_path / "out")
    assert report["sparsity"] == 0.5


def test_every_command_protects_what_it_reads(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    structprune.prune(llama, out, "magnitude", **QUICK)
    for name in ("teacher", "dense", "plan", "scores", "tasks", "model"):
        shutil.copytree(out, out / name)
    shutil.copy(TEXT, out / "text.txt")
    (out / "recipe.yaml").write_text(
        f"model: {llama}\noutput: {out}\nprune: {{method: magnitude, sparsity: 0.5}}\n"
    )
    text, before = str(out / "text.txt"), digests(tmp_path, of="*")
    over = {"writing": Writing(overwrite=True, reload=False)}
    base = {"model": str(llama), "output": out, "prune": "magnitude"}
    runs: dict[str, Callable[[], object]] = {
        "calibration text": lambda: structprune.prune(
            llama, out, "wanda", calibration={"source": text}, **over
        ),
        "kept scores": lambda: structprune.prune(llama, out, "wanda", scores=out / "scores", **over),
        "recipe": lambda: structprune.prune(structprune.choose_recipe(str(out / "recipe.yaml")), **over),
        "training text": lambda: structprune.recover(
            str(llama), out, structprune.RecoverOptions(data=text), **over
        ),
        "teacher": lambda: structprune.recover(
            str(llama), out, structprune.RecoverOptions(teacher=str(out / "teacher")), **over
        ),
        "model to compare with": lambda: structprune.prune(
            llama, out, "wanda", evaluate={"compare": str(out / "dense")}, **over
        ),
        "text to measure on": lambda: structprune.prune(llama, out, "wanda", evaluate={"text": text}, **over),
        "folder of task files": lambda: structprune.prune(
            llama, out, "wanda", evaluate={"tasks": "mine", "include_path": str(out / "tasks")}, **over
        ),
        "plan": lambda: structprune.apply(str(llama), out, out / "plan", **over),
        "model": lambda: structprune.export(str(out / "model"), out, "bitmask", **over),
        "tokenizer": lambda: structprune.dry_run(
            structprune.Recipe.model_validate(base | {"tokenizer": str(out / "model")}), **over
        ),
    }
    for what, start in runs.items():
        with pytest.raises(UsageError, match=rf"the output holds the {what} {out}/"):
            start()
    sweep = structprune.Recipe.model_validate(base | {"calibration": {"source": str(out / "0.5" / "t.txt")}})
    (out / "0.5").mkdir()
    (out / "0.5" / "t.txt").write_text("years of work")
    with pytest.raises(UsageError, match="the output holds the calibration text"):
        structprune.prune_each(sweep, [0.25, 0.5], **over)
    assert digests(tmp_path, of="*") | before == digests(tmp_path, of="*")


def test_a_pattern_that_does_not_divide_is_refused_before_anything_is_calibrated(
    llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"model\.layers\.0.*not divisible by 7"):
        structprune.prune(llama, tmp_path / "out", catalogue.find("wanda")(sparsity="3:7"), **QUICK)
    assert not list(tmp_path.iterdir())


def test_sparsity_zero_copies_the_model_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    report = structprune.prune(llama, tmp_path / "out", catalogue.find("wanda")(sparsity=0), **QUICK)
    assert report["sparsity"] == report["stages"][0]["reachable"] == 0
    assert digests(tmp_path / "out", of="model*.safetensors") == digests(llama, of="model*.safetensors")


def test_what_is_skipped_and_excluded_stays_dense(llama: Path, tmp_path: Path) -> None:
    pruner = catalogue.find("magnitude")(skip="0", exclude=["down_proj"])
    report = structprune.prune(llama, tmp_path / "out", pruner, **QUICK)
    assert report["sparsity"] == 0.5  # of the prunable set, which is what was chosen
    matrices = {block["block"]: block["matrices"] for block in report["blocks"]}
    assert all(matrix["zeros"] == 0 for matrix in matrices[0].values())
    assert matrices[1]["mlp.down_proj"]["zeros"] == 0
    assert matrices[1]["mlp.up_proj"]["zeros"] == matrices[1]["mlp.up_proj"]["parameters"] // 2


def test_the_dry_run_says_what_is_needed_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    recipe = structprune.Recipe.model_validate(
        {"model": str(llama), "output": tmp_path / "out", "prune": {"method": "wanda", "sparsity": "2:4"}}
    )
    found = structprune.dry_run(recipe, opening=Opening(stream=True))
    assert found["stages"] == [{"method": "wanda", "unit": "weights", "asked": "2:4", "reachable": 0.5}]
    assert found["bytes"]["dense"] == sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    assert found["memory_bytes"] > found["bytes"]["dense"]
    assert not list(tmp_path.iterdir())


def test_inspect_counts_what_the_model_has(llama: Path) -> None:
    found = structprune.inspect(str(llama))
    assert (found["model_type"], found["blocks"], found["linears"]) == ("llama", 2, 14)
    assert found["prunable"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert found["patterns"] == ["1:4", "2:4", "3:4", "4:8"]
    assert found["sparsity"] == 0.0


def test_a_run_stopped_in_its_recovery_goes_on_there(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = {"teacher": str(llama), "steps": 2, "check_every": 1, "length": 16, "learning_rate": 1e-3}

    def run(**more: Any) -> dict[str, Any]:
        found: dict[str, Any] = structprune.prune(
            llama, tmp_path / "out", "wanda", sparsity=0.6, recover=recovery, **QUICK | more
        )
        return found

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(prune_module, "recover_run", stopped)
        with pytest.raises(Interrupted):
            run()
    with monkeypatch.context() as patched:
        patched.setattr(prune_module, "decide", stopped)
        assert run()["sparsity"] == pytest.approx(0.6, abs=0.01)
        with pytest.raises(EnvironmentFailure, match="out: "):
            run()
        with pytest.raises(Interrupted):
            run(writing=ANEW)


def test_restart_forgets_an_unfinished_recovery_too(llama: Path, tmp_path: Path) -> None:
    left = tmp_path / "out.partial-0123456789abcdef" / "structprune"
    (left / "training").mkdir(parents=True)
    (left / "fingerprint.json").write_text("{}")
    (left / "training" / "state.json").write_text("{}")
    recovery = {"teacher": str(llama), "steps": 2, "check_every": 1, "length": 16, "learning_rate": 1e-3}
    with pytest.raises(EnvironmentFailure, match="interrupted run"):
        structprune.prune(llama, tmp_path / "out", "wanda", recover=recovery, **QUICK)
    structprune.prune(llama, tmp_path / "out", "wanda", recover=recovery, **QUICK | {"writing": ANEW})
    assert (tmp_path / "out" / "structprune.json").is_file()
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_recovery_that_must_fail_is_refused_before_anything_is_pruned(
    stream: bool, llama: Path, tmp_path: Path
) -> None:
    model = tiny("llama")
    model.resize_token_embeddings(400)
    model.save_pretrained(other := tmp_path / "other")
    recoveries = {
        "400 tokens in its vocabulary, the model": {"teacher": str(other), "steps": 2, "length": 16},
        "nowhere.txt": {"data": str(tmp_path / "nowhere.txt"), "steps": 2, "length": 16},
    }
    for said, recovery in recoveries.items():
        with pytest.raises(StructpruneError, match=said):
            structprune.prune(
                llama, tmp_path / "out", "wanda", recover=recovery, opening=Opening(stream=stream), **QUICK
            )
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
