"""Recovery of a pruned folder: its plans are its masks, and what is written holds them to the last weight."""

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

import structprune
from structprune.checkpoint.writing import Writing
from structprune.cli.summary import recovery_lines
from structprune.errors import EnvironmentFailure, InputError, Interrupted, QualityError
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.progress import Progress, silent
from structprune.pruners.catalogue import find
from structprune.recipe.recipe import EvaluateOptions, RecoverOptions
from tests.tiny import save_tiny

EVALUATION = EvaluateOptions(text=("demo",), windows=2, length=32, generations=False)
CPU = Opening(device="cpu")
TEXT = "".join(f"{number} follows {number - 1}, and {number + 1} comes next. " for number in range(1, 400))
TRAINING: dict[str, Any] = {"steps": 24, "check_every": 8, "length": 32, "learning_rate": 1e-2, "rank": 4}


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    """Return where each parameter of a folder is zero."""
    model = open_model(folder)
    return {name: value.detach() == 0 for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    source = save_tiny("llama", folder / "dense", dtype=torch.bfloat16)
    (folder / "text.txt").write_text(TEXT)
    structprune.prune(
        source,
        folder / "pruned",
        find("wanda")(sparsity="2:4"),
        calibration={"samples": 6, "length": 32},
        evaluate=EVALUATION,
        writing=Writing(reload=False),
    )
    return folder


def recover(
    pruned: Path, output: Path, *, progress: Progress = silent, restart: bool = False, **training: Any
) -> dict[str, Any]:
    options = RecoverOptions(data=str(pruned / "text.txt"), **TRAINING | training)
    return structprune.recover(
        str(pruned / "pruned"),
        output,
        options,
        opening=CPU,
        evaluate=EVALUATION,
        writing=Writing(reload=False, restart=restart),
        progress=progress,
    )


def stop_at(step: int) -> Progress:
    """Stop a run when it has taken so many steps of the training."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "recover" and done == step:
            raise Interrupted(signal.SIGTERM)

    return stop


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file that holds tensors, by its name in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_recovery_lowers_the_held_out_loss_and_moves_no_zero(pruned: Path, tmp_path: Path) -> None:
    report = recover(pruned, tmp_path / "out")
    assert report["recovery"]["best_loss"] < report["recovery"]["start_loss"]
    assert report["recovery"]["masks"] == "plans"
    assert report["sparsity"] == 0.5 and report["pattern"] == "2:4"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "6 samples of 32 tokens from `demo`" in card
    assert f"Then trained on {report['recovery']['data']['windows']} windows of 32 tokens from `" in card
    assert "weights only" not in card
    assert "Trained after pruning: the loss on held-out text went from" in card
    assert "run `structprune recover recipe.yaml`" in card
    before, after = zeros(pruned / "pruned"), zeros(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    weights = [(tmp_path / "out" / "model.safetensors"), (pruned / "pruned" / "model.safetensors")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    checked = structprune.verify(tmp_path / "out", str(pruned / "pruned"))
    assert checked["ok"], checked["checks"]


def test_a_kept_adapter_opens_to_the_weights_that_merging_writes(pruned: Path, tmp_path: Path) -> None:
    recover(pruned, tmp_path / "merged")
    report = recover(pruned, tmp_path / "adapter", keep_adapter=True)
    assert report["adapter"]["base"] == str(pruned / "pruned")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    merged, _ = structprune.load(tmp_path / "merged")
    opened, tokenizer = structprune.load(tmp_path / "adapter")
    assert tokenizer is not None
    for (name, one), other in zip(merged.named_parameters(), opened.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_an_adapter_whose_base_has_changed_is_refused(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned / "pruned", tmp_path / "base")
    options = RecoverOptions(data=str(pruned / "text.txt"), keep_adapter=True, **TRAINING)
    structprune.recover(
        str(tmp_path / "base"), tmp_path / "adapter", options, opening=CPU, evaluate=EVALUATION
    )
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match="is not there"):
        structprune.load(tmp_path / "adapter")
    save_tiny("llama", tmp_path / "base", seed=3, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="trained on weights"):
        structprune.load(tmp_path / "adapter")


def test_a_teacher_of_other_tokens_is_refused_as_a_teacher(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the teacher has \d+ tokens in its vocabulary, the model \d+"):
        recover(pruned, tmp_path / "out", teacher="demo")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_when_nothing_beats_the_start(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError):
        # A step far below what bfloat16 can hold changes nothing, so nothing can be better.
        recover(pruned, tmp_path / "out", learning_rate=1e-12, steps=4, check_every=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep_adapter", [False, True], ids=["merged", "adapter"])
def test_an_interrupted_recovery_resumes_with_the_same_bytes(
    pruned: Path, tmp_path: Path, keep_adapter: bool
) -> None:
    recover(pruned, tmp_path / "whole", keep_adapter=keep_adapter)
    with pytest.raises(Interrupted):
        recover(pruned, tmp_path / "out", keep_adapter=keep_adapter, progress=stop_at(20))
    assert not (tmp_path / "out").exists()
    report = recover(pruned, tmp_path / "out", keep_adapter=keep_adapter)
    assert report["recovery"]["steps_resumed"] == 16
    assert "after 16 steps" in recovery_lines(report)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_less_memory_goes_on_where_the_memory_ran_out_and_gives_the_same_bytes(
    pruned: Path, tmp_path: Path
) -> None:
    recover(pruned, tmp_path / "whole")
    with pytest.raises(Interrupted):
        recover(pruned, tmp_path / "out", progress=stop_at(20))
    report = recover(pruned, tmp_path / "out", gradient_checkpointing=True)
    assert report["recovery"]["steps_resumed"] == 16
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert "gradient_checkpointing: true" in (tmp_path / "out/structprune/recipe.yaml").read_text()


def test_a_run_killed_after_its_training_trains_no_step_again(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recover(pruned, tmp_path / "whole")

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("structprune.pipeline.finish.measure", stop)
        with pytest.raises(Interrupted):
            recover(pruned, tmp_path / "out")
    taken: list[int] = []
    recover(
        pruned,
        tmp_path / "out",
        progress=lambda stage, done, total: taken.append(done) if stage == "recover" else None,
    )
    assert taken == []
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_recovery_with_other_options_does_not_go_on_from_this_state(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        recover(pruned, tmp_path / "out", progress=stop_at(20))
    with pytest.raises(EnvironmentFailure, match=r"differs in .*recover\.seed"):
        recover(pruned, tmp_path / "out", seed=1)
    report = recover(pruned, tmp_path / "out", seed=1, restart=True)
    assert report["recovery"]["steps_resumed"] == 0


@pytest.mark.slow
def test_a_damaged_state_is_refused_until_it_is_forgotten(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        recover(pruned, tmp_path / "out", progress=stop_at(20))
    (state,) = tmp_path.glob("out.partial-*/structprune/training/state-*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(InputError, match=state.name) as refused:
        recover(pruned, tmp_path / "out")
    assert "--restart" in refused.value.hint
    assert recover(pruned, tmp_path / "out", restart=True)["recovery"]["steps_resumed"] == 0


@pytest.mark.slow
def test_a_recovery_killed_for_good_resumes_from_the_command_line(pruned: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "structprune", "recover", str(pruned / "pruned"), str(tmp_path / "out")]
    command += ["--data", str(pruned / "text.txt"), "--device", "cpu", "--json", "--steps", "60"]
    changes = {"length": 32, "rank": 4, "learning_rate": 1e-2, "check_every": 2}
    command += [f"--set={name}={value}" for name, value in changes.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **quiet) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if list(tmp_path.glob("out.partial-*/structprune/training/state.json")):
                process.kill()
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["recovery"]["steps_resumed"] >= 2
    recover(pruned, tmp_path / "whole", steps=60, **changes)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_a_recipe_that_prunes_and_recovers_resumes_its_recovery(pruned: Path, tmp_path: Path) -> None:
    def run(output: str, progress: Progress = silent) -> dict[str, Any]:
        return structprune.prune(
            pruned / "dense",
            tmp_path / output,
            find("wanda")(sparsity="2:4"),
            calibration={"samples": 6, "length": 32},
            recover={"data": str(pruned / "text.txt"), "teacher": str(pruned / "dense"), **TRAINING},
            evaluate=EVALUATION,
            opening=CPU,
            writing=Writing(reload=False),
            progress=progress,
        )

    run("whole")
    with pytest.raises(Interrupted):
        run("out", stop_at(20))
    assert run("out")["recovery"]["steps_resumed"] == 16
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


LAUNCHED = """
import signal, sys
import tests.test_pipeline_recover as here

out, stopped_at, batch = here.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
here.recover(here.Path(sys.argv[1]), out, progress=here.stop_at(stopped_at), batch_size=batch)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_resume_together_with_the_same_bytes(
    pruned: Path, tmp_path: Path, count: int
) -> None:
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED)
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", str(program)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[1])}

    def run(output: str, stopped_at: int) -> int:
        arguments = [str(pruned), str(tmp_path / output), str(stopped_at), str(2 * count)]
        return subprocess.run([*launch, *arguments], env=environment, check=False).returncode

    never = 0
    assert run("whole", never) == 0
    assert run("out", 13) != 0
    assert len(list(tmp_path.glob("out.partial-*/structprune/training/state-00000008.safetensors"))) == 1
    assert run("out", never) == 0
    assert (
        json.loads((tmp_path / "out/structprune/report.json").read_text())["recovery"]["steps_resumed"] == 8
    )
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
