"""The invariants of running with fewer tokens: for every method, family of models and attention kernel."""

import copy
import logging
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.errors import UsageError
from structprune.models.cost import count
from structprune.plan.plan import Plan
from structprune.runtime.attach import detach, engine_of, paused
from structprune.runtime.keep_set import KeepSet
from tests.oracle import (
    CASES,
    TOKEN_METHODS,
    column_sets,
    dropped_columns,
    generate,
    longer,
    masked_dense,
    merging,
    padding_of,
    pictures,
    pruned,
    spared,
    token_pruner,
    worst,
)
from tests.pictures import IMAGE, vision_model
from tests.tiny import CACHE

EXACT, CLOSE = 1e-6, 1e-5


@pytest.mark.parametrize(("method", "family", "kernel"), CASES)
def test_keeping_all_changes_no_bit(method: str, family: str, kernel: str) -> None:
    model, batch = vision_model(family, attention=kernel), pictures(family).batch()
    with torch.no_grad():
        dense = model(**batch).logits
    ids = generate(model, batch).sequences
    for target in ({"keep_ratio": 1.0}, {"tokens": 1000}):
        with pruned(model, token_pruner(method, target=target), batch), torch.no_grad():
            assert torch.equal(model(**batch).logits, dense)
            assert torch.equal(generate(model, batch).sequences, ids)


@pytest.mark.parametrize(("method", "family", "kernel"), CASES)
def test_a_row_of_a_padded_batch_is_as_alone(method: str, family: str, kernel: str) -> None:
    model, prompts = vision_model(family, attention=kernel), pictures(family)
    batch = prompts.batch()
    with pruned(model, token_pruner(method), batch), torch.no_grad():
        together = model(**batch, use_cache=True)
        assert dropped_columns(together.past_key_values) > 0
        kept = [column_sets(layer, padding_of(batch)) for layer in together.past_key_values.layers]
        for row, ids in enumerate(prompts.rows):
            alone = model(**prompts.alone(row), use_cache=True)
            assert worst(together.logits[row, -len(ids) :], alone.logits[0]) < CLOSE
            for block, layer in enumerate(alone.past_key_values.layers):
                assert kept[block][row] == column_sets(layer, torch.zeros(1, dtype=torch.long))[0]


@pytest.mark.parametrize(("method", "family", "kernel"), CASES)
def test_cached_generation_is_a_masked_recomputation(method: str, family: str, kernel: str) -> None:
    model, batch = vision_model(family, attention=kernel), pictures(family).batch()
    with torch.no_grad():
        dense = model(**batch).logits[:, -1]
    with pruned(model, token_pruner(method), batch), merging(model) as merges:
        found = generate(model, batch)
    length = batch["input_ids"].shape[1]
    whole = longer(batch, found.sequences[:, length:-1])
    expected = masked_dense(family, whole, found.past_key_values, spared=spared(method), merges=merges)
    assert dropped_columns(found.past_key_values) > 0
    assert worst(torch.stack(found.logits, 1), expected[:, length - 1 :]) < CLOSE
    # Rows with images differ from the dense model, or the comparison would say nothing.
    assert worst(found.logits[0][:2], dense[:2]) > 100 * CLOSE


@pytest.mark.parametrize(("method", "family", "kernel"), CASES)
def test_text_on_a_cache_that_lacks_columns_is_a_masked_recomputation(
    method: str, family: str, kernel: str
) -> None:
    model, batch = vision_model(family, attention=kernel), pictures(family).batch()
    turn = torch.randint(3, 100, (3, 4), generator=torch.Generator().manual_seed(1))
    with pruned(model, token_pruner(method), batch), merging(model) as merges:
        first = generate(model, batch, max_new_tokens=3)
        length = first.sequences.shape[1]
        # The last token of the first turn was never read.
        whole = longer(batch, torch.cat([first.sequences[:, batch["input_ids"].shape[1] :], turn], 1))
        text = {
            name: whole[name]
            for name in ("input_ids", "attention_mask", "mm_token_type_ids")
            if name in whole
        }
        second = generate(model, text, **{CACHE: first.past_key_values})
    whole = longer(whole, second.sequences[:, whole["input_ids"].shape[1] : -1])
    expected = masked_dense(family, whole, second.past_key_values, spared=spared(method), merges=merges)
    assert worst(torch.stack(second.logits, 1), expected[:, length + turn.shape[1] - 1 :]) < CLOSE


@pytest.mark.parametrize(("method", "family", "kernel"), CASES)
def test_beams_of_a_row_are_as_alone(method: str, family: str, kernel: str) -> None:
    model, prompts = vision_model(family, attention=kernel), pictures(family)
    batch = prompts.batch()
    with pruned(model, token_pruner(method), batch):
        new = generate(model, batch, num_beams=3, num_return_sequences=3).sequences[
            :, batch["input_ids"].shape[1] :
        ]
        for row, ids in enumerate(prompts.rows):
            alone = generate(model, prompts.alone(row), num_beams=3, num_return_sequences=3).sequences
            assert torch.equal(new[3 * row : 3 * row + 3], alone[:, len(ids) :])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "fitprune"])
def test_what_blocks_add_from_the_tower_meets_the_tokens_that_are_there(method: str, family: str) -> None:
    # Qwen3-VL adds features of its tower after its first two blocks; tokens are gone before the second one.
    model, batch = vision_model(family), pictures(family).batch()
    fields = {"block": 1} if method == "fastv" else {}
    with pruned(model, token_pruner(method, **fields), batch):
        found = generate(model, batch)
    length = batch["input_ids"].shape[1]
    expected = masked_dense(family, longer(batch, found.sequences[:, length:-1]), found.past_key_values)
    assert worst(torch.stack(found.logits, 1), expected[:, length - 1 :]) < CLOSE


@pytest.mark.parametrize("method", ["divprune", "downsample", "fastv", "fitprune"])
def test_the_last_token_of_a_prompt_stays_and_counts(method: str) -> None:
    prompts = pictures("llava", 1, 1)
    for row, ids in enumerate(prompts.rows):
        # The prompt ends with its picture.
        prompts.rows[row] = ids[: len(ids) - ids[::-1].index(IMAGE)]
    model, batch = vision_model("llava"), prompts.batch()
    with pruned(model, token_pruner(method, target={"tokens": 4}), batch):
        found = generate(model, batch)
    length = batch["input_ids"].shape[1]
    whole = longer(batch, found.sequences[:, length:-1])
    expected = masked_dense(
        "llava", whole, found.past_key_values, spared=spared(method, target={"tokens": 4})
    )
    assert worst(torch.stack(found.logits, 1), expected[:, length - 1 :]) < CLOSE
    visual = batch["input_ids"].eq(IMAGE)
    for row, kept in enumerate(
        column_sets(found.past_key_values.layers[-1], torch.zeros(2, dtype=torch.long))
    ):
        assert length - 1 in kept
        # FitPrune deletes in the last block too, which its cache does not show, and may delete more.
        assert method == "fitprune" or int(visual[row, [one for one in kept if one < length]].sum()) == 4


@pytest.mark.parametrize("newlines", ["protect", "compete"])
def test_tokens_that_end_a_line_count_whether_they_may_go_or_not(newlines: str) -> None:
    model, prompts = vision_model("llava_next"), pictures("llava_next", 1)
    batch = prompts.batch()
    places = batch["input_ids"][0].eq(IMAGE).nonzero().flatten().tolist()
    # 4 x 4 patches of the whole picture, then lines of 4 patches and a newline.
    ends = {place for number, place in enumerate(places) if number >= 16 and (number - 16) % 5 == 4}
    pruner = token_pruner("random_tokens", target={"tokens": len(ends) + 3}, newlines=newlines)
    with pruned(model, pruner, batch), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    kept = {*column_sets(cache.layers[-1], padding_of(batch))[0]} & {*places}
    assert len(kept) == len(ends) + 3
    assert (ends <= kept) == (newlines == "protect")


def test_the_last_token_is_the_last_real_one_where_padding_is_on_the_right() -> None:
    model, prompts = vision_model("llava"), pictures("llava")
    width = max(map(len, prompts.rows))
    batch = prompts.batch()
    batch["input_ids"] = torch.tensor([row + [0] * (width - len(row)) for row in prompts.rows])
    batch["attention_mask"] = torch.tensor(
        [[1] * len(row) + [0] * (width - len(row)) for row in prompts.rows]
    )
    with pruned(model, token_pruner("fastv"), batch), torch.no_grad():
        together = model(**batch, use_cache=True)
        for row, ids in enumerate(prompts.rows):
            alone = model(**prompts.alone(row), use_cache=True)
            assert worst(together.logits[row, : len(ids)], alone.logits[0]) < CLOSE
            none = torch.zeros(3, dtype=torch.long)
            layers = [one.past_key_values.layers[-1] for one in (together, alone)]
            assert column_sets(layers[0], none)[row] == column_sets(layers[1], none[:1])[0]


def _traces(model: nn.Module) -> dict[str, Any]:
    """Return what hooks and attributes every module has."""
    return {
        name: ([*module._forward_pre_hooks.values()], [*module._forward_hooks.values()], {*vars(module)})
        for name, module in model.named_modules()
    }


def test_detaching_leaves_a_model_as_it_was() -> None:
    model, batch = vision_model("qwen3_vl"), pictures("qwen3_vl").batch()
    with torch.no_grad():
        dense = model(**batch).logits
    pruner = token_pruner("fastv")
    plan = pruner.calibrate(model, [batch])
    before, parameters = _traces(model), {name: one.clone() for name, one in model.state_dict().items()}
    pruner.apply(model, plan)
    once = _traces(model)
    assert once != before
    pruner.apply(model, plan)
    assert _traces(model) == once
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, dense)
    detach(model)
    assert _traces(model) == before
    assert all(torch.equal(one, parameters[name]) for name, one in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)


def test_a_way_to_generate_of_a_models_own_is_put_back() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    with pruned(model, token_pruner("fastv"), batch):
        expected = generate(model, batch).sequences
    mine: Any = partial(type(model).generate, model)
    model.generate = mine
    with pruned(model, token_pruner("fastv"), batch):
        assert model.generate is not mine
        assert torch.equal(generate(model, batch).sequences, expected)
    assert model.generate is mine


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()

    def fail(*_: object) -> None:
        raise ArithmeticError("in the middle of a block")

    with pruned(model, token_pruner("fitprune"), batch), torch.no_grad():
        expected = model(**batch).logits
        for name in ("layers.1.mlp.act_fn", "layers.2.self_attn.o_proj", "norm"):
            handle = model.get_submodule(f"model.language_model.{name}").register_forward_pre_hook(fail)
            with pytest.raises(ArithmeticError):
                model(**batch, labels=batch["input_ids"])
            handle.remove()
            engine = engine_of(model)
            assert engine is not None
            nothing = {"run": None, "ids": None, "labels": None, "features": (), "tower": None}
            assert vars(engine._local) | nothing == vars(engine._local)
            assert torch.equal(model(**batch).logits, expected)


def test_threads_do_not_see_each_other() -> None:
    model = vision_model("llava")
    batches = [pictures("llava").batch(), pictures("llava", 1, 1).batch()]
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    together = threading.Barrier(2, timeout=20)

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[number].append(model(**batches[number]).logits)

    with pruned(model, token_pruner("fitprune"), batches[0]), torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        # Both are in the same block at once, every time.
        handle = model.get_submodule("model.language_model.layers.2").register_forward_pre_hook(
            lambda *_: together.wait() * 0 or None
        )
        threads = [threading.Thread(target=run, args=(number,)) for number in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
    for number, logits in found.items():
        assert len(logits) == 3 and all(torch.equal(one, expected[number]) for one in logits)


def test_a_copy_of_a_model_with_hooks_goes_its_own_way() -> None:
    model, batch = vision_model("qwen3_vl"), pictures("qwen3_vl").batch()
    with torch.no_grad():
        dense = model(**batch).logits
    with pruned(model, token_pruner("fastv"), batch), torch.no_grad():
        expected = model(**batch).logits
        mine, other = copy.deepcopy(model), copy.deepcopy(model)
        assert torch.equal(mine(**batch).logits, expected)
        ids = generate(mine, batch).sequences
        assert torch.equal(ids, generate(model, batch).sequences)
        detach(mine)
        assert torch.equal(mine(**batch).logits, dense)
        assert torch.equal(model(**batch).logits, expected)
        with paused(model):
            assert torch.equal(other(**batch).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)
        assert torch.equal(other(**batch).logits, expected)
        assert torch.equal(generate(other, batch).sequences, ids)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_paused_model_is_the_dense_one(family: str) -> None:
    model, batch = vision_model(family), pictures(family).batch()
    ids = generate(model, batch).sequences
    with torch.no_grad():
        dense = model(**batch, labels=batch["input_ids"])
    with pruned(model, token_pruner("fastv"), batch), torch.no_grad():
        expected = model(**batch, use_cache=True)
        whole = longer(batch, torch.full((3, 2), 5))
        text = {name: whole[name] for name in ("input_ids", "attention_mask")}
        after = generate(model, text, **{CACHE: copy.deepcopy(expected.past_key_values)}).logits
        with paused(model):
            found = model(**batch, labels=batch["input_ids"], use_cache=True)
            assert torch.equal(found.logits, dense.logits) and torch.equal(found.loss, dense.loss)
            assert dropped_columns(found.past_key_values) == 0
            assert torch.equal(generate(model, batch).sequences, ids)
            # What is gone from a cache stays gone.
            again = generate(model, text, **{CACHE: copy.deepcopy(expected.past_key_values)}).logits
            assert torch.equal(torch.stack(again), torch.stack(after))
            elsewhere: list[Tensor] = []
            thread = threading.Thread(target=lambda: elsewhere.append(_logits(model, batch)))
            thread.start()
            thread.join()
        assert torch.equal(elsewhere[0], expected.logits)
        assert torch.equal(model(**batch).logits, expected.logits)


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("method", ["divprune", "fitprune"])
def test_labels_that_dropped_tokens_would_predict_do_not_count(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    mine = labels.clone()
    with pruned(model, token_pruner(method), batch), caplog.at_level(logging.WARNING):
        found = model.train()(**batch, labels=mine)
        found.loss.backward()
    assert torch.equal(mine, labels)
    assert len(caplog.records) == 1 and "labels" in caplog.text
    # A dropped token's state is zero, and so are its logits.
    gone = found.logits.eq(0).all(-1)
    assert int(gone[labels.eq(IMAGE)].sum()) > 20 and not bool(gone[labels.lt(100) & labels.ge(0)].any())
    told = labels.masked_fill(torch.nn.functional.pad(gone, (1, -1)), -100)[:, 1:]
    assert torch.allclose(
        found.loss, torch.nn.functional.cross_entropy(found.logits[:, :-1].transpose(1, 2), told)
    )
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert bool(parameter.grad.isfinite().all()), name
    assert bool(model.get_parameter("model.language_model.layers.0.mlp.down_proj.weight").grad.ne(0).any())


# peft asks transformers in a way that is deprecated there.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_has_its_say_in_what_is_kept() -> None:
    peft = pytest.importorskip("peft")
    plain, batch = vision_model("llava"), pictures("llava").batch()
    with pruned(plain, token_pruner("fastv"), batch), torch.no_grad():
        without = model_columns(plain, batch)
        torch.manual_seed(0)
        # Not zero, as an adapter that was trained.
        config = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(plain, config)
        found, ids = model_columns(wrapped, batch), generate(wrapped, batch).sequences
        logits = wrapped(**batch).logits
    merged = wrapped.merge_and_unload()
    with pruned(merged, token_pruner("fastv"), batch), torch.no_grad():
        assert found == model_columns(merged, batch) != without
        assert torch.equal(ids, generate(merged, batch).sequences)
        assert worst(logits, merged(**batch).logits) < CLOSE


def model_columns(model: Any, batch: dict[str, Tensor]) -> list[list[int]]:
    """Return the columns that a forward leaves in the last block."""
    return column_sets(model(**batch, use_cache=True).past_key_values.layers[-1], padding_of(batch))


def test_empty_slots_never_overwrite_a_token() -> None:
    # Whichever of the two comes last.
    for empty in ([True, False, True], [False, True, True]):
        places = KeepSet(torch.tensor([[1, 1, 2]]), torch.tensor([empty]))
        states = torch.tensor([[[3.0], [3.0], [4.0]]])
        assert places.scatter(states, 4).flatten().tolist() == [0, 3, 4, 0]


def test_rows_without_any_token_pass() -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    with pruned(model, token_pruner("fastv"), batch), torch.no_grad():
        expected = model(**batch).logits
        batch["attention_mask"][2] = 0
        found = model(**batch).logits
    assert worst(found[:2], expected[:2]) < CLOSE and bool(found.isfinite().all())


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "fitprune"])
def test_states_of_all_blocks_have_the_length_of_the_prompt(method: str, family: str) -> None:
    model, batch = vision_model(family), pictures(family).batch()
    real = batch["attention_mask"].bool() & batch["input_ids"].ne(IMAGE)
    with pruned(model, token_pruner(method), batch), torch.no_grad():
        plain = model(**batch, use_cache=True)
        found = model(**batch, output_hidden_states=True)
        assert torch.equal(found.logits, plain.logits) and len(found.hidden_states) == 5
        for states, layer in zip(found.hidden_states, plain.past_key_values.layers, strict=False):
            assert states.shape[:2] == batch["input_ids"].shape
            assert bool(states[real].any(-1).all())
            there = states.any(-1).sum(1).max()
            assert int(there) >= layer.keys.shape[-2]
        assert torch.equal(model.lm_head(found.hidden_states[-1]), found.logits)
        with pytest.raises(UsageError, match="output_attentions"):
            model(**batch, output_attentions=True)
        assert torch.equal(model(**batch).logits, plain.logits)
        with paused(model):
            assert model.set_attn_implementation("eager") is None
            assert len(model(**batch, output_attentions=True).attentions) == 4


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_a_model_with_hooks_can_be_counted_and_a_loaded_plan_runs_it(method: str, tmp_path: Path) -> None:
    model, batch = vision_model("llava"), pictures("llava").batch()
    pruner = token_pruner(method)
    plan, cost, forecast = pruner.calibrate(model, [batch]), count(model), pruner.forecast(model)
    pruner.apply(model, plan)
    assert count(model) == cost
    assert pruner.forecast(model).reachable == forecast.reachable
    expected = _logits(model, batch)
    assert not torch.equal(expected, _logits(vision_model("llava"), batch))
    plan.save(tmp_path / "plan")
    other, loaded = vision_model("llava"), Plan.load(tmp_path / "plan")
    token_pruner(method).apply(other, loaded)
    assert loaded.id == plan.id and torch.equal(_logits(other, batch), expected)
