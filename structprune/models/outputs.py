"""What a model says, in memory or straight from disk: its last hidden states, and the head that reads them.

With a large vocabulary the logits of a batch are larger than any block, of a small model larger than all of
it. They are therefore made of a slice of tokens at a time, and only the hidden states are kept.

The head is whatever the model's own class does with what its body returns: a product, a softcap, a scale.
That class runs here in two steps. While its body runs, the head is given no token; later the class runs again
with the given states in the place of its body. (`logits_to_keep`, which most classes take, would run the body
once more for every slice, and code that a folder brings along may not know it.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from structprune.errors import InputError
from structprune.models.arch import blocks
from structprune.models.identity import skeleton
from structprune.models.streamed import Batch, Model, StreamedModel
from structprune.models.walk import Walk, outside, replaced_forward

# Logits of one slice in float32. Up to four tensors of that size are alive at once when two models are
# compared; a slice is still 36 tokens at a vocabulary of 256 k, and half of it would make the head slower.
# What is above 32 MiB glibc gives back at once. Below, an aligned block never fits the hole that an equal one
# left, and every slice of a training step would take new memory.
SLICE_BYTES = 36 * 2**20


@dataclass(frozen=True)
class Output:
    """What a model says of one batch.

    Attributes:
        states: What the head reads, shape [batch, tokens, hidden].
        head: Turns some of them, shape [tokens, hidden], into logits, shape [tokens, vocabulary].
        vocabulary: How many logits a token has.
        body: The class of what the model's body returns.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int
    body: type[Any]


class BodyAndHead:
    """A model that runs in two steps: all its tokens through the body, some of them through the head.

    Args:
        model: In memory, or a skeleton of which the needed parts are; between calls it is as it was.

    Raises:
        InputError: The blocks lie in no module of their own, which would be the body.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        path = blocks(model)[0][0].split(".")[:-2]
        # Every module around the blocks: OPT's class calls not the outermost of them but the one inside it.
        self._around = [model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path) + 1)]
        if not self._around:
            raise InputError(
                f"{type(model).__name__} has no body that could run without its head",
                hint="the perplexity of this model cannot be computed; leave the evaluation out",
            )

    def run(self, batch: Batch) -> Output:
        """Run the body.

        Args:
            batch: Token ids and what else the model takes, on its device.
        """
        found: list[Any] = []

        def keep(body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found.append(body(*args, **kwargs))
            return type(found[0])(last_hidden_state=found[0].last_hidden_state[:, :0])

        with self._body(keep):
            self._model(**batch, use_cache=False)
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        kind = type(found[0])
        return Output(found[0].last_hidden_state, partial(self.head, kind), vocabulary, kind)

    def head(self, kind: type[Any], states: Tensor) -> Tensor:
        """Turn states that the body returned as a `kind`, shape [tokens, hidden], into logits."""
        with self._body(lambda *args, **kwargs: kind(last_hidden_state=states[None])):
            ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits[0]

    @contextmanager
    def _body(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        """Let `stand_in`, told the body's own forward and its arguments, be called in its place."""
        inside = False

        def outermost(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            inside = True
            try:
                return stand_in(forward, *args, **kwargs)
            finally:
                inside = False

        with ExitStack() as stack:
            for module in self._around:
                stack.enter_context(replaced_forward(module, partial(outermost, module.forward)))
            yield


@torch.no_grad()
def outputs(model: Model, batches: Sequence[Batch]) -> Iterator[Output]:
    """Yield what a model says of each batch; a head is for use before the next batch is asked for.

    A streamed model walks all batches block by block once.
    """
    if not isinstance(model, StreamedModel):
        whole = BodyAndHead(model)
        for batch in batches:
            yield whole.run(_on_device(model, batch))
        return
    walk = Walk(model, batches)
    for block in walk:
        block.advance()
    with tail(model) as finish:
        for batch in batches:
            yield finish(walk.hidden.pop(0), batch)


@contextmanager
def tail(model: Model) -> Iterator[Callable[[Tensor, Batch], Output]]:
    """Yield what turns the last block's output into the model's, in memory for the length of a `with`.

    Final norm and whatever else the body does are run by the model itself, its blocks replaced by their known
    result; what it looks up for its first block is zeros.
    """
    module = skeleton(model)
    whole, found = BodyAndHead(module), blocks(model)
    tokens = module.get_input_embeddings()
    assert isinstance(tokens, nn.Embedding)
    width = tokens.embedding_dim

    def finish(hidden: Tensor, batch: Batch) -> Output:
        with ExitStack() as stack:
            stack.enter_context(replaced_forward(tokens, lambda ids: hidden.new_zeros(*ids.shape, width)))
            for _, block in found:
                stack.enter_context(replaced_forward(block, lambda *args, **kwargs: hidden))
            return whole.run(_on_device(model, batch))

    with outside(model, "tail"):
        yield finish


@contextmanager
def head_of(model: Model, body: type[Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the head of a model whose body returns a `body`, in memory for the length of a `with`."""
    whole = BodyAndHead(skeleton(model))
    with outside(model, "tail"):
        yield partial(whole.head, body)


def per_token(measure: Callable[..., Tensor], vocabulary: int, *rows: Tensor) -> Tensor:
    """Return what is measured of every token, from logits that are made of one slice of tokens at a time.

    The backward pass makes them once more, so that training never holds more of them either.

    Args:
        measure: Told a slice of each of `rows`, whose logits it makes; returns shape [figures, tokens].
        vocabulary: How many logits a token has.
        rows: Hidden states, targets and the like, of equal length: shape [tokens, ...].

    Returns:
        Shape [figures, tokens].
    """
    size = max(1, SLICE_BYTES // (4 * vocabulary))
    slices = zip(*(torch.split(row, size) for row in rows), strict=True)
    # Nothing here draws random numbers, whose state would be kept for the second time.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(measure, *part) for part in slices], dim=-1)


@torch.no_grad()
def logits(model: Model, batch: Batch) -> Tensor:
    """Return all logits of one small batch at once, shape [batch, tokens, vocabulary]."""
    for output in outputs(model, [batch]):
        return output.head(output.states.flatten(0, 1)).view(*output.states.shape[:2], -1)
    raise AssertionError("one batch has one output")


@torch.no_grad()
def next_tokens(model: Model, batch: Batch) -> Tensor:
    """Return the likeliest token after each sequence, shape [batch, 1]."""
    for output in outputs(model, [batch]):
        return output.head(output.states[:, -1]).argmax(dim=-1, keepdim=True)
    raise AssertionError("one batch has one output")


def _on_device(model: Model, batch: Batch) -> Batch:
    return {name: value.to(model.device) for name, value in batch.items()}
