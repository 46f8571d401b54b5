"""A recipe: what a YAML file, `--set` and flags add up to."""

from pathlib import Path

import pytest
import typer
import yaml

import structprune
from structprune.checkpoint.writing import Writing
from structprune.cli import app
from structprune.decide.sparsity import fraction_of
from structprune.errors import UsageError
from structprune.pipeline.methods import describe
from structprune.pruners import catalogue
from structprune.recipe.changes import EVALUATE, GROUPS, RECOVER
from structprune.recipe.flag_keys import FLAG_KEYS
from structprune.recipe.options import EvaluateOptions, sparsity_of
from structprune.recipe.recipe import Recipe, assemble, choose_recipe, load, stage
from structprune.recipe.request import choose_settings, request_recipe
from structprune.storage import strict_yaml
from tests.methods import home, reachable
from tests.seeing import save_rows

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
WANDA = {"model": "demo", "output": "out", "prune": {"method": "wanda", "sparsity": 0.5}}
STAGES = WANDA | {"prune": [{"method": "wanda"}, "magnitude"]}


def test_a_recipe_of_three_keys_has_a_default_for_everything_else():
    recipe = assemble(WANDA)

    (stage,) = recipe.prune
    assert (stage.method(), stage.sparsity, stage.compare) == ("wanda", 0.5, "row")
    assert (recipe.seed, recipe.dtype, recipe.device) == (0, "auto", "auto")
    assert (recipe.calibration.samples, recipe.calibration.length) == (128, None)
    assert recipe.recover is None
    assert recipe.evaluate is None


def test_a_method_offers_only_what_it_accepts():
    offered = {
        (name, row["name"]): (row["type"], row["default"])
        for name in ("wanda", "alps", "thanos", "armor", "flap")
        for row in describe(name)["fields"]
        if row["name"] in ("repair", "budget")
    }

    every = "obs | least_squares | dsnot | none"
    assert offered["wanda", "repair"] == (every, "none")
    assert offered["wanda", "budget"] == ("owl | ramp | table | target_params | uniform", "uniform")
    assert offered["alps", "repair"] == ("none", "none")
    assert offered["thanos", "repair"] == ("least_squares | none", "none")
    assert offered["armor", "budget"] == ("uniform", "uniform")  # N:M fixes every share
    assert offered["flap", "repair"] == ("bias | least_squares | none", "bias")


def test_every_method_has_a_recipe_of_its_name():
    assert set(catalogue.names()) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_says_the_same_to_any_yaml_reader(path):
    assert strict_yaml.read(path)[0] == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_prunes_a_tiny_model(path, llama, tmp_path):
    sets = ["calibration.samples=4", "calibration.length=16", "evaluate.windows=2", "evaluate.length=16"]
    at = home(load(path).prune[0].method())
    if at.images:
        sets = [f"calibration.source={save_rows(tmp_path)}", "calibration.samples=2"]
        few = reachable(load(path).prune[0])
        sets += [f"prune.target.keep_ratio={few['target']['keep_ratio']}"] if few else []
    if load(path).recover is not None:
        sets += [f"recover.teacher={llama}", "recover.steps=2", "recover.check_every=1", "recover.length=16"]
    model = llama if at.family == "llama" else at.save(tmp_path / "model")
    recipe = load(path, sets=sets, flags={"model": str(model), "output": tmp_path / "out"})

    report = structprune.prune(recipe, writing=Writing(reload=False))

    assert report["verification"]["ok"]
    for told in report["stages"]:
        # What a running model computes is counted by a fresh process, which there is none of here.
        assert told["measured"] == (None if at.images else told["reachable"])
        assert told["reachable"] > 0
    if len(recipe.prune) == 1 and told["unit"] == "weights":
        assert report["sparsity"] == told["measured"]
        assert told["measured"] == pytest.approx(float(fraction_of(told["asked"])), abs=0.01)


def test_the_text_of_a_recipe_runs_again(tmp_path):
    recipe = assemble(STAGES, sets=["prune.0.sparsity=2:4", "recover.rank=4", "evaluate.tasks=[a, b]"])
    path = tmp_path / "again.yaml"
    path.write_text(recipe.text())

    assert load(path).model_dump() == recipe.model_dump()
    assert yaml.safe_load(recipe.text())["prune"][0]["sparsity"] == "2:4"


def test_a_file_that_nothing_changed_is_kept_verbatim(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# mine\nmodel: demo\noutput: out\nprune: wanda\n")

    assert load(path).text() == path.read_text()
    assert "# mine" not in load(path, sets=["seed=1"]).text()


def test_flags_win_over_set_which_wins_over_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: demo\noutput: out\nseed: 1\nprune: {method: wanda, sparsity: 0.1}\n")

    assert load(path).prune[0].sparsity == 0.1
    assert load(path, sets=["sparsity=0.2"]).prune[0].sparsity == 0.2
    assert load(path, sets=["sparsity=0.2"], flags={"prune.sparsity": "0.3"}).prune[0].sparsity == 0.3
    assert load(path, flags={"seed": None}).seed == 1


def test_set_reaches_every_part_of_a_recipe():
    sets = ["compare=matrix", "calibration.samples=4", "recover.ranks={down_proj: 2}", "evaluate.text=a.txt"]

    recipe = assemble(WANDA, sets=sets)

    assert recipe.prune[0].compare == "matrix"
    assert recipe.calibration.samples == 4
    assert recipe.recover.ranks == {"down_proj": 2}
    assert recipe.evaluate.text == ("a.txt",)


def test_set_reaches_one_stage_of_several():
    recipe = assemble(STAGES, sets=["prune.1.sparsity=0.7"])

    assert [stage.sparsity for stage in recipe.prune] == [0.5, 0.7]
    with pytest.raises(UsageError, match=r"2 stages"):
        assemble(STAGES, sets=["sparsity=0.7"])
    with pytest.raises(UsageError, match=r"counted from 0"):
        assemble(STAGES, sets=["prune.2.sparsity=0.7"])


def test_a_method_that_draws_takes_over_the_seed_of_the_recipe():
    draws = WANDA | {"seed": 7, "prune": "random"}

    assert assemble(draws).prune[0].seed == 7
    assert assemble(draws, sets=["prune.seed=2"]).prune[0].seed == 2


def test_a_model_and_flags_are_a_recipe_too():
    recipe = choose_recipe("demo", flags={"output": "out", "prune.method": "wanda", "prune.sparsity": "50%"})

    assert recipe == Recipe(model="demo", output="out", prune=catalogue.find("wanda")(sparsity=0.5))
    with pytest.raises(UsageError, match="OUT is missing"):
        choose_recipe("demo", flags={"prune.method": "wanda"})


def evaluating(**given: object) -> EvaluateOptions:
    flags = {f"evaluate.{key}": value for key, value in given.items()}
    return choose_settings(EVALUATE, flags=flags).evaluate or EvaluateOptions()


def test_texts_and_tasks_are_those_that_are_named():
    assert evaluating().text == ()
    assert evaluating(tasks="a, b").tasks == ("a", "b")
    assert evaluating(tasks="a").text == ()


def test_alpha_is_twice_the_rank_unless_given():
    assert choose_settings(RECOVER, flags={"recover.rank": 8}).recover.alpha == 16
    assert choose_settings(RECOVER, sets=["rank=8", "alpha=8"]).recover.alpha == 8


def test_a_path_of_a_recipe_is_the_same_key_in_every_command():
    sets = ["recover.rank=4", "evaluate.windows=3"]

    recipe, recovery = assemble(WANDA, sets=sets), choose_settings(RECOVER, sets=sets)

    assert (recipe.recover.rank, recipe.evaluate.windows) == (4, 3)
    assert (recovery.recover.rank, recovery.evaluate.windows) == (4, 3)
    assert choose_settings(EVALUATE, sets=["evaluate.windows=3"]).evaluate.windows == 3
    assert choose_settings(EVALUATE, sets=["windows=3", "device=cpu"]).evaluate.windows == 3
    assert assemble(WANDA, sets=["samples=4"]).calibration.samples == 4


@pytest.mark.parametrize(
    ("reading", "text", "said"),
    [
        (EVALUATE, "calibration.samples=4", "does not read it"),
        (EVALUATE, "prune.sparsity=0.5", "does not read it"),
        (RECOVER, "model=demo", "does not read it"),
        (EVALUATE, "windos=4", "did you mean 'windows'"),
        (RECOVER, "evaluate.windos=4", "did you mean 'windows'"),
    ],
)
def test_a_path_that_a_command_does_not_read_is_refused(reading, text, said):
    with pytest.raises(UsageError) as raised:
        choose_settings(reading, sets=[text])

    assert said in str(raised.value)


def test_a_short_path_of_a_stage_is_no_key_of_the_calibration():
    for name in catalogue.names():
        assert not catalogue.find(name).model_fields.keys() & GROUPS["calibration"].model_fields.keys(), name


def test_a_recipe_is_the_config_of_every_command(tmp_path):
    path = tmp_path / "mine.yaml"
    text = "model: demo\noutput: out\nprune: wanda\ndevice: cpu\nrecover: {rank: 4}\nevaluate: {windows: 3}\n"
    path.write_text(text)

    measured = choose_settings(EVALUATE, config=path, flags={"evaluate.length": 16})
    assert (measured.evaluate.windows, measured.evaluate.length, measured.device) == (3, 16, "cpu")
    assert choose_settings(RECOVER, config=path).recover.rank == 4
    assert Recipe.of(request_recipe(None, config=path)) == load(path)
    with pytest.raises(UsageError, match="two recipes"):
        request_recipe(str(path), config=path)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, None),
        ({"kind": "unstructured"}, None),
        ({"sparsity": "50%"}, 0.5),
        ({"ratio": 0.5, "kind": "unstructured"}, 0.5),
        ({"ratio": 0.5, "kind": "2:4"}, "2:4"),
        ({"ratio": 0.5, "kind": "4:8"}, "4:8"),
        ({"kind": "2:4"}, "2:4"),
        ({"sparsity": "0.5", "ratio": 0.5}, 0.5),
        ({"ratio": 0.75, "kind": "1:4"}, "1:4"),
    ],
)
def test_the_flags_of_the_papers_say_one_sparsity(flags, expected):
    assert sparsity_of(**flags) == expected


@pytest.mark.parametrize(
    "flags",
    [
        {"ratio": 0.6, "kind": "2:4"},
        {"sparsity": "0.5", "ratio": 0.6},
        # In Wanda's code 1:4 removes one of four; here it keeps one of four.
        {"kind": "1:4"},
        {"ratio": 0.25, "kind": "1:4"},
        {"kind": "structured"},
        {"ratio": 50.0},
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags):
    with pytest.raises(UsageError):
        sparsity_of(**flags)


def test_a_method_describes_itself_from_its_file():
    told = describe("wanda")

    assert told["source"].startswith("Sun et al. 2023")
    assert told["family"] == "weight"
    fields = {row["name"]: row for row in told["fields"]}
    assert fields["compare"]["default"] == "row"
    assert fields["compare"]["type"] == "row | matrix"
    assert all(row["about"] for row in told["fields"])


@pytest.mark.parametrize("method", ["random", "armor"])
def test_a_recipes_seed_is_a_methods_unless_it_says_another(method: str) -> None:
    assert stage({"method": method}, seed=7).model_dump()["seed"] == 7
    assert stage({"method": method, "seed": 3}, seed=7).model_dump()["seed"] == 3


def test_a_key_that_a_repair_does_not_have_is_told_with_those_it_has() -> None:
    with pytest.raises(UsageError, match="unknown key") as raised:
        stage({"method": "wanda", "repair": {"name": "dsnot", "round": 3}})
    assert raised.value.hint == "did you mean 'rounds'?"


def test_the_keys_that_flags_set_are_those_that_the_commands_make_of_them(command, monkeypatch):
    def merge(raw, reading, sets=(), flags=None):
        found.append({key: value for key, value in flags.items() if value is not None})
        raise UsageError("seen", hint="go on")

    monkeypatch.setattr("structprune.recipe.request.merge", merge)
    known, made = typer.main.get_command(app).commands, {}
    values = {"--sparsity-type": "2:4", "--target": "keep_ratio=0.1"}
    for name, places in {"prune": ("demo", "out"), "recover": ("demo", "out"), "evaluate": ("demo",)}.items():
        found: list[dict[str, object]] = []
        command(name, *places)
        for option in (one for one in known[name].params if one.param_type_name == "option"):
            for flag in option.opts:
                value = values.get(flag, "0.5" if "sparsity" in flag else "1")
                command(name, *places, flag, *([] if option.is_flag else [value]))
                if len(found) > 1 and (more := found.pop().keys() - found[0].keys()):
                    made.setdefault(flag.removeprefix("--").replace("-", "_"), more.pop())
    # Two commands have it, each for a key of its own.
    assert made.pop("batch_size") == "recover.batch_size"

    assert {flag: key.partition(":")[0] for flag, key in FLAG_KEYS.items()} == {
        flag: key for flag, key in made.items() if flag != key and len(flag) > 1
    }


def test_nothing_stands_beside_a_recipe_that_says_it_itself(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": "demo", "output": tmp_path / "out", "prune": "magnitude"})
    for more in ({"output": tmp_path / "other"}, {"pruner": "wanda"}, {"sparsity": 0.3}, {"seed": 3}):
        with pytest.raises(UsageError, match=f"{next(iter(more))}: given beside a recipe"):
            structprune.prune(recipe, **more)
    assert not list(tmp_path.iterdir())
