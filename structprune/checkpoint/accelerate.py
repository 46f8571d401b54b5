"""Runs 2:4 linears on the sparse kernels of NVIDIA GPUs, where those measure faster on the user's own device.

Nothing is assumed about speed: the sparse kernels pad few rows and start to win at shapes and numbers of rows
that differ from card to card (a decoded token is one row, a prompt is as many as it has tokens). So at load
time each distinct shape is timed dense and sparse at `ROWS` rows, and `choose` decides from the times alone:

* sparse slower at the most rows: the linear stays dense;
* sparse faster at every measured number: the dense weight is freed, memory falls to 9/16;
* sparse faster from some number of rows on: both are kept, and each call takes the faster one. That costs
  9/16 of the dense bytes more; slower tokens or a slower prompt would be the alternative.

A sparse product must also agree with the dense one, else the linear stays dense. What was decided, with the
times, is logged and found with `decisions_of`. An accelerated model is for running: it cannot be trained,
saved or moved; its folder on disk is what it was.
"""

import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from structprune.errors import UsageError
from structprune.models.arch import Linear, arch_of, blocks, linears
from structprune.models.opening import Opening
from structprune.models.streamed import Model, StreamedModel

logger = logging.getLogger(__name__)

SCHEMES = ("2:4",)
ROWS = (1, 16, 64, 256, 1024, 4096)
# The first cards with sparse tensor cores (Ampere).
CAPABILITY = (8, 0)
# The kernels of PyTorch for floating point in 16 bits; float32 has none that keeps its precision.
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
# Repeated timings of one kernel differ by a few percent: a smaller gain may be none.
GAIN = 1.05
# Both kernels round once to the output's dtype, whose last place is 2^-8 of a bfloat16.
TOLERANCE = 2**-6

_ATTRIBUTE = "_structprune_accelerated"


@dataclass(frozen=True)
class Times:
    """What one shape took.

    Attributes:
        dense: Rows -> seconds of the dense product.
        sparse: Rows -> seconds of the sparse product; fewer where a kernel refused.
        problem: Why the sparse product cannot be used; "" where it can.
    """

    dense: Mapping[int, float]
    sparse: Mapping[int, float]
    problem: str = ""


@dataclass(frozen=True)
class Decision:
    """What became of one linear.

    Attributes:
        label: The linear.
        from_rows: Rows from which it runs sparse; None for never, 0 for always.
        reason: Why, in a few words.
    """

    label: str
    from_rows: int | None
    reason: str


class SemiStructuredLinear(nn.Module):
    """A linear that multiplies sparse from some number of rows on, and dense below it.

    Args:
        dense: Weight of shape [out, in]; None where every call is sparse.
        sparse: The same weight, compressed.
        bias: Shape [out], or None.
        from_rows: Rows (tokens of all sequences) from which the sparse weight is used.
    """

    def __init__(self, dense: Tensor | None, sparse: Tensor, bias: Tensor | None, from_rows: int) -> None:
        super().__init__()
        self.out_features, self.in_features = sparse.shape
        self.weight = nn.Parameter(sparse if dense is None else dense, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.from_rows = from_rows
        # No parameter: it is a second copy of `weight`, which a state dict must not hold twice.
        self._sparse = (sparse,)

    def forward(self, value: Tensor) -> Tensor:
        """Return value @ weight.T + bias for `value` of shape [..., in]."""
        rows = value.reshape(-1, self.in_features)
        weight = self._sparse[0] if rows.shape[0] >= self.from_rows else self.weight
        product = functional.linear(rows, weight, self.bias)
        return product.view(*value.shape[:-1], self.out_features)


Convert = Callable[[Tensor], Tensor]
Measure = Callable[[Tensor, Convert], Times]


def check(scheme: str, opening: Opening) -> None:
    """Refuse what cannot be accelerated before a model is opened.

    Raises:
        UsageError: The scheme is unknown, or the model is to be streamed.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"accelerate={scheme!r} is not known", hint=f"one of: {', '.join(SCHEMES)}")
    if opening.stream:
        raise UsageError(
            "a streamed model is not accelerated: every block is read anew", hint="open it with stream=False"
        )


def choose(times: Times) -> tuple[int | None, str]:
    """Decide from times alone from how many rows on a shape runs sparse.

    Returns:
        The least measured number of rows from which sparse is faster at all measured numbers, 0 where that is
        all of them, None where it is not faster at the most rows; and why, in a few words.
    """
    if times.problem:
        return None, times.problem
    from_rows: int | None = None
    for rows in sorted(times.dense, reverse=True):
        if rows not in times.sparse or times.sparse[rows] * GAIN > times.dense[rows]:
            break
        from_rows = rows
    said = ", ".join(
        f"{rows}: {times.dense[rows] / times.sparse[rows]:.2f}x"
        for rows in sorted(times.dense)
        if rows in times.sparse
    )
    if from_rows is None:
        return None, f"sparse measured no faster ({said})"
    return (0 if from_rows == min(times.dense) else from_rows), said


def accelerate(model: Model, *, convert: Convert | None = None, measure: Measure | None = None) -> None:
    """Let the 2:4 linears of a model's blocks run sparse where that measures faster, in place.

    Where nothing can get faster a warning says why, and the model is left as it is; that is no error.

    Args:
        model: A model in memory; where it is decides what is possible.
        convert: Compresses a weight; PyTorch's unless given.
        measure: Times a weight dense and sparse; on the weight's device unless given.
    """
    assert not isinstance(model, StreamedModel)
    if convert is None and (problem := unable(model.device)):
        logger.warning("accelerate='2:4': nothing gets faster, the model stays dense: %s", problem)
        return
    decided: list[Decision] = []
    known: dict[tuple[object, ...], tuple[int | None, str]] = {}
    arch = arch_of(model)
    for prefix, block in blocks(model, arch):
        for linear in linears(prefix, block, arch):
            from_rows, reason = None, _unfit(linear)
            if not reason:
                weight = linear.module.get_parameter(linear.parameter).detach()
                kind = (tuple(weight.shape), weight.dtype)
                if kind not in known:
                    known[kind] = choose((measure or time_both)(weight, convert or compress))
                    logger.info("%s of shape %s: %s", linear.label, list(weight.shape), known[kind][1])
                from_rows, reason = known[kind]
            if from_rows is not None:
                _replace(model, linear, from_rows, convert or compress)
            decided.append(Decision(linear.label, from_rows, reason))
    if any(one.from_rows is not None for one in decided):
        model.requires_grad_(False)  # compressed weights have no gradient
    object.__setattr__(model, _ATTRIBUTE, tuple(decided))
    _report(decided)


def decisions_of(model: PreTrainedModel) -> tuple[Decision, ...]:
    """Return what `accelerate` decided for every linear of a model; nothing where it never ran."""
    found: tuple[Decision, ...] = vars(model).get(_ATTRIBUTE, ())
    return found


def unable(device: torch.device) -> str:
    """Return why a device has no 2:4 kernels; "" where it has."""
    if device.type != "cuda":
        return f"2:4 kernels are those of NVIDIA GPUs, and the model is on {device.type!r}"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"compute capability {found[0]}.{found[1]}, 2:4 kernels need {CAPABILITY[0]}.{CAPABILITY[1]}"
    return ""


def compress(weight: Tensor) -> Tensor:
    """Return a 2:4 weight of shape [out, in] in PyTorch's compressed form.

    Raises:
        RuntimeError: The kernels do not take its shape or dtype.
    """
    compressed: Tensor = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    return compressed


def time_both(weight: Tensor, convert: Convert) -> Times:
    """Time a weight dense and sparse at `ROWS` rows on its own CUDA device, and compare the products.

    Args:
        weight: Shape [out, in], with the pattern.
        convert: Compresses it.
    """
    try:
        sparse = convert(weight)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as refused:
        return Times({}, {}, _first_line(refused))
    times: tuple[dict[int, float], dict[int, float]] = ({}, {})
    with torch.no_grad():
        for rows in ROWS:
            value = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
            try:
                problem = difference(functional.linear(value, sparse), functional.linear(value, weight))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, NotImplementedError) as refused:
                problem = _first_line(refused)
            if problem:
                return Times({}, {}, f"{rows} rows: {problem}")
            for found, operand in zip(times, (weight, sparse), strict=True):
                found[rows] = _seconds(value, operand)
    return Times(*times)


def difference(found: Tensor, expected: Tensor) -> str:
    """Return by how much a sparse product is off; "" where it is the dense one but for rounding."""
    apart = float((found.float() - expected.float()).abs().max())
    scale = float(expected.float().abs().max())
    return "" if apart <= TOLERANCE * scale else f"the sparse product is off by {apart:.3g} of {scale:.3g}"


def holds(weight: Tensor) -> bool:
    """Tell whether at most two of four consecutive inputs are not zero; shape [out, in]."""
    return weight.shape[1] % 4 == 0 and bool(((weight != 0).reshape(-1, 4).sum(dim=1) <= 2).all())


def _unfit(linear: Linear) -> str:
    """Return why a linear cannot run sparse, before anything is timed; "" where it may."""
    if linear.expert is not None:
        return "experts are multiplied together, not one by one"
    if not isinstance(linear.module, nn.Linear) or linear.transposed:
        return "kept as [in, out], which the kernels do not take"
    if linear.weight.dtype not in KERNEL_DTYPES:
        return f"{linear.weight.dtype} has no 2:4 kernel: open the model in bfloat16 or float16"
    return "" if holds(linear.weight) else "does not hold 2:4"


def _replace(model: PreTrainedModel, linear: Linear, from_rows: int, convert: Convert) -> None:
    """Put a sparse linear in the place of a dense one, which is freed unless fewer rows need it."""
    module = linear.module
    assert isinstance(module, nn.Linear)
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    new = SemiStructuredLinear(weight if from_rows else None, convert(weight), bias, from_rows)
    model.set_submodule(linear.label, new.eval())


def _seconds(value: Tensor, weight: Tensor) -> float:
    """Return the median seconds of one product, measured by the device's own clock."""
    for _ in range(3):
        functional.linear(value, weight)
    found: list[float] = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        functional.linear(value, weight)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found)


def _report(decided: list[Decision]) -> None:
    """Log one line per outcome; a warning where no linear runs sparse."""
    outcomes: dict[tuple[int | None, str], list[str]] = {}
    for one in decided:
        outcomes.setdefault((one.from_rows, one.reason), []).append(one.label)
    level = logging.INFO if any(one.from_rows is not None for one in decided) else logging.WARNING
    for (from_rows, reason), labels in outcomes.items():
        kept = "dense" if from_rows is None else f"sparse from {from_rows} rows" if from_rows else "sparse"
        logger.log(level, "accelerate: %d linears, such as %s: %s: %s", len(labels), labels[0], kept, reason)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
