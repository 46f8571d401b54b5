"""Block drop: what it finds, what it leaves, and how the smaller model opens and generates."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import structprune
from structprune.calibration.notebook import Notebook
from structprune.checkpoint.plans import read_plans
from structprune.checkpoint.writing import Writing
from structprune.errors import Interrupted, UsageError
from structprune.models.arch import arch_of, blocks
from structprune.models.edit import carry_out
from structprune.models.groups import BlockKeep
from structprune.models.identity import architecture_of
from structprune.models.masking import masked
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.plan.plan import Plan
from structprune.pruners.structure.block_drop import BlockDrop
from structprune.recipe.recipe import Recipe
from tests.conftest import Command
from tests.methods import CALIBRATION, EVALUATION, TEXT, short_runs
from tests.test_laws import bytes_of
from tests.tiny import FAMILIES, save_tiny, tiny, tokens

DEPTH = 4
PARTS = ("attention", "mlp")
SCORES: list[dict[str, Any]] = [
    {"score": "influence"},
    {"score": "angular"},
    {"score": "loss"},
    {"score": "loss", "units": PARTS},
]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**tokens(model)).logits


def padded(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Return two batches, of which the second has padding at both sides."""
    found = [tokens(model, length=14, seed=seed) for seed in range(2)]
    mask = torch.ones_like(found[1]["input_ids"])
    mask[0, :4] = mask[1, 10:] = 0
    return [found[0], found[1] | {"attention_mask": mask}]


def own_words(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Return what the model itself says, so that whatever it lacks makes the loss rise."""
    ids = model.generate(**tokens(model, batch=3, length=4), max_new_tokens=16, do_sample=False)
    return [{"input_ids": ids}]


def gone(plan: Plan) -> list[tuple[int, str]]:
    return [(one["block"], one["unit"]) for one in plan.facts["removed"]]


def states_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return what enters each block, then what leaves the last one, before any norm."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: found.append(args[0])) for _, block in blocks(model)
    ]
    last = blocks(model)[-1][1].register_forward_hook(
        lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(**batch)
    for handle in (*handles, last):
        handle.remove()
    return found


class TestScores:
    def test_influence_is_one_minus_the_mean_cosine_of_the_real_tokens(self) -> None:
        model = tiny("llama", depth=DEPTH)
        sums, count = torch.zeros(DEPTH), 0
        for batch in padded(model):
            states = states_of(model, batch)
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            count += int(real.sum())
            for index in range(DEPTH):
                cosines = torch.cosine_similarity(states[index][real], states[index + 1][real], dim=-1)
                sums[index] += cosines.sum()
        plan = BlockDrop(sparsity=0.5).calibrate(model, padded(model))
        found = [block.facts["block"]["score"] for block in plan.blocks]
        assert torch.allclose(torch.tensor(found), 1 - sums / count, atol=1e-5)
        lowest = sorted(range(DEPTH), key=found.__getitem__)[:2]
        assert gone(plan) == [(index, "block") for index in lowest]

    def test_angular_removes_the_neighbours_whose_last_tokens_turn_least(self) -> None:
        model = tiny("llama", depth=DEPTH)
        angles = []
        for batch in padded(model):
            states = states_of(model, batch)
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            last = [int(row.nonzero().max()) for row in mask]
            ends = [torch.stack([one[row, at] for row, at in enumerate(last)]).double() for one in states]
            spans = zip(ends, ends[2:], strict=False)
            angles.append(torch.stack([torch.cosine_similarity(*pair, dim=-1).arccos() for pair in spans]))
        means = torch.cat(angles, dim=1).mean(dim=1) / torch.pi
        plan = BlockDrop(score="angular", sparsity=0.5).calibrate(model, padded(model))
        first = int(means.argmin())
        assert gone(plan) == [(first, "block"), (first + 1, "block")]
        assert plan.facts["removed"][0]["score"] == pytest.approx(float(means.min()), abs=1e-6)

    @pytest.mark.parametrize("fields", SCORES, ids=str)
    def test_a_block_that_passes_its_input_on_is_found_first(self, fields: dict[str, Any]) -> None:
        model = tiny("llama", depth=DEPTH)
        arch, (_, block) = arch_of(model), blocks(model)[2]
        with torch.no_grad():
            for path in (arch.o, arch.down):
                block.get_submodule(path).weight.zero_()
        data = own_words(model)
        plan = BlockDrop(count=2 if "units" in fields else 1, **fields).calibrate(model, data)
        assert {index for index, _ in gone(plan)} == {2}
        dense = logits(model)
        assert torch.equal(logits(BlockDrop().apply(model, plan)), dense)

    def test_the_loss_of_every_step_is_noted_and_is_that_of_the_masked_model(self) -> None:
        model = tiny("llama", depth=DEPTH)
        plan = BlockDrop(score="loss", units=PARTS, count=2).calibrate(model, padded(model))
        (first, kind), second = gone(plan)
        losses, tokens_seen = 0.0, 0
        with masked(model, {first: BlockKeep(**{kind: False})}), torch.no_grad():
            for batch in padded(model):
                ids = batch["input_ids"]
                mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
                counted = (mask[:, 1:] & mask[:, :-1]).flatten()
                found = torch.nn.functional.cross_entropy(
                    model(**batch).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
                )
                losses, tokens_seen = losses + float(found[counted].sum()), tokens_seen + int(counted.sum())
        assert plan.facts["removed"][0]["score"] == pytest.approx(losses / tokens_seen, rel=1e-5)
        assert second != (first, kind)


CLOSED = [{"drop": "0,2"}, {"drop": "1", "units": ("attention",)}, {"drop": "0", "units": PARTS}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", CLOSED, ids=str)
def test_what_is_removed_equals_what_is_masked(fields: dict[str, Any], family: str) -> None:
    model = tiny(family, depth=3)
    pruner = BlockDrop(**fields)
    off = dict.fromkeys(fields.get("units", ("block",)), False)
    keeps = {int(index): BlockKeep(**off) for index in fields["drop"].split(",")}
    with masked(model, keeps):
        expected = logits(model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    forecast = pruner.forecast(model)
    plan = pruner.calibrate(model, [])
    pruner.apply(model, plan)
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-6)
    left = sum(parameter.numel() for parameter in model.parameters())
    assert plan.promises is not None
    assert whole - left == plan.promises.removed == forecast.reachable > 0
    assert architecture_of(forecast.left) == architecture_of(model)


NATIVE = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "qwen2_moe"]


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("units", [("block",), ("attention",)], ids=str)
def test_it_opens_in_plain_transformers_and_generates_with_a_cache(
    units: tuple[str, ...], family: str, tmp_path: Path
) -> None:
    source = tmp_path / "dense"
    model = tiny(family, depth=DEPTH)
    if family == "qwen2_moe":  # one block without experts; after the cut it has another number
        config = copy.deepcopy(model.config)
        config.mlp_only_layers = [2]
        model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(source)
    recipe = Recipe.model_validate(
        {
            "model": str(source),
            "output": str(tmp_path / "out"),
            "prune": {"method": "block_drop", "drop": "0", "units": units},
            "evaluate": False,
        }
    )
    report = structprune.prune(recipe, writing=Writing(reload=False))
    assert report["verification"]["ok"]
    native = units == ("block",)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not native).eval()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(blocks(loaded)) == config["num_hidden_layers"] == DEPTH - native
    if native:
        assert "auto_map" not in config
        if hasattr(model.config, "layer_types"):
            assert config["layer_types"] == model.config.layer_types[1:]
        if family == "qwen2_moe":
            assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([1], 1)
    with masked(model, {0: BlockKeep(**dict.fromkeys(units, False))}):
        assert torch.allclose(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    check_cache(loaded)


@torch.no_grad()
def check_cache(model: PreTrainedModel, beams: int = 1) -> None:
    """Check that left-padded prompts are continued alike with a cache and without."""
    prompt = tokens(model, length=10)
    mask = torch.ones_like(prompt["input_ids"])
    mask[0, :5] = 0
    ways = [
        model.generate(
            **prompt,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            num_beams=beams,
            use_cache=cached,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for cached in (True, False)
    ]
    one, other = (torch.stack(way.logits) for way in ways)
    assert torch.equal(ways[0].sequences, ways[1].sequences)
    assert (one - other).abs().max() < 1e-4


class TestRuns:
    @pytest.mark.parametrize("fields", [*SCORES[1:], {"score": "random"}], ids=str)
    def test_streamed_and_resident_runs_write_the_same_bytes(
        self, fields: dict[str, Any], tmp_path: Path
    ) -> None:
        model = tiny("llama", depth=3, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "dense")
        pruner = BlockDrop(sparsity=0.4, **fields)
        for way in (False, True):
            opened = open_model(tmp_path / "dense", Opening(stream=way))
            pruner.calibrate(opened, padded(model)).save(tmp_path / str(way))
        assert bytes_of(tmp_path / "True") == bytes_of(tmp_path / "False")

    @pytest.mark.parametrize("fields", SCORES, ids=str)
    @pytest.mark.parametrize("noted", [1, 3])
    def test_a_run_killed_on_its_first_look_goes_on(
        self, noted: int, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny("llama", depth=3)
        pruner, data = BlockDrop(sparsity=0.4, **fields), padded(model)
        whole = pruner.calibrate(model, data)
        with stopping(monkeypatch, noted) as written:
            with pytest.raises(Interrupted):
                pruner.calibrate(model, data, pruner.writer(tmp_path, model, whole.weights))
            # Noted is what was computed: nothing of it is computed again.
            assert len(written) == len(list(tmp_path.iterdir())) == noted
            written.append(-1)
            assert pruner.calibrate(model, data, pruner.writer(tmp_path, model, whole.weights)).id == whole.id
            fresh = written[noted + 1 :]
            assert not {*fresh} & {*written[:noted]}
        assert not list(tmp_path.glob("loss-*")) and not list(tmp_path.glob("budget-*"))

    def test_several_goals_share_what_was_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny("llama", depth=3)
        wanted = [BlockDrop(score="loss", sparsity=sparsity) for sparsity in (0.3, 0.6)]
        alone = [pruner.calibrate(model, padded(model)).id for pruner in wanted]
        with stopping(monkeypatch, 0) as written:
            pairs = [(pruner, pruner.writer(None, model, "0" * 64)) for pruner in wanted]
            plans = wanted[0].calibrate_each(model, padded(model), pairs)
        assert len(written) == 3 + 2
        assert [gone(plan) for plan in plans] == [
            gone(pruner.calibrate(model, padded(model))) for pruner in wanted
        ]
        assert len({*alone}) == 2

    @pytest.mark.parametrize(
        "stages",
        [
            [{"method": "block_drop", "sparsity": 0.3}, {"method": "wanda", "sparsity": "2:4"}],
            [{"method": "sparsegpt", "sparsity": 0.5}, {"method": "block_drop", "sparsity": 0.3}],
            [
                {"method": "flap", "sparsity": 0.3},
                {"method": "block_drop", "drop": "1", "units": ["attention", "mlp"]},
                {"method": "block_drop", "drop": "0"},
            ],
        ],
        ids=["then 2:4", "after sparsegpt", "skipped after flap"],
    )
    def test_stages_before_and_after_it(self, stages: list[dict[str, Any]], tmp_path: Path) -> None:
        source = save_tiny("llama", tmp_path / "dense", depth=3)
        outs = [tmp_path / way for way in ("resident", "streamed")]
        for out in outs:
            content = {"model": str(source), "output": str(out), "prune": stages, "calibration": CALIBRATION}
            recipe = Recipe.model_validate(content | {"evaluate": EVALUATION})
            way = Opening(stream=out.name == "streamed")
            planned = structprune.dry_run(recipe, opening=way)
            with short_runs():
                report = structprune.prune(recipe, opening=way, writing=Writing(reload=False))
            assert report["verification"]["ok"], report
            assert not planned["exact"] or planned["parameters"]["pruned"] == report["parameters"]["pruned"]
            assert all(stage["measured"] for stage in report["stages"])
        one, other = (bytes_of(out / "structprune") for out in outs)
        plans = [name for name in one if name.startswith("plans/")]
        assert plans and all(one[name] == other[name] for name in plans)
        files = [{file.name: file.read_bytes() for file in out.glob("*.safetensors")} for out in outs]
        assert files[0] == files[1]
        again = open_model(source)
        for plan in read_plans(outs[0]):  # what the weights hold is not kept twice, and found again
            carry_out(again, plan)
        assert torch.equal(logits(again), logits(open_model(outs[0])))

    def test_a_dry_run_tells_how_many_forwards_a_search_takes(self, tmp_path: Path, command: Command) -> None:
        source = save_tiny("llama", tmp_path / "dense", depth=3)
        words = ["prune", source, tmp_path / "out", "--method", "block_drop", "--dry-run", "--json"]
        words += ["--set", "prune.score=loss", "--set", "prune.count=2", "--calibration", TEXT]
        (stage,) = command(*words).json["stages"]
        assert (stage["forwards"], stage["asked"]) == (3 + 2, "2 blocks")


@contextmanager
def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[list[int]]:
    """Stop a run once it noted so much; 0 for never."""
    write, written = Notebook.write, []

    def stop(self: Notebook, block: int, tensors: dict[str, Tensor]) -> None:
        write(self, block, tensors)
        written.append(block)
        if len(written) == after:
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(Notebook, "write", stop)
        yield written


class TestSaidNo:
    @pytest.mark.parametrize("fields", [*SCORES, {"score": "random"}], ids=str)
    def test_skipped_blocks_stay(self, fields: dict[str, Any]) -> None:
        model = tiny("llama", depth=DEPTH)
        plan = BlockDrop(skip="0,3", sparsity=0.9, **fields).calibrate(model, padded(model))
        assert {index for index, _ in gone(plan)} <= {1, 2} and gone(plan)

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"sparsity": 0.1}, r"sparsity: 0.1 of 4 blocks rounds to none .*0.25, 0.5, 0.75"),
            ({"count": 4}, r"count: 4 blocks are to leave, at most 3 can"),
            ({"count": 2, "skip": "0-2"}, r"count: 2 blocks are to leave, at most 1 can"),
            ({"drop": "0-3"}, r"drop: 4 blocks are to leave, at most 3 can"),
            ({"drop": "4"}, r"drop: there is no block 4, the model has 4 blocks"),
            ({"drop": "1", "skip": "1"}, r"drop: block 1 has no block that may leave"),
            ({"skip": "7"}, r"skip: there is no block 7"),
            ({"skip": "0-3"}, r"skip: no block may leave"),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_refused_before_anything_is_looked_at(
        self, fields: dict[str, Any], said: str
    ) -> None:
        model = tiny("llama", depth=DEPTH)
        pruner = BlockDrop.model_validate(fields)
        with pytest.raises(UsageError, match=said):
            pruner.forecast(model)
        with pytest.raises(UsageError, match=said):
            pruner.calibrate(model, [])

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"units": ["block", "mlp"]}, "units: a block cannot leave beside its own parts"),
            ({"units": ["mlp", "mlp"], "score": "loss"}, "units: mlp, mlp names one twice"),
            ({"units": ["attention"]}, "score: influence is of whole blocks"),
            ({"count": 1, "drop": "2"}, "count: given beside drop"),
            ({"count": 1, "sparsity": 0.4}, "count: given beside sparsity"),
            ({"count": 0}, "greater than or equal to 1"),
            ({"units": ["head"]}, "block"),
        ],
        ids=str,
    )
    def test_fields_that_contradict_each_other(self, fields: dict[str, Any], said: str) -> None:
        with pytest.raises(ValidationError, match=said):
            BlockDrop.model_validate(fields)

    def test_units_may_be_said_in_one_word_or_between_commas(self) -> None:
        assert BlockDrop.model_validate({"score": "loss", "units": "attention, mlp"}).units == PARTS
        assert BlockDrop.model_validate({"units": "block"}).units == ("block",)

    def test_other_shares_of_a_fixed_number(self) -> None:
        with pytest.raises(UsageError, match="drop: it fixes what leaves"):
            BlockDrop(drop="1").with_goal(0.2)

    def test_a_block_whose_attention_depends_on_its_number(self) -> None:
        model = tiny("gpt2")
        model.config.scale_attn_by_inverse_layer_idx = True
        with pytest.raises(UsageError, match="scale_attn_by_inverse_layer_idx"):
            BlockDrop(count=1).forecast(model)

    def test_what_an_earlier_stage_skipped_cannot_leave_again(self) -> None:
        model = tiny("llama", depth=3)
        first = BlockDrop(drop="1", units=("attention",))
        first.apply(model, first.calibrate(model, []))
        with pytest.raises(UsageError, match="drop: block 1 has no attention"):
            first.forecast(model)
        plan = BlockDrop(score="random", units=("attention",), count=1).calibrate(model, [])
        assert gone(plan) in ([(0, "attention")], [(2, "attention")])
