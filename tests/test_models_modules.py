"""A factored linear multiplies by what it says it is."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from structprune.models.arch import all_linears
from structprune.models.cost import parameters_of
from structprune.models.modules import FactoredLinear, blockwise, folded
from structprune.pruners.catalogue import find

# hidden, keys and values, feed-forward: Qwen2.5, and the published growth in percent at wrapper 128.
QWEN = {
    "7B": (3584, 512, 18944, 4.95),
    "14B": (5120, 1024, 13824, 4.17),
    "32B": (5120, 1024, 27648, 3.44),
    "72B": (8192, 1024, 29568, 2.40),
}


def filled(inputs: int, out: int, wrapper_in: int, wrapper_out: int, *, bias: bool) -> FactoredLinear:
    torch.manual_seed(0)
    module = FactoredLinear(inputs, out, wrapper_in, wrapper_out, bias=bias, dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_blocks_multiply_their_own_part_by_hand() -> None:
    blocks = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert blockwise(blocks, torch.tensor([1.0, 1.0, 5.0, 7.0])).tolist() == [3.0, 7.0, 7.0, 5.0]


def test_the_folded_product_is_the_product_of_the_whole_matrices() -> None:
    module = filled(12, 8, 4, 2, bias=False)
    left = torch.block_diag(*module.left)  # type: ignore[no-untyped-call]
    right = torch.block_diag(*module.right)  # type: ignore[no-untyped-call]
    expected = left @ module.core.weight @ right
    torch.testing.assert_close(module.dense(), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(folded(module.left, module.core.weight, module.right), expected)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_the_dense_linear(shape: tuple[int, ...], bias: bool) -> None:
    module, inputs = filled(12, 8, 4, 2, bias=bias), torch.randn(shape, dtype=torch.float64)
    expected = torch.nn.functional.linear(inputs, module.dense(), module.bias)
    torch.testing.assert_close(module(inputs), expected, rtol=0, atol=1e-10)


def test_an_unfilled_module_is_its_core() -> None:
    module, inputs = FactoredLinear(8, 4, 4, 2), torch.randn(3, 8)
    assert torch.equal(module(inputs), module.core(inputs))


def test_the_state_has_the_names_that_a_plan_writes() -> None:
    shapes = {name: tuple(value.shape) for name, value in filled(12, 8, 4, 2, bias=True).state_dict().items()}
    assert shapes == {"left": (4, 2, 2), "right": (3, 4, 4), "bias": (8,), "core.weight": (8, 12)}


def test_a_wrapper_that_does_not_divide_its_side_is_refused() -> None:
    with pytest.raises(ValueError, match="12 inputs do not divide into blocks of 5"):
        FactoredLinear(12, 8, 5, 2)


@pytest.mark.parametrize("size", QWEN)
def test_the_wrappers_add_what_is_published(size: str) -> None:
    hidden, kv, ffn, percent = QWEN[size]
    # The share does not depend on how many blocks there are; a key-value head has 128 columns.
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 128,
        num_key_value_heads=kv // 128,
        intermediate_size=ffn,
        vocab_size=1024,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    pruner = find("armor").model_validate({"wrapper_size": 128})
    weights = sum(linear.weight.numel() for block in all_linears(model) for linear in block)
    added = parameters_of(pruner.forecast(model).left) - parameters_of(model)
    assert round(100 * added / weights, 2) == percent
