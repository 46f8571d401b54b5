"""A saved recipe runs again from any folder, though it is kept as it was written."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from structprune.checkpoint.delivery import command_again
from structprune.recipe.places import places_text, with_places
from structprune.recipe.request import read_recipe
from tests.conftest import Command
from tests.tiny import save_tiny, tokenizer


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer().save_pretrained(save_tiny("llama", tmp_path / "model"))
    (tmp_path / "text.txt").write_text("A line of text that is long enough to be read. " * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "sweep"])
def test_a_saved_recipe_runs_again_from_another_folder(
    several: bool, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "r.yaml").write_text(
        "model: model\noutput: out\nprune: {method: wanda}\n"
        "calibration: {source: text.txt, samples: 4, length: 16}\nevaluate: {text: [text.txt], length: 16}\n"
    )
    assert command("prune", "r.yaml", *(["--sparsity", "0.3,0.5"] if several else [])).code == 0
    out = place / "out" / "0.5" if several else place / "out"
    saved = out / "structprune" / "recipe.yaml"
    if not several:
        assert saved.read_bytes() == (place / "r.yaml").read_bytes()
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    again = command("prune", saved, "new")
    assert again.code == 0, again.err
    one, other = (load_file(folder / "model.safetensors") for folder in (out, Path("new")))
    assert all((value == other[name]).all() for name, value in one.items())
    assert command("verify", "new").code == 0


@pytest.mark.slow
def test_two_runs_of_a_recipe_in_two_folders_have_the_same_manifest(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "model", place / "b" / "model")
    found = []
    for folder in (place, place / "b"):
        monkeypatch.chdir(folder)
        assert command("prune", "model", "out", "--method", "magnitude").code == 0
        files = json.loads((folder / "out" / "structprune.json").read_text())["files"]
        assert "structprune/run.json" not in files
        found.append({name: one["sha256"] for name, one in files.items() if name.endswith(".safetensors")})
    assert found[0] == found[1]


def test_what_is_no_file_here_is_the_same_everywhere(place: Path) -> None:
    raw = {"model": "owner/name", "calibration": {"source": "wikitext"}, "evaluate": {"text": ["demo"]}}
    assert not any(json.loads(places_text(raw))["places"].values())


def test_a_recipe_that_was_edited_is_read_as_it_stands(place: Path) -> None:
    (place / "run.json").write_text(places_text({"model": "model"}))
    assert with_places({"model": "model"}, place / "recipe.yaml")["model"] == str(place / "model")
    assert with_places({"model": "other"}, place / "recipe.yaml")["model"] == "other"


def test_a_recipe_alone_stays_as_it_is(place: Path) -> None:
    (place / "r.yaml").write_text("model: model\noutput: out\nprune: {method: magnitude}\n")
    assert read_recipe(place / "r.yaml")[0]["model"] == "model"


def same_weights(one: Path, other: Path) -> bool:
    files = [
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in (one, other)
    ]
    return bool(files[0]) and files[0] == files[1]


@pytest.fixture
def pruned(place: Path, command: Command) -> Path:
    assert command("prune", "model", "pruned", "--method", "magnitude").code == 0
    return place / "pruned"


@pytest.mark.slow
def test_what_was_applied_is_applied_again_from_another_folder(
    pruned: Path, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("apply", "model", "out", "--plan", "pruned").code == 0
    assert command("verify", "out").code == 0
    saved = place / "out" / "structprune" / "recipe.yaml"
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    again = command("apply", saved, "new")
    assert again.code == 0, again.err
    assert same_weights(place / "out", Path("new"))
    other = command("prune", saved, "third")
    assert other.code == 2 and f"structprune apply {saved}" in other.err


@pytest.mark.parametrize(
    "more",
    [pytest.param((), marks=pytest.mark.slow), pytest.param(("--keep-adapter",), marks=pytest.mark.slow)],
    ids=["merged", "adapter"],
)
def test_a_recovery_runs_again_from_another_folder(
    more: tuple[str, ...], pruned: Path, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ("--data", "text.txt", "--steps", "4", "--length", "16", "--learning-rate", "1e-3")
    sets = ("--set", "check_every=2", "--set", "evaluate.text=text.txt", "--set", "evaluate.length=16")
    done = command("recover", "pruned", "out", *training, *sets, *more)
    assert done.code == 0, done.err
    assert command("verify", "out").code == 0
    saved = place / "out" / "structprune" / "recipe.yaml"
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    again = command("recover", saved, "new")
    assert again.code == 0, again.err
    assert same_weights(place / "out", Path("new"))
    other = command("apply", saved, "third")
    assert other.code == 2 and f"structprune recover {saved}" in other.err


@pytest.mark.slow
def test_a_run_with_a_recovery_keeps_the_recipe_of_the_whole(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "r.yaml").write_text(
        "model: model\noutput: out\nprune: {method: magnitude}\n"
        "recover: {data: text.txt, steps: 4, length: 16, check_every: 2, learning_rate: 1e-3}\n"
        "evaluate: {text: [text.txt], length: 16}\n"
    )
    assert command("prune", "r.yaml").code == 0
    saved = place / "out" / "structprune" / "recipe.yaml"
    assert saved.read_bytes() == (place / "r.yaml").read_bytes()
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    again = command("prune", saved, "new")
    assert again.code == 0, again.err
    assert same_weights(place / "out", Path("new"))


def test_a_recipe_of_another_command_is_refused_by_name(place: Path, command: Command) -> None:
    (place / "r.yaml").write_text("model: model\noutput: out\nprune: {method: magnitude}\n")
    for other in ("apply", "recover"):
        done = command(other, "r.yaml", "out")
        assert done.code == 2 and "structprune prune r.yaml" in done.err


def test_an_interrupted_recovery_is_ended_by_its_own_command(pruned: Path, place: Path) -> None:
    for name in ("apply", "prune", "recover"):
        (pruned / "structprune" / "run.json").write_text(json.dumps({"command": name, "places": {}}))
        assert command_again(pruned) == f"structprune {name} {pruned / 'structprune' / 'recipe.yaml'}"
    for text in ("{", "[]", '{"command": "rm"}'):
        (pruned / "structprune" / "run.json").write_text(text)
        assert command_again(pruned) == ""
