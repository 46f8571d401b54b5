"""Lists of stages in which units leave: every way to run them gives one result, and the result is a model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.checkpoint.plans import plans_of
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from tests.forks import Parent, Stop
from tests.specimens import CHECKS, TEXT, TRAINING, no_fresh_process, result_of, run
from tests.test_models_shapes import plain
from tests.tiny import save_tiny, tokens

DEPTH = 4
ARMOR = {"method": "armor", "sparsity": "2:4", "wrapper_size": 8, "rounds": 1}


@dataclass(frozen=True)
class Stages:
    """A list of stages, and the family of the model that goes through it."""

    prune: Sequence[dict[str, Any]]
    family: str = "llama"


DROP: dict[str, Any] = {"method": "block_drop", "count": 1}
LISTS = {
    "block_drop, wanda": Stages([DROP, {"method": "wanda", "sparsity": "2:4"}]),
    "sparsegpt, block_drop": Stages([{"method": "sparsegpt", "sparsity": 0.5}, DROP]),
    "flap, sparsegpt": Stages([{"method": "flap", "sparsity": 0.3}, {"method": "sparsegpt"}]),
    "armor, magnitude": Stages([ARMOR, {"method": "magnitude", "sparsity": "1:4", "include": ["core"]}]),
    "expert_drop, wanda": Stages(
        [{"method": "expert_drop", "sparsity": 0.5}, {"method": "wanda"}], "mixtral"
    ),
    "attention_skip, wanda": Stages(
        [{"method": "attention_skip", "drop": "0"}, {"method": "wanda", "sparsity": "2:4"}]
    ),
    "cfsp, block_drop": Stages([{"method": "cfsp", "sparsity": 0.3}, DROP]),
    "block_drop, flap, wanda": Stages([DROP, {"method": "flap", "sparsity": 0.3}, {"method": "wanda"}]),
    "block_drop, block_drop, expert_drop": Stages(
        [DROP, {"method": "block_drop", "drop": "1"}, {"method": "expert_drop", "sparsity": 0.5}], "qwen2_moe"
    ),
}
QUICK = {"block_drop, wanda", "flap, sparsegpt", "expert_drop, wanda"}
CASES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name.replace(", ", "-"))
    for name in LISTS
]


def write_recipe(folder: Path, stages: Stages) -> Path:
    """Write a model of four blocks, a text and a recipe; return the folder."""
    folder.mkdir()
    save_tiny(stages.family, folder / "model", shards=2, dtype=torch.bfloat16, depth=DEPTH)
    text = folder / "text.txt"
    text.write_text(TEXT)
    recipe = {
        "model": str(folder / "model"),
        "output": "out",
        "prune": list(stages.prune),
        "calibration": {"source": str(text), "samples": 2, "length": 16},
        "evaluate": {"text": [str(text)], "windows": 1, "length": 16, "generations": False},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_streamed_resident_and_killed_runs_give_one_result_which_recovers_and_opens(
    name: str, parent: Parent, tmp_path: Path
) -> None:
    stages = LISTS[name]
    home = write_recipe(tmp_path / "home", stages)
    words = ["prune", home / "recipe.yaml", "--json"]
    made = {}
    for way in ("--resident", "--stream"):
        (place := tmp_path / way).mkdir()
        ended = parent.run([*words, way], place)
        assert ended.code == 0, ended.err
        made[way] = ended, result_of(place)
    resident = made["--resident"][1]
    assert made["--stream"][1] == resident

    told = [line.partition(":")[0] for line in made["--stream"][0].err.splitlines()]
    walks = [one for one in dict.fromkeys(told) if one.startswith(("calibrate ", "decide "))]
    for number, walk in enumerate(walks):
        said = [at for at, one in enumerate(told, 1) if one == walk]
        (place := tmp_path / f"killed{number}").mkdir()
        killed = parent.run([*words, "--stream"], place, Stop("line", said[1]))
        assert killed.code == -9, killed.err
        finished = parent.run([*words, "--stream"], place)
        assert finished.code == 0, finished.err
        assert json.loads(finished.out)["blocks_resumed"] > number * DEPTH
        assert result_of(place) == resident

    assert len(walks) == len(stages.prune)
    out, recovered = tmp_path / "--stream" / "out", tmp_path / "recovered"
    check(out, home / "model", len(stages.prune))
    trained = ["recover", out, recovered, "--data", home / "text.txt", *TRAINING, *CHECKS, "--steps", 2]
    with no_fresh_process():
        done = run(*trained, "--json")
    assert done.code == 0, done.err
    before, after = (json.loads(one.out)["stages"] for one in (made["--stream"][0], done))
    assert [stage["measured"] for stage in after] == [stage["measured"] for stage in before]
    assert all(stage["measured"] for stage in after)
    check(recovered, home / "model", len(stages.prune))


def check(out: Path, source: Path, stages: int) -> None:
    """Check that a folder is what its plans say, and computes the same in plain transformers."""
    with no_fresh_process():
        verified = run("verify", out, "--against", source, "--json")
    assert verified.code == 0, verified.out
    assert len(plans_of(out)) == stages
    trust = "auto_map" in json.loads((out / "config.json").read_text())
    model = plain(out, trust=trust)
    prompt = tokens(model, length=10)
    mask = torch.ones_like(prompt["input_ids"])
    mask[0, :5] = 0
    data = prompt | {"attention_mask": mask}
    ours = logits(open_model(out, Opening(dtype="float32")), data)
    with torch.no_grad():
        theirs = logits(model, data)
    assert torch.equal(theirs, ours)
    assert theirs.isfinite().all()
    cached, whole = (generated(model, data, cache=cache) for cache in (True, False))
    assert (cached - whole).abs().max() < 1e-4


def generated(model: PreTrainedModel, data: dict[str, Tensor], *, cache: bool) -> Tensor:
    """Return the logits of tokens that are generated after a batch, shape [tokens, batch, vocabulary]."""
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    told = model.generate(
        **data, **options, use_cache=cache, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(told.logits)
