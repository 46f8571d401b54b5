"""Logits of a model, in memory or straight from disk, and what turns the last block's output into them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from structprune.models.arch import blocks
from structprune.models.identity import skeleton
from structprune.models.streamed import Batch, Model, StreamedModel
from structprune.models.walk import Walk, outside, replaced_forward


@torch.no_grad()
def outputs(model: Model, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield the logits of each batch, shape [batch, tokens, vocabulary].

    A streamed model walks all batches block by block once.
    """
    if not isinstance(model, StreamedModel):
        for batch in batches:
            yield model(
                **{name: value.to(model.device) for name, value in batch.items()}, use_cache=False
            ).logits
        return
    walk = Walk(model, batches)
    for block in walk:
        block.advance()
    with tail(model) as finish:
        for position, batch in enumerate(batches):
            yield finish(walk.hidden[position], batch)


@contextmanager
def tail(model: Model) -> Iterator[Callable[[Tensor, Batch], Tensor]]:
    """Yield what turns the last block's output into logits, in memory for the length of a `with`.

    Final norm, head and whatever the model does between them are run by the model itself, its blocks
    replaced by their known result; what it looks up for its first block is zeros.
    """
    current: list[Tensor] = []
    tokens = skeleton(model).get_input_embeddings()
    assert isinstance(tokens, nn.Embedding)
    width = tokens.embedding_dim

    def finish(hidden: Tensor, batch: Batch) -> Tensor:
        current[:] = [hidden]
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        result: Tensor = skeleton(model)(**inputs, use_cache=False).logits
        return result

    with outside(model, "tail"), ExitStack() as stack:
        stack.enter_context(replaced_forward(tokens, lambda ids: current[0].new_zeros(*ids.shape, width)))
        for _, module in blocks(model):
            stack.enter_context(replaced_forward(module, lambda *args, **kwargs: current[-1]))
        yield finish


def logits(model: Model, batch: Batch) -> Tensor:
    """Return the logits of one batch, shape [batch, tokens, vocabulary]."""
    return next(iter(outputs(model, [batch])))
