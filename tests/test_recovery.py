"""Recovery lowers the held-out loss and revives no weight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from structprune.checkpoint.adapter import (
    Adapter,
    merge_adapter,
)
from structprune.recovery.masked_lora import MaskedLayers
from structprune.recovery.objective import divergence
from structprune.recovery.windows import split_off
from tests.recovering import held_out_loss, options, prune, pruned, recover, trained, walks, zero_places
from tests.tiny import FAMILIES, tiny, tokens


@pytest.fixture
def dense() -> PreTrainedModel:
    return trained()


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
        stored = model(input_ids=judged, labels=judged).loss.item()
    assert recovery.best_loss == pytest.approx(stored, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
def test_merging_changes_no_logit(family: str) -> None:
    model = tiny(family)
    masks = prune(model, 0.5)
    layers = MaskedLayers(model, list(masks), rank=4, alpha=8, ranks={})
    for parameter in layers.named_parameters().values():
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
from structprune.ranks import joined_ranks
from tests.recovering import prune, recover
from tests.tiny import tiny

model = tiny(sys.argv[1])
with joined_ranks() as ranks:
    recovery = recover(model, prune(model, 0.5), steps=4, check_every=2, learning_rate=1e-2)
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
digest = hashlib.sha256(weights).hexdigest()
losses = [check.train_loss for check in recovery.history]
result = {"writes": ranks.first, "sha256": digest, "loss": losses}
Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_processes_end_with_the_same_weights_and_one_of_them_writes(family: str, tmp_path: Path) -> None:
    program = tmp_path / "two.py"
    program.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(program)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*launch, family, str(tmp_path)], env=environment, check=True)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert (first.pop("writes"), second.pop("writes")) == (True, False)
    assert first == second
    # A step looks at the same windows, however many share it.
    model = tiny(family)
    alone = recover(model, prune(model, 0.5), steps=4, check_every=2, learning_rate=1e-2)
    losses = [check.train_loss for check in alone.history]
    assert first["loss"] == pytest.approx(losses, abs=1e-4)


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
        before = divergence(model(input_ids=windows).logits, expected, 1.0).mean()
        recover(model, masks, teacher=dense, teacher_weight=1.0, temperature=2.0)
        after = divergence(model(input_ids=windows).logits, expected, 1.0).mean()
    assert after < 0.5 * before
