"""A new family is one file on the path of `structprune.pruners` and a recipe: nothing else learns of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import structprune
from structprune import pruners
from structprune.errors import UsageError
from structprune.models.identity import architecture_of, names_of
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.pruners.catalogue import find, names
from structprune.pruners.forecast import forecast_all
from structprune.recipe.recipe import load
from tests.conftest import Command
from tests.methods import short_runs
from tests.tiny import GROUPED, randomise, tokenizer, tokens

TOYS = Path(__file__).parent / "toy_pruners"
METHOD = "drop_attention_bias"
# q and o have 64 outputs, k and v 32, in two blocks.
BIASES = 2 * (64 + 32 + 32 + 64)


@pytest.fixture(autouse=True)
def on_the_path() -> Iterator[None]:
    pruners.__path__.append(str(TOYS))
    try:
        with short_runs():
            yield
    finally:
        pruners.__path__.remove(str(TOYS))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("biased") / "llama"
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, attention_bias=True))
    randomise(model, 0)
    model.eval().save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in found for name, tensor in file.items()}


def stages_of(second: bool) -> list[dict[str, object]]:
    toy: dict[str, object] = {"method": METHOD}
    return [{"method": "wanda", "sparsity": 0.5}, toy] if second else [toy]


def test_it_is_listed_and_described_like_any_other(command: Command) -> None:
    assert names()[METHOD] == "bias"
    assert find(METHOD).method() == METHOD
    shown = command("methods", METHOD, "--json").json
    assert (shown["family"], [field["name"] for field in shown["fields"]]) == ("bias", ["amount"])


@pytest.mark.parametrize(
    "stream", [pytest.param(False, marks=pytest.mark.slow), True], ids=["resident", "streamed"]
)
@pytest.mark.parametrize(
    "second", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "after wanda"]
)
class TestRuns:
    def test_prune_apply_verify_report_card_and_plain_transformers(
        self, stream: bool, second: bool, source: Path, tmp_path: Path, command: Command
    ) -> None:
        way = "--stream" if stream else "--resident"
        recipe = tmp_path / "toy.yaml"
        calibration = {"source": str(source / "text.txt"), "samples": 4, "length": 16}
        (source / "text.txt").write_text("A line of text that is long enough to be read. " * 40)
        content = {"model": str(source), "output": str(tmp_path / "out"), "prune": stages_of(second)}
        recipe.write_text(json.dumps(content | {"calibration": calibration}))
        planned = command("prune", recipe, "--dry-run", way, "--json").json
        report = command("prune", recipe, way, "--json").json
        out = tmp_path / "out"
        # report: the goal in its own unit, measured from the files
        goal = report["stages"][-1]
        assert (goal["unit"], goal["asked"], goal["reachable"], goal["measured"]) == (
            "parameters",
            1,
            1.0,
            1.0,
        )
        assert report["parameters"]["dense"] - report["parameters"]["pruned"] == BIASES
        # forecast: exactly what was written
        assert planned["parameters"]["pruned"] == report["parameters"]["pruned"]
        assert planned["bytes"]["pruned"] == report["bytes"]["pruned"]
        # files: biases gone, config patched, all else as it was
        assert json.loads((out / "config.json").read_text())["attention_bias"] is False
        before, after = weights(source), weights(out)
        assert before.keys() - after.keys() == {name for name in before if name.endswith("_proj.bias")}
        if not second:
            assert all(torch.equal(value, before[name]) for name, value in after.items())
        card = (out / "README.md").read_text()
        assert f"| {METHOD} | prunable parameters |" in card
        assert f"{BIASES:,} parameters fewer" in card
        assert ("stored as zeros" in card) == second
        # apply: the same bytes from the plan
        applied = command("apply", source, tmp_path / "applied", "--plan", out, way, "--json").json
        assert applied["verification"]["ok"]
        assert all(torch.equal(value, after[name]) for name, value in weights(tmp_path / "applied").items())
        # verify, and transformers without structprune's classes
        assert command("verify", out, "--against", source).code == 0
        plain = AutoModelForCausalLM.from_pretrained(out)
        assert AutoConfig.from_pretrained(out).attention_bias is False
        assert plain.model.layers[0].self_attn.q_proj.bias is None
        ours, _ = structprune.load(out)
        probe = tokens(plain)
        assert torch.equal(plain(**probe).logits, ours(**probe).logits)


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
def test_applied_to_a_model_it_leaves_modules_names_and_config_without_biases(
    stream: bool, source: Path
) -> None:
    model = open_model(source, Opening(stream=stream))
    toy = find(METHOD)()
    toy.apply(model, toy.calibrate(model, []))
    assert not any(name.endswith("_proj.bias") for name in names_of(model).module_of)
    assert not model.config.attention_bias
    assert toy.forecast(model).of == 0


def test_a_resident_and_a_streamed_model_agree_on_what_they_have_become(source: Path) -> None:
    toy = find(METHOD)()
    models = [open_model(source, Opening(stream=stream)) for stream in (False, True)]
    for model in models:
        toy.apply(model, toy.calibrate(model, []))
    reopened = forecast_all([toy], open_model(source, Opening(stream=True)))[0].left
    assert len({architecture_of(model) for model in (*models, reopened)}) == 1
    assert models[0].state_dict().keys() == models[1].skeleton.state_dict().keys()


@pytest.mark.slow
def test_several_amounts_each_get_a_folder(source: Path, tmp_path: Path) -> None:
    recipe = load(TOYS / f"{METHOD}.yaml", flags={"model": str(source), "output": str(tmp_path / "out")})
    runs = structprune.prune_each(recipe, [0, 1])["runs"]
    sizes = {goal: run["parameters"]["dense"] - run["parameters"]["pruned"] for goal, run in runs.items()}
    assert sizes == {"0": 0, "1": BIASES}
    assert (tmp_path / "out" / "1" / "config.json").is_file()


def test_no_file_of_the_package_names_it() -> None:
    package = Path(structprune.__file__).parent
    assert not [path for path in package.rglob("*.py") if METHOD in path.read_text(encoding="utf-8")]


def test_an_unknown_method_is_told_where_methods_are_looked_for() -> None:
    with pytest.raises(UsageError, match="'rootwanda' does not exist") as refused:
        find("rootwanda")
    assert f"in {Path(pruners.__file__).parent}/*/ and {TOYS}/*/" in refused.value.message
    assert refused.value.hint.startswith("did you mean 'wanda'?; one of your own: STRUCTPRUNE_METHODS=FOLDER")
