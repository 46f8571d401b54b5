"""How large a model shall be, in parameters or bytes: reached to half a channel a block, and forecast."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from structprune.errors import UsageError
from structprune.models.cost import parameters_of
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.pruners import catalogue
from structprune.pruners.pruner import Pruner
from tests.tiny import save_tiny, tiny, tokens

# What one channel of a tiny block costs with its bias, and what one of its groups does.
CHANNEL, GROUP = 3 * 64, 96 * 64


def pruner(method: str = "llm_pruner", **fields: Any) -> Pruner:
    return catalogue.find(method).model_validate(fields)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize(
    ("method", "fields"),
    [("llm_pruner", {}), ("llm_pruner", {"repair": "bias"}), ("llm_pruner", {"budget": "global"})],
)
def test_so_many_parameters_are_left(family: str, method: str, fields: dict[str, Any]) -> None:
    model = tiny(family)
    dense = parameters_of(model)
    target = dense - 8192 if family == "mixtral" else dense - 20000
    asking = pruner(method, target_params=target, **fields)
    forecast = asking.forecast(model)
    plan = asking.calibrate(model, [tokens(model)])
    left = parameters_of(asking.apply(model, plan))
    if forecast.exact:
        assert parameters_of(forecast.left) == left
    # Experts are no channels: their blocks can lose whole groups only.
    assert abs(left - target) <= (GROUP if family == "mixtral" or not forecast.exact else CHANNEL), left
    assert forecast.asked == f"{target:,} parameters left"
    assert plan.promises is not None and plan.promises.asked == forecast.asked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_many_bytes_are_left_of_the_weights_as_they_are_stored(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, dtype=getattr(torch, dtype))
    size = getattr(torch, dtype).itemsize
    asking = pruner(target_memory=size * 82_720)
    # What it is computed in does not matter.
    for model in (open_model(folder, Opening(dtype="float32")), open_model(folder, Opening(stream=True))):
        left = parameters_of(asking.forecast(model).left)
        assert abs(left - 82_720) <= CHANNEL


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"target_params": 102_721}, "53,952 to 102,720 can"),
        ({"target_params": 53_951}, "53,952 to 102,720 can"),
        ({"target_params": 10, "skip": "0"}, "78,336 to 102,720 can"),
        ({"target_params": 10, "multiple": 32, "kv_multiple": 2}, "78,144"),
        ({"target_memory": "1kB"}, "215,808 to 410,880 can"),
        ({"target_params": 999_999, "repair": "bias"}, "54,208 to 102,976 can"),
    ],
)
def test_what_cannot_be_reached_is_refused_with_the_range(fields: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError, match=r"^target_\w+: .* cannot be reached") as refused:
        pruner(**fields).forecast(tiny("llama"))
    assert hint in str(refused.value.hint)


@pytest.mark.parametrize("field", ["target_params", "target_memory"])
def test_the_least_is_reached_and_what_rounds_to_the_whole_is_refused(field: str) -> None:
    model = tiny("llama")
    each = 1 if field == "target_params" else 4
    for parameters in (53_952, 102_720 - 2 * CHANNEL):
        assert parameters_of(pruner(**{field: each * parameters}).forecast(model).left) == parameters
    with pytest.raises(UsageError, match=f"{field}: .* rounds to nothing: .* of 96 channels can stay"):
        pruner(**{field: each * 102_720}).forecast(model)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("100M", 10**8), ("1.5b", 15 * 10**8), ("2_000", 2000), (7, 7), ("1e3", None), ("1.00001k", None)]
    + [(value, None) for value in (0, -5, "0M", 1.5, True, "many", "", "100MB", [3])],
)
def test_a_number_of_parameters_is_read_as_people_write_it(said: object, meant: int | None) -> None:
    if meant is None:
        with pytest.raises(ValidationError, match="expected a whole number above 0 such as"):
            pruner(target_params=said)
    else:
        assert pruner(target_params=said).model_dump()["target_params"] == meant


@pytest.mark.parametrize(("said", "meant"), [("200MB", 2 * 10**8), ("1.5 GiB", 3 * 2**29), (64, 64)])
def test_so_is_a_number_of_bytes(said: object, meant: int) -> None:
    assert pruner(target_memory=said).model_dump()["target_memory"] == meant


@pytest.mark.parametrize(
    "fields",
    [
        {"target_params": 5, "target_memory": 5},
        {"target_params": 5, "sparsity": 0.4},
        {"target_memory": 5, "budget": {"name": "table", "channels": 5}},
        {"sparsity": 0.4, "budget": {"name": "table", "channels": 5}},
    ],
)
def test_two_goals_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"given beside \w+; .*give one of them"):
        pruner(**fields)


def test_a_fixed_size_has_no_other_share() -> None:
    for fields in ({"target_params": 5}, {"budget": {"name": "table", "channels": 5}}):
        with pytest.raises(UsageError, match=f"{next(iter(fields))}: it fixes what leaves"):
            pruner(**fields).with_goal(0.5)
    assert pruner().with_goal(0.5).asked == 0.5
