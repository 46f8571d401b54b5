"""LLM-Pruner: its scores are those of autograd on the whole model, whatever the layout of a family."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from structprune.calibration.notebook import Notebook
from structprune.errors import Interrupted, UsageError
from structprune.models.backward import backward
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import Batch, open_model
from structprune.plan.plan import Plan
from structprune.pruners.structure.llm_pruner import LlmPruner
from tests.tiny import save_tiny, tiny, tokens

SCORES = get_args(LlmPruner.model_fields["score"].annotation)
LENGTHS = [20, 13, 6, 20]
# Of each family the matrices of block 1: their path, and which rows [out] a unit has, or columns [in].
HEADS = {
    "llama": {"q_proj": [(0, 32)], "k_proj": [(0, 16)], "v_proj": [(0, 16)], "o_proj": "columns"},
    "qwen3": {"q_proj": [(0, 48)], "k_proj": [(0, 24)], "v_proj": [(0, 24)], "o_proj": "columns"},
    "phi3": {"qkv_proj": [(0, 32), (64, 16), (96, 16)], "o_proj": "columns"},
    "gpt2": {"attn.c_attn": [(0, 16), (64, 16), (128, 16)], "attn.c_proj": "columns"},
    "gpt_neox": {"query_key_value": [(0, 48)], "dense": "columns"},
}
CHANNELS = {
    "llama": {"gate_proj": [0], "up_proj": [0], "down_proj": "columns"},
    "qwen3": {"gate_proj": [0], "up_proj": [0], "down_proj": "columns"},
    "phi3": {"gate_up_proj": [0, 96], "down_proj": "columns"},
    "gpt2": {"c_fc": [0], "mlp.c_proj": "columns"},
    "gpt_neox": {"dense_h_to_4h": [0], "dense_4h_to_h": "columns"},
}
# Where the second key-value group of a tiny Llama begins.
ROWS = [("q_proj", 32), ("k_proj", 16), ("v_proj", 16)]
Gradients = dict[str, tuple[Tensor, Tensor, Tensor]]


def padded(model: PreTrainedModel) -> tuple[list[Tensor], list[Batch]]:
    """Return samples of unequal length, and the same padded in two batches."""
    ids = tokens(model, batch=4, length=20)["input_ids"]
    samples = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]
    batch = {"input_ids": torch.full_like(ids, 7), "attention_mask": torch.zeros_like(ids)}
    for row, sample in enumerate(samples):
        # GPT-2 counts padding on the left as positions.
        place = slice(len(sample)) if model.config.model_type == "gpt2" else slice(-len(sample), None)
        batch["input_ids"][row, place] = sample
        batch["attention_mask"][row, place] = 1
    return samples, [
        {name: value[:3] for name, value in batch.items()},
        {"input_ids": ids[3:]},
    ]


def by_autograd(model: PreTrainedModel, samples: list[Tensor]) -> Gradients:
    """Return weight, mean gradient and mean squared gradient of every matrix of block 1, [out, in]."""
    each: dict[str, list[Tensor]] = {}
    for ids in samples:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits
        loss: Any = functional.cross_entropy(logits[0, :-1], ids[1:])
        loss.backward()
        for name, value in model.named_parameters():
            if "s.1." in name or "h.1." in name:
                assert value.grad is not None
                each.setdefault(name, []).append(value.grad.clone())
    found = {}
    for name, grads in each.items():
        stacked = torch.stack(grads)
        parts = model.get_parameter(name).detach(), stacked.mean(dim=0), stacked.square().mean(dim=0)
        turned = ".c_" in name and parts[0].ndim == 2  # Conv1D
        found[name] = tuple(part.T if turned else part for part in parts)
    model.zero_grad()
    return found  # type: ignore[return-value]


def expected(score: str, parts: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the score of a unit from its pieces of weight, gradient and squared gradient."""
    terms = {
        "vector": lambda w, g, _: w * g,
        "element1": lambda w, g, _: (w * g).abs(),
        "element2": lambda w, _, a: (w * a * w).abs(),
        "mixed": lambda w, g, a: (w * g - 0.5 * w * a * w).abs(),
    }[score]
    return abs(sum(float(terms(*(one.double() for one in part)).sum()) for part in parts))


def pieces(found: Gradients, paths: dict[str, Any], unit: int, width: int) -> list[tuple[Tensor, ...]]:
    parts = []
    for path, rows in paths.items():
        (matrix,) = [value for name, value in found.items() if name.endswith(f"{path}.weight")]
        if rows == "columns":
            parts.append(tuple(one[:, unit * width : (unit + 1) * width] for one in matrix))
            continue
        for first in rows:
            start, size = first if isinstance(first, tuple) else (first, 1)
            parts.append(tuple(one[start + unit * size : start + (unit + 1) * size] for one in matrix))
    return parts


def noted(pruner: LlmPruner, model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Return what the walk backward leaves of block 1."""
    means = ("signed", "l1", "l2")
    return next(pruner.reduce_gradients(model, *pair) for pair in backward(model, batches, means=means))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", HEADS)
def test_the_scores_are_those_of_autograd_on_the_whole_model(family: str, score: Any) -> None:
    model = tiny(family)
    samples, batches = padded(model)
    found = noted(LlmPruner(score=score), model, batches)
    truth = by_autograd(model, samples)

    groups = 2 if family in ("llama", "qwen3", "phi3") else 4
    width = (96 if family == "qwen3" else 64) // groups
    assert [len(found[kind]) for kind in ("kv_group", "channel")] == [groups, 96]
    for kind, paths, units, size in (
        ("kv_group", HEADS[family], range(groups), width),
        ("channel", CHANNELS[family], range(96), 1),
    ):
        wanted = torch.tensor([expected(score, pieces(truth, paths, unit, size)) for unit in units])
        # A signed sum may nearly vanish: there the largest score sets the measure.
        assert (found[kind] - wanted).abs().max() < 1e-4 * wanted.max(), kind


def test_vector_is_how_the_loss_changes_when_a_unit_fades() -> None:
    model = tiny("llama")
    ids = tokens(model, batch=1, length=24)["input_ids"]
    found = noted(LlmPruner(score="vector"), model, [{"input_ids": ids}])["kv_group"]
    dense, faded = tiny("llama"), tiny("llama")
    unit = [(f"self_attn.{path}.weight", slice(rows, None), slice(None)) for path, rows in ROWS]
    unit.append(("self_attn.o_proj.weight", slice(None), slice(32, None)))

    def loss(share: float) -> float:
        for path, *place in unit:
            name = f"model.layers.1.{path}"
            faded.get_parameter(name).data[*place] = dense.get_parameter(name).data[*place] * share
        logits = faded(input_ids=ids, use_cache=False).logits.detach()
        return float(functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]))

    slope = (loss(1.01) - loss(0.99)) / 0.02
    assert float(found[1]) == pytest.approx(abs(slope), rel=1e-3)


@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize("score", SCORES)
def test_a_unit_of_zeros_leaves_first(score: Any, budget: Any) -> None:
    model = tiny("llama")
    with torch.no_grad():
        mlp, attention = (model.get_submodule(f"model.layers.1.{name}") for name in ("mlp", "self_attn"))
        for path in ("gate_proj", "up_proj"):
            mlp.get_parameter(f"{path}.weight")[7] = 0
        mlp.get_parameter("down_proj.weight")[:, 7] = 0
        for path, rows in ROWS:
            attention.get_parameter(f"{path}.weight")[:rows] = 0
        attention.get_parameter("o_proj.weight")[:, :32] = 0
    pruner = LlmPruner(score=score, budget=budget, sparsity=0.3, skip="0")
    plan = pruner.calibrate(model, [tokens(model)])
    keeps = {f"{key.name}:{key.axis}": plan[key].tolist() for key in plan if key.edit == "keep"}
    assert not any(key.name.startswith("model.layers.0.") for key in plan)
    assert keeps["model.layers.1.self_attn.k_proj.weight:0"] == [*range(16, 32)]
    channels = keeps.get("model.layers.1.mlp.down_proj.weight:1")
    assert channels is None or 7 not in channels


@pytest.mark.parametrize("repair", ["none", "bias", "least_squares"])
@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_streamed_and_resident_runs_write_the_same_plan(repair: str, budget: str, tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path, dtype=torch.bfloat16)
    pruner = LlmPruner.model_validate({"score": "mixed", "repair": repair, "budget": budget, "sparsity": 0.4})
    ids = [
        pruner.calibrate(open_model(folder, Opening(stream=stream)), padded(tiny("qwen3"))[1]).id
        for stream in (False, True)
    ]
    assert ids[0] == ids[1]


def test_only_scores_are_noted_and_a_killed_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    pruner, data = LlmPruner(score="mixed", budget="global"), padded(tiny("llama"))[1]

    def run(name: str) -> Plan:
        model = open_model(folder, Opening(stream=True))
        return pruner.calibrate(model, data, pruner.writer(tmp_path / name, model, "weights"))

    whole = run("whole")
    write, written = Notebook.write, []

    def stop(self: Notebook, block: int, tensors: dict[str, Tensor]) -> None:
        write(self, block, tensors)
        written.append((block, {name: list(one.shape) for name, one in tensors.items()}))
        if len(written) == 2:
            raise Interrupted(15)

    monkeypatch.setattr(Notebook, "write", stop)
    with pytest.raises(Interrupted):
        run("out")
    assert written == [(block, {"kv_group": [2], "channel": [96]}) for block in (1, 0)]
    assert run("out").id == whole.id
    # Gradients that were all noted are not made again: only the budget's two blocks are.
    assert [block for block, _ in written[2:]] == [0, 1]


SEVEN = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
EIGHT = SEVEN | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
SMALL = {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "vocab_size": 32000}
SMALL |= {"num_key_value_heads": 4, "intermediate_size": 5632}


@pytest.mark.parametrize(
    ("sizes", "groups", "channels", "skip", "before", "after"),
    [
        (SEVEN | {"intermediate_size": 11008}, 24, 8256, "0-3,30-31", 6_738_415_616, 5_422_977_024),
        (EIGHT, 6, 10752, "0-3,30-31", 8_030_261_248, 6_612_586_496),
        (SMALL, 3, 4224, "0-3,18-21", 1_100_048_384, 945_907_712),
    ],
    ids=["LLaMA-7B", "Llama-3-8B", "TinyLlama"],
)
def test_the_published_sizes_are_forecast_to_the_parameter(
    sizes: dict[str, int], groups: int, channels: int, skip: str, before: int, after: int
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=False))
    assert model.num_parameters() == before
    table = {"name": "table", "kv_groups": groups, "channels": channels}
    forecast = LlmPruner.model_validate({"budget": table, "skip": skip}).forecast(model)
    assert forecast.exact
    assert forecast.reachable == before - after
    assert forecast.left.num_parameters() == after


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_groups": 3}, r"budget.kv_groups: 3 key-value groups .* block 1, which has 2 \(1 to 2 can\)"),
        ({"channels": [96, 97]}, r"budget.channels: 97 channels .* block 1, which has 96 \(1 to 96 can\)"),
        ({"channels": [50, 50]}, r"budget.channels: 50 channels .* block 0, .*\(.*say null or 96\)"),
        ({"channels": [50]}, r"budget.channels: 1 number for 2 blocks"),
    ],
)
def test_a_size_that_a_block_cannot_have_is_refused(fields: dict[str, Any], said: str) -> None:
    pruner = LlmPruner.model_validate({"budget": {"name": "table", **fields}, "skip": "0"})
    with pytest.raises(UsageError) as refused:
        pruner.forecast(tiny("llama"))
    assert re.search(said, f"{refused.value.message} ({refused.value.hint})")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_groups": 0}, "found 0, expected .* from 1 on"),
        ({"channels": "many"}, "found .many., expected"),
        ({}, "needs kv_groups, channels or both"),
        ({"heads": 3}, "heads"),
    ],
)
def test_a_table_that_says_no_sizes_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LlmPruner.model_validate({"budget": {"name": "table", **fields}})


def test_a_table_leaves_the_sizes_it_lists() -> None:
    model = tiny("llama")
    table = {"name": "table", "kv_groups": [None, 1], "channels": [40, None]}
    pruner = LlmPruner.model_validate({"budget": table})
    plan = pruner.calibrate(model, [tokens(model)])
    assert [block.facts["kept"] for block in plan.blocks] == [
        {"kv_groups": 2, "heads": 4, "channels": 40},
        {"kv_groups": 1, "heads": 2, "channels": 96},
    ]
    forecast = pruner.forecast(model)
    assert plan.promises is not None
    assert plan.promises.removed == forecast.reachable == 56 * 3 * 64 + 96 * 64
    assert (plan.promises.asked, forecast.asked) == (
        "key-value groups block by block, channels block by block",
    ) * 2
    pruner.apply(model, plan)
    assert model.num_parameters() == forecast.left.num_parameters()
    assert logits(model, tokens(model)).isfinite().all()
