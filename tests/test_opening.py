"""How a model is opened and a result written: values that every command passes on whole."""

import json
import logging
from pathlib import Path

import pytest

import structprune
from structprune.cli.terminal import logging_to_stderr
from structprune.errors import EnvironmentFailure, UsageError
from structprune.models import opening
from structprune.models.opening import Opening
from tests.conftest import Command
from tests.methods import CALIBRATION, QUICK
from tests.tiny import LENGTH, save_tiny

MEASURED = ("--text", "demo", "--windows", 1, "--length", LENGTH, "--set", "generations=false")
PRUNED = ("--method", "magnitude", "--sparsity", "2:4", "--set", "evaluate.windows=1")


def links_to(real: Path, folder: Path) -> Path:
    """Return a folder whose files are links into another one."""
    for path in real.rglob("*"):
        if path.is_file():
            link = folder / path.relative_to(real)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return folder


def test_a_model_is_streamed_where_two_and_a_half_of_it_are_more_than_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "available_memory", lambda: 250)
    assert not Opening().streams(100)
    assert Opening().streams(101)
    assert Opening(stream=True).streams(1)
    assert not Opening(stream=False).streams(101)


def test_an_opening_of_one_model_leaves_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "devices", lambda: ["cpu", "cuda", "cuda:0"])
    assert Opening(stream=True).resolve(Path("model"), 1) == Opening(stream=True, device="cuda")
    assert Opening(stream=True, device="cpu").resolve(Path("model"), 1).device == "cpu"


@pytest.mark.parametrize("unknown", [{"dtype": "int8"}, {"device": "gpu"}, {"device": "meta"}])
def test_an_unknown_dtype_or_device_is_refused(unknown: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"is not known"):
        Opening(**unknown)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_every_command_says_which_devices_there_are_when_the_asked_one_is_not(
    device: str, command: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "devices", lambda: ["cpu", "cuda:0"])
    asked = ("--device", device)
    for words in (
        ("prune", llama, tmp_path / "out", "--method", "magnitude", *asked),
        ("prune", llama, tmp_path / "out", "--method", "magnitude", "--dry-run", *asked),
        ("evaluate", llama, *asked),
        ("recover", llama, tmp_path / "out", "--data", "demo", "--steps", 1, *asked),
    ):
        refused = command(*words, "--json")
        assert refused.code == 4, words
        assert refused.json["error"]["message"].endswith(
            f"{device!r} is not there: this machine has cpu, cuda:0"
        )
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(EnvironmentFailure, match="is not there"):
        structprune.load(llama, Opening(device=device))


def test_every_command_follows_links_out_of_a_model_only_when_told(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fresh processes would take most of the time here.
    monkeypatch.setattr("structprune.proof.reloading.check_reload", lambda *_: None)
    save_tiny("llama", tmp_path / "real")
    model = links_to(tmp_path / "real", tmp_path / "model")
    allowed = "--allow-external-symlinks"
    out, plan = tmp_path / "out", ("--plan", tmp_path / "out")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 60)
    assert command("prune", model, out, *PRUNED, allowed).code == 0
    assert not any(path.is_symlink() for path in out.rglob("*"))
    pruned = links_to(out, tmp_path / "pruned")
    training = ("--data", tmp_path / "text.txt", "--steps", 2, "--length", 16, "--set", "check_every=1")
    lines = {
        "inspect": (model,),
        "dry run": ("prune", model, tmp_path / "never", *PRUNED, "--dry-run"),
        "apply": (model, tmp_path / "again", *plan),
        "verify": (out, "--against", model),
        "evaluate": (model, *MEASURED),
        "verify links": ("verify", pruned),
        "export": (pruned, tmp_path / "packed", "--to", "2:4"),
        "recover": (pruned, tmp_path / "recovered", *training, "--learning-rate", "1e-2"),
    }
    for name, words in lines.items():
        line = words if " " in name else (name, *words)
        refused = command(*line)
        assert refused.code in (3, 6) and f"pass {allowed}" in refused.err, (name, refused.err)
        done = command(*line, allowed)
        assert done.code == 0, (name, done.err)
    packed = links_to(tmp_path / "packed", tmp_path / "linked")
    line = ("export", packed, tmp_path / "back", "--to", "dense")
    assert command(*line).code == 3
    assert command(*line, allowed).code == 0


def test_dtype_and_device_of_a_run_are_those_of_its_recipe(llama: Path, tmp_path: Path) -> None:
    recipe = structprune.Recipe.model_validate(
        {"model": str(llama), "output": tmp_path / "out", "prune": "magnitude", "dtype": "float32"}
    )
    assert recipe.opening(Opening(stream=True)) == Opening(dtype="float32", stream=True)
    assert recipe.opening(Opening(dtype="float32")) == Opening(dtype="float32")
    for asked in (Opening(dtype="bfloat16"), Opening(device="cpu")):
        with pytest.raises(UsageError, match="differs from the recipe's"):
            structprune.prune(recipe, opening=asked)
    report = structprune.prune(
        llama, tmp_path / "out", "magnitude", opening=Opening(dtype="float32", device="cpu"), **QUICK
    )
    saved = (tmp_path / "out" / "structprune" / "recipe.yaml").read_text()
    assert "dtype: float32" in saved and "device: cpu" in saved
    assert report["verification"]["ok"]


def test_a_recovery_draws_with_the_seed_of_its_recipe_unless_it_has_its_own(tmp_path: Path) -> None:
    base = {"model": "demo", "output": tmp_path, "prune": "magnitude", "calibration": CALIBRATION, "seed": 7}
    for given, seed in (({"steps": 3}, 7), ({"seed": 2}, 2), (structprune.RecoverOptions(steps=3), 7)):
        recipe = structprune.Recipe.model_validate(base | {"recover": given})
        assert recipe.recover is not None and recipe.recover.seed == seed


def test_a_warning_is_said_once_per_run(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("structprune.anything")
    for _ in range(2):
        with logging_to_stderr():
            log.warning("%s: mixed dtypes", "folder")
            log.warning("folder: mixed dtypes")
            log.warning("folder: something else")
            for folder in (Path("source"), Path("out.partial-0")):
                log.warning("%s: the private key %r is ignored", folder, "_key")
    assert capsys.readouterr().err.splitlines() == 2 * [
        "warning: folder: mixed dtypes",
        "warning: folder: something else",
        "warning: source: the private key '_key' is ignored",
    ]


def test_a_run_says_once_that_a_private_key_is_ignored(command: Command, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"_mine": 1}))
    done = command("prune", source, tmp_path / "out", *PRUNED)
    said = [line for line in done.err.splitlines() if "private key '_mine'" in line]
    assert done.code == 0 and len(said) == len(set(said))
    assert [line for line in said if f"{source}/" in line] == [
        f"warning: {source}/config.json: the private key '_mine' is ignored"
    ]
