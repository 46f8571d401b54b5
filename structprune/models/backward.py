"""The backward walk: how strongly the loss depends on every weight, from the last block to the first.

All gradients together are as large as the model. Here autograd only carries the gradient of the hidden
states through one block at a time; a weight's gradient is the product of what its linear read and of the
gradient of what it wrote, made one sample at a time and added up at once. The hidden states wait in files.

Source: Das et al. 2023 (GBLM-Pruner), https://arxiv.org/abs/2311.04902
Deviations: the released code sums over samples and computes in float16, where small gradients become zero.
Here the sums are divided by the samples, so that their number does not shift the balance with other terms;
gradients are scaled into the middle of the model's range before autograd and back, in float32, after it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from structprune.errors import InputError, QualityError
from structprune.models.arch import Linear, arch_of, blocks, linears
from structprune.models.experts import recording_experts
from structprune.models.gradients import MEANS, GradientMean, GradientMeans
from structprune.models.identity import skeleton
from structprune.models.outputs import Output, per_token, tail
from structprune.models.rank_batches import rank_batches
from structprune.models.spill import Spilled
from structprune.models.streamed import Batch, Model
from structprune.models.walk import Block, Call, capture, replaced_forward, resident
from structprune.storage.durable import blame
from structprune.storage.scratch import scratch_folder

# The largest gradient that enters a block is brought to between 2**4 and 2**5. Float16 ends at 2**16, which
# leaves the block room to amplify it 2000 times, and at 2**-24, which keeps what is 2**28 times smaller.
EXPONENT = 5


def backward(
    model: Model,
    batches: Sequence[Batch],
    *,
    means: Sequence[GradientMean] = MEANS,
    folder: Path | None = None,
) -> Iterator[tuple[Block, dict[str, GradientMeans]]]:
    """Yield each block, last to first, with the gradients of its linears by label.

    Both are for use before the next block is asked for: then the block's weights and the dict are let go.

    The loss of a sample is the mean cross entropy over its next tokens, padding left out. In memory are one
    block, its gradients and one batch of activations; the model is left as it was, also when an error is
    raised.

    Args:
        model: In memory, or streamed: then one block is resident at a time.
        batches: Text: token ids and, where sequences are padded, an attention mask; of several processes each
            walks with its own, and all get the sums.
        means: Which means to keep.
        folder: Where hidden states are spilled, in a folder of their own that is always removed, as many
            bytes as blocks x tokens x hidden size; None: the system's temporary folder, which some systems
            hold in memory.

    Raises:
        InputError: There is no sample, a batch holds more than text, a sample has no token to predict, or a
            linear does not read every token once.
        QualityError: A gradient is not finite.
        EnvironmentFailure: The disk of the folder is full or may not be written.
    """
    shared = rank_batches(batches)
    samples = sum(len(_real_tokens(batch)) for batch in shared.every)
    real = [_real_tokens(batch) for batch in shared]
    if samples == 0:
        raise InputError(
            "there are no samples to compute gradients from",
            hint="give at least one sample: --samples 1 or more",
        )
    arch = arch_of(skeleton(model))
    found = [
        Block(index, prefix, module, linears(prefix, module, arch))
        for index, (prefix, module) in enumerate(blocks(model, arch))
    ]
    with _temporary(folder) as place:
        states = [Spilled(place / f"block-{index}") for index in range(len(found) + 1)]
        calls = capture(model, shared, states[0].append)
        for block in found:
            with resident(model, block.prefix):
                _forward(block, calls[block.index], states[block.index], states[block.index + 1])
        gradients = Spilled(place / "gradients")
        _finish(model, shared, real, states.pop(), gradients)
        for block in reversed(found):
            with resident(model, block.prefix):
                sums = {
                    linear.label: GradientMeans(linear.weight, samples, means) for linear in block.linears
                }
                _through(block, calls.pop(), real, states.pop(), gradients, sums)
                for found_sums in sums.values():
                    found_sums.add_up(shared.ranks)
                yield block, sums
                # The caller still holds the dict; two blocks' gradients must not be in memory at once.
                sums.clear()


@torch.no_grad()
def _forward(block: Block, calls: list[Call], states: Spilled, results: Spilled) -> None:
    for position, call in enumerate(calls):
        results.append(block.run(states[position], call))


def _finish(
    model: Model, batches: Sequence[Batch], real: list[Tensor], states: Spilled, gradients: Spilled
) -> None:
    """Spill the gradient of each sample's loss by the last block's output, float32."""
    with tail(model) as finish, _frozen(skeleton(model)):
        for position, batch in enumerate(batches):
            # One sample at a time, each with a scale of its own.
            found = []
            for row, hidden in enumerate(torch.split(states[position], 1)):
                sample = {name: value[row : row + 1] for name, value in batch.items()}
                found.append(_loss_gradient(finish, hidden, sample, real[position][row]))
            gradients.append(torch.cat(found))
    states.remove()


@torch.enable_grad()
def _loss_gradient(
    finish: Callable[[Tensor, Batch], Output], hidden: Tensor, sample: Batch, real: Tensor
) -> Tensor:
    """Return the gradient of one sample's loss by its last hidden states, [1, tokens, hidden], float32."""
    hidden.requires_grad_()
    # Padding before the first token predicts nothing either.
    predicts = (real[:-1] & real[1:]).to(hidden.device)
    output = finish(hidden, sample)
    targets = sample["input_ids"][0, 1:].to(hidden.device)[predicts]

    def losses(targets: Tensor, states: Tensor) -> Tensor:
        return functional.cross_entropy(output.head(states).float(), targets, reduction="none")[None]

    loss = per_token(losses, output.vocabulary, targets, output.states[0, :-1][predicts]).mean()
    # The mean makes each token's share small; the scale makes up for at least that.
    scale = 2.0 ** (EXPONENT + len(targets).bit_length())
    (gradient,) = torch.autograd.grad(loss * scale, hidden)
    return _finite(gradient.float() / scale, "the head", gradient.dtype)


def _through(
    block: Block,
    calls: list[Call],
    real: list[Tensor],
    states: Spilled,
    gradients: Spilled,
    sums: dict[str, GradientMeans],
) -> None:
    """Carry the gradients of all batches from a block's output to its input, adding those of its linears."""
    products = _Products(sums)
    with _frozen(block.module), ExitStack() as stack:
        products.install(block.linears, stack)
        for position, call in enumerate(calls):
            hidden, gradient = states[position], gradients[position]
            scale = _scale(gradient)
            products.begin(real[position].to(hidden.device), scale)
            gradient = _carry(block, call, hidden, gradient * scale) / scale
            gradients[position] = _finite(gradient, block.prefix, hidden.dtype)
    states.remove()


@torch.enable_grad()
def _carry(block: Block, call: Call, hidden: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a block's input, given that of its output, both float32."""
    output = block.run(hidden.requires_grad_(), call)
    (result,) = torch.autograd.grad(output, hidden, gradient.to(output.dtype))
    return result.float()


class _Products:
    """Makes the gradients of a block's weights from what flows through its linears, sample by sample."""

    def __init__(self, sums: dict[str, GradientMeans]) -> None:
        self._sums = sums
        self._seen: set[str] = set()

    def begin(self, real: Tensor, scale: Tensor) -> None:
        """Start a batch: its real tokens, [batch, tokens], and the scale of its gradients, [batch, 1, 1]."""
        self._scale = scale.flatten().tolist()
        samples = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
        # The sample that each row of the flattened batch belongs to; padding belongs to none.
        self._owner = samples.masked_fill(~real, -1).reshape(-1)
        self._seen.clear()

    def install(self, found: list[Linear], stack: ExitStack) -> None:
        """Watch what the linears read and write until `stack` closes."""
        fused: dict[nn.Module, list[Linear]] = {}
        for linear in found:
            if linear.expert is None:
                forward = self._watched(linear, linear.module.forward)
                stack.enter_context(replaced_forward(linear.module, forward))
            else:
                fused.setdefault(linear.module, []).append(linear)
        for module, served in fused.items():
            stack.enter_context(recording_experts(module, served, watch=self._watch))

    def _watched(self, linear: Linear, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def watched(inputs: Tensor) -> Tensor:
            outputs = forward(inputs)
            self._watch(linear, inputs, outputs, None)
            return outputs

        return watched

    def _watch(self, linear: Linear, inputs: Tensor, outputs: Tensor, rows: Tensor | None) -> None:
        read = inputs.detach().reshape(-1, inputs.shape[-1])
        owner = self._owner if rows is None else self._owner[rows]
        if len(read) != len(owner) or linear.label in self._seen:
            raise InputError(
                f"{linear.label}: reads {len(read)} rows, expected each of {len(owner)} tokens once",
                hint="this layer cannot be scored by gradients: --exclude it, or choose another method",
            )
        self._seen.add(linear.label)

        def arrived(gradient: Tensor) -> None:
            self._add(self._sums[linear.label], read, gradient.reshape(-1, gradient.shape[-1]), owner)

        outputs.register_hook(arrived)  # type: ignore[no-untyped-call]  # not annotated there

    @torch.no_grad()
    def _add(self, sums: GradientMeans, inputs: Tensor, gradient: Tensor, owner: Tensor) -> None:
        for sample, scale in enumerate(self._scale):
            (rows,) = torch.where(owner == sample)
            if len(rows):
                # float32 because products of float16 overflow and sums of bfloat16 lose small terms.
                product = gradient[rows].float().T @ inputs[rows].float()
                sums.add(product.div_(scale))


def _scale(gradient: Tensor) -> Tensor:
    """Return the power of two that brings each sample's largest gradient near 2**EXPONENT, [batch, 1, 1]."""
    largest = gradient.abs().amax(dim=(1, 2), keepdim=True)
    # Clamped, because 2**128 is beyond float32.
    exponent = (EXPONENT - torch.frexp(largest).exponent).clamp(-100, 100)
    return torch.ldexp(torch.ones_like(largest), exponent)


def _finite(gradient: Tensor, where: str, dtype: torch.dtype) -> Tensor:
    if not bool(gradient.isfinite().all()):
        raise QualityError(
            f"{where}: the gradient is not finite in {dtype}", hint="compute in bfloat16 or float32"
        )
    return gradient


def _real_tokens(batch: Batch) -> Tensor:
    """Return which tokens are no padding, shape [batch, tokens]."""
    if more := set(batch) - {"input_ids", "attention_mask"}:
        raise InputError(
            f"gradients are computed from text only, the batch also holds {sorted(more)}",
            hint="leave out what is no text, or choose a method that needs no gradients",
        )
    mask = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    if not bool((real[:, :-1] & real[:, 1:]).any(dim=1).all()):
        raise InputError("a sample has no token to predict", hint="each needs two tokens that are no padding")
    return real


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient for the length of a `with`: autograd computes and keeps less."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def _temporary(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        with blame(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder("backward", within=folder) as name:
        yield Path(name)
