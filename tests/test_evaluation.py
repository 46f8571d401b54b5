"""Evaluation: perplexity and divergence worked out by hand, protocols, lm-eval, generations."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from structprune.calibration.data import load
from structprune.calibration.text_source import TextSource
from structprune.calibration.texts import texts
from structprune.errors import InputError, QualityError, UsageError
from structprune.evaluation import perplexity
from structprune.evaluation.evaluation import Evaluation, evaluate, gate
from structprune.evaluation.generations import beginnings, generations
from structprune.evaluation.perplexity import Scores, Windows, score, windows_of
from structprune.models import outputs
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.recipe.fields import build
from structprune.recipe.options import EvaluateOptions
from tests.tiny import LENGTH, VOCABULARY, save_tiny, tiny, tokenizer, tokens

PROSE = "".join(f"Line {number} of a text, {number**2} squared.\n" for number in range(1000, 1040))


class LookUp(nn.Module):
    """A head that reads one-hot states as the number of a row."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, states: Tensor) -> Tensor:
        return self.rows[states.argmax(dim=-1)]


def bigram(table: list[list[float]]) -> PreTrainedModel:
    """A model whose next token depends on the present one only: `table` [token, next] holds probabilities."""
    size = len(table)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
    model.lm_head = LookUp(torch.tensor(table).log())
    found: PreTrainedModel = model.eval()
    return found


@pytest.fixture
def prose(tmp_path: Path) -> str:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return str(path)


def uniform() -> PreTrainedModel:
    model: Any = tiny("llama")
    model.get_output_embeddings().weight.data.zero_()
    assert isinstance(model, PreTrainedModel)
    return model


def test_perplexity_of_three_tokens_worked_out_by_hand() -> None:
    model = bigram([[0.25, 0.75], [0.5, 0.5]])
    scores = score(model, Windows(torch.tensor([[0, 1, 0]]), [1]))
    assert scores.tokens == [2]
    # p(1 | 0) = 3/4 and p(0 | 1) = 1/2: the perplexity is (3/8) ** (-1/2)
    assert math.exp(scores.mean(scores.model)) == pytest.approx(math.sqrt(8 / 3))


def test_divergence_of_two_tokens_worked_out_by_hand() -> None:
    dense, model = bigram([[0.25, 0.75], [0.5, 0.5]]), bigram([[0.5, 0.5], [0.75, 0.25]])
    scores = score(model, Windows(torch.tensor([[0, 1, 0]]), [1]), dense=dense)
    after_0 = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    after_1 = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert scores.mean(scores.kl) == pytest.approx((after_0 + after_1) / 2)
    assert math.exp(scores.mean(scores.dense)) == pytest.approx(math.sqrt(8 / 3))


def test_top1_agreement_counts_the_tokens_ranked_first() -> None:
    dense, model = bigram([[0.25, 0.75], [0.6, 0.4]]), bigram([[0.1, 0.9], [0.3, 0.7]])
    scores = score(model, Windows(torch.tensor([[0, 1, 0, 0]]), [1]), dense=dense)
    # Both expect 1 after 0 (twice); after 1 they disagree.
    assert scores.mean(scores.agree) == pytest.approx(2 / 3)


def test_a_token_that_dense_rules_out_adds_nothing_to_the_divergence() -> None:
    dense, model = bigram([[0.0, 1.0], [1.0, 0.0]]), bigram([[0.5, 0.5], [0.5, 0.5]])
    scores = score(model, Windows(torch.tensor([[0, 1, 0]]), [1]), dense=dense)
    assert scores.mean(scores.kl) == pytest.approx(math.log(2))


def test_the_standard_error_is_that_of_the_window_means() -> None:
    scores = Scores(tokens=[10, 10, 10], kl=[1.0, 2.0, 6.0])
    means = torch.tensor([0.1, 0.2, 0.6])
    assert scores.error(scores.kl) == pytest.approx(float(means.std() / math.sqrt(3)))
    assert math.isnan(Scores(tokens=[10], kl=[1.0]).error([1.0]))


def test_windows_without_overlap_score_all_but_their_first_token() -> None:
    found = windows_of(torch.arange(10), 4)
    assert found.inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.starts == [1, 1]
    assert found.scored == 6


def test_windows_that_begin_with_a_token_score_all_of_the_text() -> None:
    found = windows_of(torch.arange(10), 4, first=99)
    assert found.inputs.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert found.starts == [1, 1, 1]


@pytest.mark.parametrize("first", [None, 99])
def test_overlapping_windows_score_every_token_once(first: int | None) -> None:
    ids = torch.arange(11)
    found = windows_of(ids, 5, stride=2, first=first)
    scored = [row[start:] for row, start in zip(found.inputs.tolist(), found.starts, strict=True)]
    flat = [token for row in scored for token in row]
    begin = 1 if first is None else 0
    assert flat == list(range(begin, begin + len(flat)))
    assert len(flat) >= 9


def test_a_stride_gives_a_bigram_model_the_perplexity_of_the_unbroken_text() -> None:
    model = bigram([[0.25, 0.75], [0.5, 0.5]])
    ids = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1])
    broken = score(model, windows_of(ids, 4, stride=2))
    whole = score(model, windows_of(ids, 8))
    assert sum(broken.tokens) == sum(whole.tokens) == 7
    assert broken.mean(broken.model) == pytest.approx(whole.mean(whole.model))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(prose: str) -> None:
    result = evaluate(uniform(), tokenizer(), EvaluateOptions(text=[prose], length=32, generations=False))
    assert result.perplexity["prose"]["model"] == pytest.approx(VOCABULARY)
    assert result.perplexity["prose"]["dense"] is None
    assert result.divergence == {}


def test_a_model_does_not_diverge_from_itself(prose: str) -> None:
    result = evaluate(
        tiny("llama"),
        tokenizer(),
        EvaluateOptions(text=[prose], length=32, generations=False),
        dense=tiny("llama"),
    )
    assert result.divergence["prose"] == {"kl": 0.0, "kl_se": 0.0, "top1_agreement": 1.0}
    assert result.perplexity["prose"]["model"] == result.perplexity["prose"]["dense"]


def test_the_figures_match_those_of_transformers_own_loss() -> None:
    model, inputs = tiny("llama"), tokens(tiny("llama"), batch=3, length=16)["input_ids"]
    scores = score(model, Windows(inputs, [1, 1, 1]), batch_size=2)
    with torch.no_grad():
        loss = float(model(input_ids=inputs, labels=inputs).loss)
    assert scores.mean(scores.model) == pytest.approx(loss, rel=1e-5)


def test_who_waits_is_told_how_far_the_measuring_is(prose: str) -> None:
    told: list[tuple[str, int, int]] = []
    options = EvaluateOptions(text=[prose], windows=3, length=8, batch_size=2)

    def tell(*report: Any) -> None:
        told.append(report)

    evaluate(tiny("llama"), tokenizer(), options, dense=tiny("llama", seed=1), progress=tell)
    stages = {stage: [(done, total) for one, done, total in told if one == stage] for stage, *_ in told}
    assert stages["perplexity on prose"] == [(0, 2), (1, 2), (2, 2)]
    prompts = [name for name in stages if name.startswith("continue")]
    assert [name.endswith(", dense model") for name in prompts] == [False, True]
    for reports in stages.values():
        done, totals = zip(*reports, strict=True)
        assert list(done) == sorted(done) and done[-1] == totals[-1] and len(set(totals)) == 1


def test_slices_and_batches_change_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = tiny("llama"), tiny("llama", seed=1)
    text = Windows(tokens(model, batch=5, length=16)["input_ids"], [1] * 5)
    one = score(model, text, dense=dense, batch_size=5)
    monkeypatch.setattr(outputs, "SLICE_BYTES", 3 * VOCABULARY * 4)
    other = score(model, text, dense=dense, batch_size=2)
    assert other.kl == pytest.approx(one.kl, rel=1e-4)
    assert other.model == pytest.approx(one.model, rel=1e-5)
    assert one.mean(one.kl) > 0.01


def test_streamed_models_give_the_figures_of_resident_ones(
    prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One batch per walk: the streamed model is then read anew for each, as a large text makes it.
    monkeypatch.setattr(perplexity, "HIDDEN_BYTES", 1)
    folders = [save_tiny("llama", tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1)]
    resident, streamed = (
        evaluate(
            open_model(folders[0], Opening(stream=stream)),
            tokenizer(),
            EvaluateOptions(text=[prose], length=32, windows=5, batch_size=2, generations=True),
            dense=open_model(folders[1], Opening(stream=stream)),
        )
        for stream in (False, True)
    )
    assert streamed.as_json() == resident.as_json()
    assert streamed.generations == resident.generations


def test_the_json_has_the_promised_shape_and_no_nan(prose: str) -> None:
    options = EvaluateOptions(text=[prose], length=32, windows=1, generations=False)
    result = evaluate(tiny("llama", seed=1), tokenizer(), options, dense=tiny("llama"))
    told = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert set(told) == {"perplexity", "divergence", "tasks", "protocol"}
    assert told["perplexity"]["prose"]["model"] > 1
    assert told["perplexity"]["prose"]["dense"] > 1
    # One window has no standard error.
    assert told["divergence"]["prose"]["kl_se"] is None
    assert told["protocol"]["flags"] == ["prose: the standard error of KL over windows is not finite"]


@pytest.mark.parametrize("which", ["model", "dense model"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_a_failure_and_no_figure(prose: str, which: str, value: float) -> None:
    broken: Any = tiny("llama")
    broken.get_output_embeddings().weight.data.fill_(value)
    pair = (broken, tiny("llama")) if which == "model" else (tiny("llama"), broken)
    options = EvaluateOptions(text=[prose], length=32, generations=False)
    with pytest.raises(
        QualityError, match=f"the loss of the {which} on prose is not finite: nan in window 0"
    ):
        evaluate(pair[0], tokenizer(), options, dense=pair[1])


def test_a_perplexity_beyond_all_numbers_is_a_failure_and_no_figure(prose: str) -> None:
    wild: Any = tiny("llama")
    wild.get_output_embeddings().weight.data.mul_(1e6)
    options = EvaluateOptions(text=[prose], length=32, generations=False)
    with pytest.raises(QualityError, match="perplexity of the model on prose is not finite: a loss of"):
        evaluate(wild, tokenizer(), options)


def test_a_text_that_a_model_rules_out_has_no_perplexity() -> None:
    model = bigram([[1.0, 0.0], [0.5, 0.5]])
    with pytest.raises(QualityError, match="not finite: inf in window 1"):
        score(model, Windows(torch.tensor([[0, 0, 0], [0, 1, 0]]), [1, 1]))


def test_the_protocol_says_how_it_was_measured(prose: str) -> None:
    stamp = evaluate(uniform(), tokenizer(), EvaluateOptions(text=[prose], generations=False)).protocol[
        "texts"
    ]["prose"]
    count = len(tokenizer()(PROSE)["input_ids"])
    assert stamp["length"] == LENGTH
    assert stamp["windows"] == count // LENGTH
    assert stamp["scored_tokens"] == (count // LENGTH) * (LENGTH - 1)
    assert (stamp["stride"], stamp["bos"], stamp["dtype"]) == (None, "none", "float32")
    assert all(len(stamp[key]) == 64 for key in ("sha256", "tokens_sha256", "tokenizer"))


def test_a_tokenizer_that_begins_texts_begins_every_window(prose: str) -> None:
    ours = tokenizer()
    ours.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ours.bos_token_id)]
    )
    stamp = evaluate(
        uniform(), ours, EvaluateOptions(text=[prose], length=32, windows=3, generations=False)
    ).protocol["texts"]["prose"]
    assert stamp["bos"] == "window"
    assert stamp["scored_tokens"] == 3 * 31


def test_the_demo_text_is_not_what_calibration_reads() -> None:
    stamp = evaluate(
        uniform(), tokenizer(), EvaluateOptions(text=["demo"], length=64, windows=2, generations=False)
    ).protocol["texts"]
    seen = load(TextSource("demo"), tokenizer(), samples=1, length=64).facts
    assert stamp["demo"]["windows"] == 2
    assert stamp["demo"]["sha256"] != hashlib.sha256("".join(texts(TextSource("demo"))).encode()).hexdigest()
    assert seen["tokens_available"] == 16 * 64


def test_models_of_two_dtypes_or_vocabularies_are_not_compared(prose: str) -> None:
    half = tiny("llama", dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="bfloat16, the one it is compared with in float32"):
        evaluate(half, tokenizer(), EvaluateOptions(text=[prose], generations=False), dense=tiny("llama"))
    other = tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(UsageError, match="different tokenizers"):
        evaluate(
            tiny("llama"),
            tokenizer(),
            EvaluateOptions(text=[prose], generations=False),
            dense=tiny("llama"),
            dense_tokenizer=other,
        )


def test_a_token_without_an_embedding_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        InputError, match=rf"gives token {VOCABULARY}, the model has a vocabulary of {VOCABULARY}"
    ):
        score(tiny("llama"), Windows(torch.tensor([[1, VOCABULARY]]), [1]))


def test_the_gate_lets_a_good_model_pass_and_stops_a_bad_one() -> None:
    result = Evaluation(perplexity={"wiki": {"model": 12.0, "dense": 10.0}}, divergence={"wiki": {"kl": 0.1}})
    gate(result, 1.2)
    with pytest.raises(QualityError, match=r"perplexity on wiki is 12, 1.2 times the dense 10") as caught:
        gate(result, 1.1)
    assert caught.value.exit_code == 5
    with pytest.raises(UsageError, match="needs a text and a dense model"):
        gate(Evaluation(perplexity={"wiki": {"model": 12.0, "dense": None}}), 1.1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"length": LENGTH + 1}, f"max_position_embeddings, {LENGTH}"),
        ({"length": 32, "stride": 33}, "stride is 33, expected 1 to the length of a window, 32"),
        ({"length": 32, "stride": 0}, "stride: found 0"),
        ({"windows": 0}, "windows: found 0"),
    ],
)
def test_impossible_sizes_are_refused(prose: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        evaluate(uniform(), tokenizer(), build(EvaluateOptions, {"text": prose} | options))


def test_a_text_shorter_than_a_window_is_refused_with_its_count(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 57)
    with pytest.raises(InputError, match=r"57 tokens are too few.*a length of at most 57"):
        evaluate(uniform(), tokenizer(), EvaluateOptions(text=[str(path)]))


def test_two_texts_of_one_name_are_refused(prose: str) -> None:
    with pytest.raises(UsageError, match="same name"):
        evaluate(uniform(), tokenizer(), EvaluateOptions(text=[prose, prose]))


def test_generations_follow_the_likeliest_token_and_stop_at_the_end_of_text() -> None:
    ours = tokenizer()
    ids = [ours.convert_tokens_to_ids(letter) for letter in "abc"]
    table = torch.full((VOCABULARY, VOCABULARY), 1e-6)
    for now, following in zip(ids, [*ids[1:], ours.eos_token_id], strict=True):
        table[now, following] = 1.0
    model = bigram(table.tolist())
    assert generations(model, ours, ["a", "b", "ab"], tokens=5) == ["bc", "c", "c"]


def test_prompts_come_from_the_beginning_of_the_text(prose: str) -> None:
    prompts = beginnings([PROSE], tokenizer(), max_length=LENGTH)
    assert len(prompts) == 3
    assert PROSE.startswith(prompts[0])
    assert all(prompt in PROSE for prompt in prompts)
    model = tiny("llama")
    result = evaluate(model, tokenizer(), EvaluateOptions(text=[prose], length=32, windows=1), dense=model)
    assert [one["prompt"] for one in result.generations] == prompts
    assert all(one["model"] == one["dense"] for one in result.generations)
