"""The invariants of running with fewer tokens: for every method, family of models and attention kernel."""

import copy
import logging
import threading

import pytest
import torch
from torch import Tensor, nn

from structprune.models.identity import applied
from structprune.runtime.engine import attach, detach, engine_of, paused
from structprune.runtime.keep_set import KeepSet
from tests.oracle import (
    CASES,
    column_sets,
    dropped_columns,
    generate,
    longer,
    masked_dense,
    padding_of,
    pictures,
    pruned,
    token_pruner,
    worst,
)
from tests.pictures import FAMILIES, IMAGE, vision_model

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
    with pruned(model, token_pruner(method), batch):
        found = generate(model, batch)
    length = batch["input_ids"].shape[1]
    whole = longer(batch, found.sequences[:, length:-1])
    expected = masked_dense(family, whole, found.past_key_values)
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
    with pruned(model, token_pruner(method), batch):
        first = generate(model, batch, max_new_tokens=3)
        length = first.sequences.shape[1]
        # The last token of the first turn was never read.
        whole = longer(batch, torch.cat([first.sequences[:, batch["input_ids"].shape[1] :], turn], 1))
        text = {name: whole[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in whole}
        second = generate(model, text, past_key_values=first.past_key_values)
    whole = longer(whole, second.sequences[:, whole["input_ids"].shape[1] : -1])
    expected = masked_dense(family, whole, second.past_key_values)
    assert worst(torch.stack(second.logits, 1), expected[:, length + turn.shape[1] - 1 :]) < CLOSE


@pytest.mark.parametrize(("method", "family", "kernel"), CASES)
def test_beams_of_a_row_are_as_alone(method: str, family: str, kernel: str) -> None:
    model, prompts = vision_model(family, attention=kernel), pictures(family)
    batch = prompts.batch()
    with pruned(model, token_pruner(method), batch):
        new = generate(model, batch, num_beams=3, num_return_sequences=3).sequences[:, batch["input_ids"].shape[1] :]
        for row, ids in enumerate(prompts.rows):
            alone = generate(model, prompts.alone(row), num_beams=3, num_return_sequences=3).sequences
            assert torch.equal(new[3 * row : 3 * row + 3], alone[:, len(ids) :])
