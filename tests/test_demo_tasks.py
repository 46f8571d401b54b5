"""The demo's lm-eval tasks: local, in the form of the training text, and answerable."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from structprune.demo import MODEL
from structprune.demo.dice import Dice
from structprune.demo.tasks import CHOICES, MULTIPLE_CHOICE, choices, questions, write_tasks, write_text
from structprune.demo.world import TUNING_SEED, text


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_there_is_one_perplexity_three_multiple_choices_and_one_generation(tmp_path: Path) -> None:
    names = write_tasks(tmp_path, size=5)
    kinds = [yaml.safe_load((tmp_path / f"{name}.yaml").read_text())["output_type"] for name in names]
    assert kinds.count("loglikelihood_rolling") == kinds.count("generate_until") == 1
    assert kinds.count("multiple_choice") >= 3
    assert all(len(rows(tmp_path, name)) == 5 for name in names)


def test_the_same_seed_writes_the_same_questions(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        names = write_tasks(tmp_path / folder, seed=21, size=5)
    assert all(rows(tmp_path / "one", name) == rows(tmp_path / "two", name) for name in names)
    write_tasks(tmp_path / "three", seed=22, size=5)
    assert rows(tmp_path / "one", "demo_story") != rows(tmp_path / "three", "demo_story")


def test_the_right_answer_is_among_four_and_not_always_at_the_same_place(tmp_path: Path) -> None:
    write_tasks(tmp_path, size=40)
    for name in MULTIPLE_CHOICE:
        found = rows(tmp_path, name)
        assert all(len(set(row["choices"])) == CHOICES for row in found)
        assert len({row["answer"] for row in found}) == CHOICES


def test_wrong_answers_stand_in_the_text_where_it_has_enough() -> None:
    question = next(questions("context", 23))
    assert set(choices(question, Dice(0))) - {question.answer} <= set(question.near + question.far)
    assert (
        set(question.near[: CHOICES - 1]) <= set(choices(question, Dice(0))) or len(question.near) >= CHOICES
    )


def test_held_out_text_is_written_as_the_generator_gives_it(tmp_path: Path) -> None:
    write_text(tmp_path / "held_out.txt", seed=24, characters=2000)
    assert (tmp_path / "held_out.txt").read_bytes() == text(24, 2000).encode("ascii")


def test_the_model_in_the_package_is_small_bfloat16_and_of_an_uneven_shape() -> None:
    weights = load_file(MODEL / "model.safetensors")
    config = json.loads((MODEL / "config.json").read_text())
    assert (MODEL / "model.safetensors").stat().st_size < 8_000_000
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert 1_500_000 <= sum(tensor.numel() for tensor in weights.values()) <= 3_000_000
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]
    assert "lm_head.weight" in weights and config["vocab_size"] <= 1024


@pytest.mark.parametrize("written", ["Größe 東京 🙂", "\ttab\r\nline  two", "12.5 and 3,000"])
def test_the_tokenizer_gives_any_text_back(written: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.decode(tokenizer(written)["input_ids"]) == written


def test_the_tokenizer_splits_digits_and_adds_nothing_of_its_own() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert len(tokenizer("2026")["input_ids"]) == 4
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_model_answers_from_memory_from_the_text_and_by_counting() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    right = []
    for kind in ("people", "story", "arithmetic"):
        source = questions(kind, TUNING_SEED)
        for question in (next(source) for _ in range(10)):
            prompt = tokenizer(question.prompt, return_tensors="pt", return_token_type_ids=False)
            out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
            answer = str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))
            right.append(answer.startswith(f" {question.answer}."))
    assert sum(right) >= 27  # of 30
