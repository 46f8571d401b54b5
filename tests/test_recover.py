"""Recovery lowers the held-out loss, revives no weight, and writes nothing when it does not help."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.checkpoint.adapter import (
    Adapter,
    Factors,
    add_masked,
    is_adapter,
    merge,
    merge_adapter,
    read_adapter,
    round_kept,
    save_adapter,
)
from structprune.errors import EnvironmentFailure, InputError, QualityError, UsageError
from structprune.options import RecoverOptions
from structprune.recover import Recovery, draw, nonzero_masks, train
from structprune.recover.masked_lora import MaskedLayers, MaskedProduct
from structprune.recover.objective import distillation_loss, learning_rate, next_token_losses
from structprune.recover.windows import split_off
from tests.tiny import FAMILIES, TEXT_IDS, tiny, tokenizer, tokens

LENGTH = 24


def walks(count: int, seed: int) -> Tensor:
    """Windows in which every token follows from the one before, shape [count, LENGTH]."""
    successor = torch.randperm(len(TEXT_IDS), generator=torch.Generator().manual_seed(7))
    steps = [torch.randint(len(TEXT_IDS), (count,), generator=torch.Generator().manual_seed(seed))]
    while len(steps) < LENGTH:
        steps.append(successor[steps[-1]])
    return torch.stack(steps, dim=1) + TEXT_IDS.start


def held_out_loss(model: PreTrainedModel) -> float:
    windows = walks(32, seed=10_000)
    with torch.no_grad():
        return float(next_token_losses(model(input_ids=windows).logits, windows).mean())


@torch.no_grad()
def prune(model: PreTrainedModel, sparsity: float) -> dict[str, Tensor]:
    """Remove the smallest weights of every row of every linear of the blocks; return the masks."""
    masks = nonzero_masks(model)
    for name in masks:
        weight = model.get_parameter(name)
        lowest = weight.abs().argsort(dim=-1)[..., : int(weight.shape[-1] * sparsity)]
        masks[name] = torch.ones_like(weight, dtype=torch.bool).scatter_(-1, lowest, False)
        weight.mul_(masks[name])
    return masks


def options(**changes: object) -> RecoverOptions:
    usual: dict[str, object] = {
        "data": "demo",
        "steps": 30,
        "rank": 8,
        "learning_rate": 5e-3,
        "check_every": 10,
        "batch_size": 8,
    }
    return RecoverOptions(**usual | changes)


def recover(model: PreTrainedModel, masks: dict[str, Tensor], **changes: object) -> Recovery:
    teacher = changes.pop("teacher", None)
    assert teacher is None or isinstance(teacher, PreTrainedModel)
    return train(model, masks, walks(96, seed=20_000), options(**changes), teacher=teacher, device="cpu")


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    """A tiny Llama that has really learned which token follows which."""
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        windows = walks(16, seed=step)
        next_token_losses(model(input_ids=windows).logits, windows).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(True)


def pruned(
    dense: PreTrainedModel, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = copy.deepcopy(dense).to(dtype)
    return model, prune(model, 0.6)


def zero_places(model: PreTrainedModel, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach() == 0 for name in masks}


# The arithmetic


def test_a_change_reaches_only_the_weights_that_are_not_zero() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    factors = Factors(torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0, 20.0]]), scaling=0.5)
    assert factors.delta().tolist() == [[5.0, 10.0], [15.0, 30.0]]
    assert merge(weight, factors).tolist() == [[6.0, 0.0], [0.0, 28.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_weight_that_meets_zero_is_not_counted_as_removed(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.5, -0.5, 0.0])
    stored = round_kept(add_masked(weight, -weight), weight, dtype)
    assert (stored != 0).tolist() == [True, True, False]
    assert stored.abs().max() < 1e-4
    assert stored.dtype == dtype


def test_the_layer_has_the_gradients_that_autograd_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 3, 4), (5, 4), (2, 4), (5, 2)]
    )
    frozen = (weight.detach() * (torch.rand(5, 4, generator=generator) > 0.5)).requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda inputs, a, b: MaskedProduct.apply(inputs, frozen, a, b, 0.7), (inputs, a, b)
    )


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    rates = [learning_rate(step, steps=6, warmup=2, peak=1.0) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_distillation_is_zero_against_itself_and_the_divergence_by_hand_otherwise() -> None:
    ours, theirs = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[math.log(3.0), 0.0]]])
    assert distillation_loss(theirs, theirs, 2.0).item() == pytest.approx(0.0, abs=1e-7)
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation_loss(ours, theirs, 1.0).item() == pytest.approx(by_hand, abs=1e-6)


# What recovery promises


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recovery_lowers_the_loss_and_moves_no_zero(dense: PreTrainedModel, dtype: torch.dtype) -> None:
    model, masks = pruned(dense, dtype)
    before, places = held_out_loss(model), zero_places(model, masks)
    outside = model.get_input_embeddings().weight.clone()
    recovery = recover(model, masks)
    assert held_out_loss(model) < 0.95 * before
    for name, expected in places.items():
        assert torch.equal(model.get_parameter(name) == 0, expected)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.get_input_embeddings().weight, outside)
    assert recovery.best_loss < recovery.start_loss
    assert [check.step for check in recovery.history] == [10, 20, 30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_loss_is_that_of_the_weights_as_stored(dense: PreTrainedModel, dtype: torch.dtype) -> None:
    model, masks = pruned(dense, dtype)
    recovery = recover(model, masks)
    _, judged = split_off(walks(96, seed=20_000), options().held_out, seed=0)
    model.float()
    with torch.no_grad():
        stored = next_token_losses(model(input_ids=judged).logits, judged).mean().item()
    assert recovery.best_loss == pytest.approx(stored, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
def test_merging_changes_no_logit(family: str) -> None:
    model = tiny(family)
    masks = prune(model, 0.5)
    layers = MaskedLayers(model, list(masks), rank=4, alpha=8, ranks={})
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = tokens(model)
    with torch.no_grad():
        trained = model(**batch).logits
    factors = layers.factors()
    layers.remove()
    unchanged = tiny(family)
    prune(unchanged, 0.5)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in unchanged.named_parameters())
    merge_adapter(model, Adapter(factors, base="", base_weights="", masks="nonzero"))
    with torch.no_grad():
        merged = model(**batch).logits
        untrained = unchanged(**batch).logits
    assert (merged - trained).abs().max() < 1e-5
    assert (merged - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_recovers_without_reviving_a_weight(family: str) -> None:
    model = tiny(family, dtype=torch.bfloat16)
    masks = prune(model, 0.5)
    places = zero_places(model, masks)
    kinds = {name: type(module) for name, module in model.named_modules()}
    recover(model, masks, steps=4, check_every=4, learning_rate=1e-2, rank=4)
    for name, expected in places.items():
        assert torch.equal(model.get_parameter(name) == 0, expected)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_the_same_seed_gives_the_same_weights(dense: PreTrainedModel) -> None:
    torch.manual_seed(123)
    first, masks = pruned(dense)
    recover(first, masks)
    torch.manual_seed(456)
    state = torch.random.get_rng_state()
    second, masks = pruned(dense)
    recover(second, masks)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, second.get_parameter(name)) for name, p in first.named_parameters())


TWO_PROCESSES = """
import hashlib, json, os, sys
from pathlib import Path
from structprune.recover import main_process
from tests.test_recover import prune, recover
from tests.tiny import tiny

model = tiny(sys.argv[1])
recovery = recover(model, prune(model, 0.5), steps=4, check_every=2, learning_rate=1e-2)
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
digest = hashlib.sha256(weights).hexdigest()
result = {"writes": main_process("cpu"), "sha256": digest, "loss": recovery.best_loss}
Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_processes_end_with_the_same_weights_and_one_of_them_writes(family: str, tmp_path: Path) -> None:
    program = tmp_path / "two.py"
    program.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(program)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*launch, family, str(tmp_path)], env=environment, check=True)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert (first.pop("writes"), second.pop("writes")) == (True, False)
    assert first == second


def test_a_weight_that_the_mask_removes_but_the_folder_holds_is_removed_again(
    dense: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    model, masks = pruned(dense)
    name = "model.layers.0.self_attn.q_proj.weight"
    row, column = (~masks[name]).nonzero()[0].tolist()
    with torch.no_grad():
        model.get_parameter(name)[row, column] = 1.0
    recover(model, masks)
    assert model.get_parameter(name)[row, column] == 0
    assert f"{name}: 1 weights" in caplog.text


def test_a_zero_that_no_mask_asked_for_stays_a_zero(dense: PreTrainedModel) -> None:
    model, masks = pruned(dense)
    everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
    places = zero_places(model, masks)
    recover(model, everything)
    for name, expected in places.items():
        assert torch.equal(model.get_parameter(name) == 0, expected)


def test_a_teacher_is_imitated(dense: PreTrainedModel) -> None:
    model, masks = pruned(dense)
    windows = walks(16, seed=30_000)
    with torch.no_grad():
        expected = dense(input_ids=windows).logits
        before = distillation_loss(model(input_ids=windows).logits, expected, 1.0)
        recover(model, masks, teacher=dense, teacher_weight=1.0, temperature=2.0)
        after = distillation_loss(model(input_ids=windows).logits, expected, 1.0)
    assert after < 0.5 * before


# What is refused, and leaves the model as it was


def assert_untouched(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    expected, _ = pruned(dense)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in expected.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rate", [1e-30, 1.0])
def test_nothing_that_beats_the_start_is_an_error_of_quality(dense: PreTrainedModel, rate: float) -> None:
    model, masks = pruned(dense)
    with pytest.raises(QualityError, match=r"(no check|nothing before it) beat"):
        recover(model, masks, learning_rate=rate)
    assert_untouched(model, dense)


def test_a_loss_that_is_not_a_number_stops_the_training(
    dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks = pruned(dense)
    spoil_after(model, 3, monkeypatch)
    with pytest.raises(QualityError, match="not finite at step 2, and nothing before it beat the start"):
        recover(model, masks)
    assert_untouched(model, dense)


def test_what_was_best_before_the_loss_broke_is_kept(
    dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks = pruned(dense)
    before = held_out_loss(model)
    spoil_after(model, 20, monkeypatch)
    recovery = recover(model, masks)
    assert "not finite" in recovery.stopped
    assert recovery.best_step == 10
    monkeypatch.undo()
    assert held_out_loss(model) < before


def spoil_after(model: PreTrainedModel, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every call of the model after the first so many return NaN."""
    forward, count = model.forward, iter(range(10**6))

    def spoilt(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        if next(count) >= calls:
            output.logits = output.logits * math.nan
        return output

    monkeypatch.setattr(model, "forward", spoilt)


def test_a_teacher_with_another_vocabulary_is_refused(dense: PreTrainedModel) -> None:
    model, masks = pruned(dense)
    teacher = copy.deepcopy(dense)
    teacher.resize_token_embeddings(400)
    with pytest.raises(InputError, match="400 tokens in its vocabulary, the model 320"):
        recover(model, masks, teacher=teacher)


def test_a_tensor_that_cannot_be_trained_is_named(dense: PreTrainedModel) -> None:
    model, masks = pruned(dense)
    masks["model.embed_tokens.weight"] = torch.ones(320, 64, dtype=torch.bool)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight belongs to a Embedding"):
        recover(model, masks)


def test_a_linear_layer_that_does_more_than_multiply_is_named() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(InputError, match=r"0\.weight belongs to a Doubling"):
        MaskedLayers(nn.Sequential(Doubling(4, 4)), ["0.weight"], rank=2, alpha=4, ranks={})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("model.nowhere.weight", (4, 4), "does not have"), ("lm_head.weight", (4, 4), r"has shape \[4, 4\]")],
)
def test_a_mask_that_does_not_fit_is_named(
    dense: PreTrainedModel, name: str, shape: tuple[int, int], message: str
) -> None:
    model, _ = pruned(dense)
    with pytest.raises(InputError, match=message):
        recover(model, {name: torch.ones(shape, dtype=torch.bool)})


def test_modules_can_have_ranks_of_their_own(dense: PreTrainedModel) -> None:
    model, masks = pruned(dense)
    recovery = recover(model, masks, rank=4, ranks={r"layers\.1\.self_attn\.[qk]_proj": 2, "down_proj": 6})
    ranks = {name: factors.rank for name, factors in recovery.factors.items()}
    assert ranks.pop("model.layers.1.self_attn.q_proj.weight") == 2
    assert ranks.pop("model.layers.1.self_attn.k_proj.weight") == 2
    assert {ranks.pop(f"model.layers.{block}.mlp.down_proj.weight") for block in (0, 1)} == {6}
    assert set(ranks.values()) == {4}


def test_experts_can_have_ranks_of_their_own() -> None:
    model = tiny("mixtral")
    masks = prune(model, 0.5)
    layers = MaskedLayers(model, list(masks), rank=4, alpha=8, ranks={"experts.down_proj": 2})
    factors = layers.factors()
    assert factors["model.layers.0.mlp.experts.down_proj"].rank == 2
    assert factors["model.layers.0.mlp.experts.gate_up_proj"].rank == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("q_porj", "matches no recovered module"), ("q_proj[", "not a regular expression")],
)
def test_a_rank_pattern_that_reaches_nothing_is_refused(
    dense: PreTrainedModel, pattern: str, message: str
) -> None:
    model, masks = pruned(dense)
    with pytest.raises(UsageError, match=message):
        recover(model, masks, ranks={pattern: 2})
    assert_untouched(model, dense)


def test_a_peft_without_room_for_our_layer_is_named(
    dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks = pruned(dense)
    monkeypatch.delattr("peft.LoraConfig._register_custom_module")
    with pytest.raises(EnvironmentFailure, match="peft 0"):
        recover(model, masks)
    assert_untouched(model, dense)


def test_a_missing_peft_is_named(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = pruned(dense)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentFailure, match=r"structprune\[recover\]"):
        recover(model, masks)
    assert_untouched(model, dense)


def test_a_model_without_linear_layers_has_nothing_to_recover(dense: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="nothing can be recovered"):
        recover(pruned(dense)[0], {})


# The data


def test_held_out_windows_are_never_trained_on() -> None:
    windows = torch.arange(50).view(-1, 1).expand(50, LENGTH)
    training, held_out = split_off(windows, 0.1, seed=3)
    assert (len(training), len(held_out)) == (45, 5)
    assert sorted([*training[:, 0].tolist(), *held_out[:, 0].tolist()]) == list(range(50))
    assert not torch.equal(held_out, split_off(windows, 0.1, seed=4)[1])


def test_windows_are_as_many_as_asked_or_as_there_are(tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("a quick brown fox. " * 100, encoding="utf-8")
    few = draw(str(text), tokenizer(), limit=3, length=16)
    every = draw(str(text), tokenizer(), limit=10_000, length=16)
    assert few.ids.shape == (3, 16)
    assert every.facts["windows"] == every.facts["tokens_available"] // 16 == len(every.ids)


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("a quick brown fox", encoding="utf-8")
    with pytest.raises(InputError, match=r"\d+ tokens are too few: recovery needs at least 2 windows of 64"):
        draw(str(text), tokenizer(), limit=8, length=64)


# The kept adapter


def kept(dense: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, Adapter]:
    """Recover, keep the adapter in the folder; return the recovered model and the adapter."""
    model, masks = pruned(dense, torch.bfloat16)
    recovery = recover(model, masks)
    adapter = Adapter(recovery.factors, base="/models/pruned", base_weights="0" * 64, masks="plans")
    save_adapter(folder, adapter)
    return model, adapter


def test_a_kept_adapter_read_back_gives_the_recovered_model_bit_for_bit(
    dense: PreTrainedModel, tmp_path: Path
) -> None:
    recovered, _ = kept(dense, tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.base, adapter.masks, is_adapter(tmp_path)) == ("/models/pruned", "plans", True)
    model, _ = pruned(dense, torch.bfloat16)
    merge_adapter(model, adapter)
    assert all(torch.equal(p, recovered.get_parameter(name)) for name, p in model.named_parameters())


def test_plain_peft_refuses_a_kept_adapter(dense: PreTrainedModel, tmp_path: Path) -> None:
    kept(dense, tmp_path)
    model, _ = pruned(dense)
    with pytest.raises((KeyError, ValueError), match="STRUCTPRUNE_MASKED_LORA"):
        PeftModel.from_pretrained(model, tmp_path)
    with pytest.raises((KeyError, ValueError), match="STRUCTPRUNE_MASKED_LORA"):
        model.load_adapter(tmp_path)
    assert_untouched(model, dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "an adapter of type 'LORA'"),
        ({"format": 2}, "format"),
        ({"scaling": {"lm_head.weight": 1.0}}, "lm_head.weight.left is missing"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    factors = {"some.weight": Factors(torch.ones(4, 2), torch.ones(2, 3), 1.0)}
    save_adapter(tmp_path, Adapter(factors, base="/models/pruned", base_weights="0" * 64, masks="plans"))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path)


def test_an_adapter_of_another_model_leaves_it_as_it_was(dense: PreTrainedModel) -> None:
    model, _ = pruned(dense)
    wrong = Factors(torch.ones(64, 2), torch.ones(2, 63), 1.0)
    fits = Factors(torch.ones(64, 2), torch.ones(2, 64), 1.0)
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(InputError, match=r"layers\.1.*has shape \[64, 63\], the model's tensor \[64, 64\]"):
        merge_adapter(model, Adapter(dict(zip(names, [fits, wrong], strict=True)), "x", "y", "plans"))
    with pytest.raises(InputError, match="which LlamaForCausalLM does not have"):
        merge_adapter(model, Adapter({names[0]: fits, "nowhere": fits}, "x", "y", "plans"))
    assert_untouched(model, dense)
