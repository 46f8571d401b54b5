"""Recipes for real sizes: each is forecast on the model's own configuration, without a weight of it."""

import re
from pathlib import Path

import pytest
import yaml

from structprune.calibration.data import positions, window_length
from structprune.checkpoint.modelling import needs_code
from structprune.cli.summary import bytes_text
from structprune.models.cost import parameters_of
from structprune.pipeline.estimate import memory_bytes
from structprune.pruners.demand import Sharing
from structprune.pruners.forecast import Forecast, forecast_all
from structprune.pruners.token._family import TokenPruner
from structprune.recipe.recipe import Recipe, load
from structprune.storage import strict_yaml
from tests.real_sizes import CONFIGS, without_weights

FOLDER = Path(__file__).parents[1] / "recipes" / "models"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def forecast(recipe: Recipe) -> list[Forecast]:
    return forecast_all(recipe.prune, without_weights(recipe.model))


def memory(recipe: Recipe) -> str:
    """Return the peak that `--dry-run` says: streamed, but for what works while a model runs."""
    model, data = without_weights(recipe.model), recipe.calibration
    streamed = not any(one.at_run_time for one in recipe.prune)
    length = window_length(data.length, positions(model.config))
    sharing = Sharing(data.samples, length, data.batch_size, 1, streamed=streamed)
    return bytes_text(memory_bytes(recipe.prune, model, sharing))


def test_every_folder_is_one_of_a_model_and_every_model_has_one():
    folders = {path.parent.name: load(path).model for path in RECIPES}
    assert set(folders.values()) == CONFIGS.keys()
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == folders.keys()
    for folder, model in folders.items():
        assert all(load(path).model == model for path in (FOLDER / folder).glob("*.yaml"))
        assert model.rpartition("/")[2].lower().startswith(folder)


def test_no_two_recipes_write_into_one_folder():
    outputs = [load(path).output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


@each_recipe
def test_a_recipe_names_what_a_hub_has_and_says_whether_it_was_ever_run(path: Path) -> None:
    recipe = load(path)
    assert strict_yaml.read(path)[0] == yaml.safe_load(path.read_text())
    assert re.search(r"^# .*(Never run|Run at this size)", path.read_text(), re.MULTILINE)
    named = [recipe.model]
    if any(one.looks_at_data for one in recipe.prune):
        named.append(recipe.calibration.source)
    if recipe.recover is not None:
        named += [recipe.recover.data, recipe.recover.teacher or recipe.model]
    for name in named:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name)


@each_recipe
def test_the_list_says_what_the_forecast_says(path: Path) -> None:
    recipe = load(path)
    left = forecast(recipe)[-1].left
    link = re.escape(f"]({path.relative_to(FOLDER)})")
    row = re.search(rf"^\| \[.*{link} \|.*$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert row is not None
    said = [cell.strip() for cell in row[0].strip("|").split("|")]
    loader = "structprune, or with trust" if needs_code(left.config) else "anything"
    opens = "structprune, for the saving" if recipe.prune[-1].at_run_time else loader
    assert said[2:] == [f"{parameters_of(left):,}", memory(recipe), opens]


# Worked out by hand from the sizes: what a recipe removes.
LLAMA_ATTENTION, LLAMA_CHANNEL = 2 * 4096 * 4096 + 2 * 1024 * 4096, 3 * 4096
LLAMA_BLOCK = LLAMA_ATTENTION + 14336 * LLAMA_CHANNEL
SMOL_BLOCK = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536
LLAVA_BLOCK = 4 * 4096 * 4096 + 3 * 4096 * 11008
QWEN3_BLOCK = LLAMA_ATTENTION + 3 * 4096 * 12288
MIXTURE_EXPERT = 3 * 768 * 2048
MIXTURE_ATTENTION = 2 * 4096 * 2048 + 2 * 512 * 2048
REMOVED = {
    "llama-3.1-8b/wanda_2_4": 32 * LLAMA_BLOCK // 2,
    "llama-3.1-8b/sparsegpt_recover": 32 * LLAMA_BLOCK // 2,
    "llama-3.1-8b/cfsp_plain": 32 * (14336 - 11520) * LLAMA_CHANNEL,
    "llama-3.1-8b/block_drop": 8 * (LLAMA_BLOCK + 2 * 4096),  # with its two norms
    "qwen3-8b/wanda_owl": round(0.6 * 36 * QWEN3_BLOCK),
    "qwen3-8b/attention_skip": 9 * (LLAMA_ATTENTION + 2 * 128),  # with the norms of its queries and keys
    "smollm2-135m/sparsegpt_2_4": 30 * SMOL_BLOCK // 2,
    "smollm2-135m/wanda_recover": 30 * SMOL_BLOCK // 2,
    "smollm2-135m/block_drop": 6 * (SMOL_BLOCK + 2 * 576),
    "qwen3-30b-a3b/expert_drop": 48 * 32 * (MIXTURE_EXPERT + 2048),  # with its row of the router
    "qwen3-30b-a3b/wanda_2_4": 48 * (MIXTURE_ATTENTION + 128 * MIXTURE_EXPERT) // 2,
    "llava-1.5-7b/wanda_divprune": 32 * LLAVA_BLOCK // 2,
    # Pairs of a visual token and a block.
    "llava-1.5-7b/divprune": 32 * (576 - 64),
    "llava-1.5-7b/pyramiddrop": 8 * (288 + 432 + 504),
}


@pytest.mark.parametrize("name", REMOVED)
def test_what_leaves_is_what_was_worked_out_by_hand(name: str) -> None:
    first = forecast(load(FOLDER / f"{name}.yaml"))[0]
    assert first.exact
    assert first.reachable is not None
    # Whole weights of a row: at most one of each leaves less than was asked.
    rows = 1e-6 * REMOVED[name] if name == "qwen3-8b/wanda_owl" else 0
    assert abs(first.reachable - REMOVED[name]) <= rows


@pytest.mark.parametrize(
    ("name", "left"), [("divprune", [250] * 28), ("quality_dpp", [1000] * 2 + [110] * 26)]
)
def test_of_an_image_of_any_size_the_same_share_stays(name: str, left: list[int]) -> None:
    recipe = load(FOLDER / "qwen2.5-vl-7b" / f"{name}.yaml")
    (pruner,) = recipe.prune
    assert isinstance(pruner, TokenPruner)
    assert forecast(recipe)[0].reachable is None
    assert pruner.counts(without_weights(recipe.model), 1000) == [(one, one) for one in left]
