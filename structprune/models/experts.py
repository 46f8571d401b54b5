"""What each expert of a fused mixture reads: the experts' own forward, one expert after another, recorded.

transformers 5 keeps the experts of a block as 3-D parameters and runs them with one grouped product, so
there is no module per expert to hook. Here the same sum is computed expert by expert.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from structprune.errors import InputError
from structprune.models.arch import Linear

# Told (linear, inputs [tokens, in], rows of those tokens in the flattened batch) per expert and matrix; and
# once (None, ...) when every expert has been seen.
ExpertObserver = Callable[[Linear | None, Tensor, Tensor], None]


@contextmanager
def recording_experts(module: nn.Module, served: list[Linear], observe: ExpertObserver) -> Iterator[None]:
    """Let a fused experts module show each expert's inputs, for the length of a `with`.

    Args:
        module: Holds the 3-D parameters, first the one that reads the block's hidden states.
        served: The module's linears, two per expert: the reading one, then the writing one.
        observe: Told what each linear reads.

    Raises:
        InputError: The experts carry biases or are stored transposed, which no supported family does.
    """
    if getattr(module, "has_bias", False) or getattr(module, "is_transposed", False):
        raise InputError(f"{served[0].label}: experts with biases or a transposed layout are not supported")

    pairs: dict[int, list[Linear]] = {}
    for linear in served:
        pairs.setdefault(linear.expert or 0, []).append(linear)

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for expert, (reading, writing) in sorted(pairs.items()):
            rows, places = torch.where(top_k_index == expert)
            inputs = hidden[rows]
            observe(reading, inputs, rows)
            inner = module._apply_gate(nn.functional.linear(inputs, reading.weight))  # type: ignore[operator]
            observe(writing, inner, rows)
            part = nn.functional.linear(inner, writing.weight) * top_k_weights[rows, places, None]
            result.index_add_(0, rows, part.to(result.dtype))
        observe(None, hidden, rows)
        return result

    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
