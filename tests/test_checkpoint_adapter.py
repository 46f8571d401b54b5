"""A kept adapter gives the recovered model bit for bit, and opens nowhere else."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from structprune.checkpoint.adapter import (
    Adapter,
    LowRankChange,
    is_adapter,
    merge_adapter,
    read_adapter,
    save_adapter,
)
from structprune.errors import InputError
from tests.recovering import (
    assert_untouched,
    pruned,
    recover,
    trained,
)


@pytest.fixture
def dense() -> PreTrainedModel:
    return trained()


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
    factors = {"some.weight": LowRankChange(torch.ones(4, 2), torch.ones(2, 3), 1.0)}
    save_adapter(tmp_path, Adapter(factors, base="/models/pruned", base_weights="0" * 64, masks="plans"))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path)


def test_an_adapter_of_another_model_leaves_it_as_it_was(dense: PreTrainedModel) -> None:
    model, _ = pruned(dense)
    wrong = LowRankChange(torch.ones(64, 2), torch.ones(2, 63), 1.0)
    fits = LowRankChange(torch.ones(64, 2), torch.ones(2, 64), 1.0)
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(InputError, match=r"layers\.1.*has shape \[64, 63\], the model's tensor \[64, 64\]"):
        merge_adapter(model, Adapter(dict(zip(names, [fits, wrong], strict=True)), "x", "y", "plans"))
    with pytest.raises(InputError, match="which LlamaForCausalLM does not have"):
        merge_adapter(model, Adapter({names[0]: fits, "nowhere": fits}, "x", "y", "plans"))
    assert_untouched(model, dense)
