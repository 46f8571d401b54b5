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
# Told (linear, inputs [tokens, in], outputs [tokens, out], rows) per expert and matrix.
ExpertWatcher = Callable[[Linear, Tensor, Tensor, Tensor], None]
# Told (expert, outputs [tokens, hidden] before they are weighed, their weights [tokens], rows) per expert.
RoutingWatcher = Callable[[int, Tensor, Tensor, Tensor], None]


@contextmanager
def recording_experts(
    module: nn.Module,
    served: list[Linear],
    observe: ExpertObserver | None = None,
    watch: ExpertWatcher | None = None,
    routed: RoutingWatcher | None = None,
) -> Iterator[None]:
    """Let a fused experts module show each expert's inputs, for the length of a `with`.

    Args:
        module: Holds the 3-D parameters, first the one that reads the block's hidden states.
        served: The module's linears, two per expert: the reading one, then the writing one.
        observe: Told what each linear reads, before its product.
        watch: Told what each linear reads and writes, after its product.
        routed: Told what comes out of each expert, and how the router weighs it.

    Raises:
        InputError: The experts carry biases or are stored transposed, which no supported family does.
    """
    if getattr(module, "has_bias", False) or getattr(module, "is_transposed", False):
        raise InputError(
            f"{served[0].label}: experts with biases or a transposed layout are not supported",
            hint="--exclude the experts",
        )

    pairs: dict[int, list[Linear]] = {}
    for linear in served:
        pairs.setdefault(linear.expert or 0, []).append(linear)

    def product(linear: Linear, inputs: Tensor, rows: Tensor) -> Tensor:
        if observe is not None:
            observe(linear, inputs, rows)
        outputs = nn.functional.linear(inputs, linear.weight)
        if watch is not None:
            watch(linear, inputs, outputs, rows)
        return outputs

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for expert, (reading, writing) in sorted(pairs.items()):
            rows, places = torch.where(top_k_index == expert)
            inner = module._apply_gate(product(reading, hidden[rows], rows))  # type: ignore[operator]
            outputs, weights = product(writing, inner, rows), top_k_weights[rows, places]
            if routed is not None:
                routed(expert, outputs, weights, rows)
            part = outputs * weights[:, None]
            result.index_add_(0, rows, part.to(result.dtype))
        if observe is not None:
            observe(None, hidden, rows)
        return result

    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
