"""Recovery: train a masked low-rank change on text, keep what helps on text that was kept away, merge it.

Weights, gradients and moments are float32 whatever dtype the model is stored in: in half precision a step of
this size is lost in rounding, or the loss explodes. Products may be taken in bfloat16, which has float32's
range. What counts is measured in float32, with weights rounded to the stored dtype.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structprune.checkpoint.adapter import LowRankChange, merge
from structprune.errors import InputError, QualityError
from structprune.meeting import blaming_peers
from structprune.models.streamed import StreamedModel
from structprune.plan.plan import Plan
from structprune.progress import Progress, silent
from structprune.ranks import Ranks
from structprune.recipe.options import RecoverOptions
from structprune.recovery.checkpointing import checkpointed
from structprune.recovery.loop import Loop
from structprune.recovery.masked_lora import MaskedLayers
from structprune.recovery.masks import check_merged, reapply, trained_names, zeros
from structprune.recovery.outcome import Recovery
from structprune.recovery.sharding import Shards, whole
from structprune.recovery.state import TrainingState
from structprune.recovery.windows import split_off


def train(
    model: PreTrainedModel,
    masks: Mapping[str, Tensor],
    windows: Tensor,
    options: RecoverOptions,
    *,
    teacher: PreTrainedModel | None = None,
    ranks: Ranks = Ranks(),
    state: TrainingState | None = None,
    progress: Progress = silent,
) -> Recovery:
    """Recover a pruned model in place: train, keep the best, merge; no removed weight comes back.

    Args:
        model: In the dtypes it will be saved in; they are the same afterwards.
        masks: By parameter name, in the parameter's layout, True = kept. These tensors train. A weight
            that is zero though its mask keeps it stays zero too, so that the measured sparsity does not move.
        windows: Token ids, shape [windows, length]; a part of them is held out.
        options: How to train, with ranks by importance spelled out; the seed is that of the split, of the
            order and of the first factors.
        teacher: The dense model; its logits are imitated in the proportion that the options give. It is moved
            to the device, otherwise unchanged.
        ranks: Those that train together, each calling this.
        state: Where to go on, and to write down at every check how; a training without it begins anew.
        progress: Told (stage, done, total): of the first look at the held-out loss, then of "recover".

    Returns:
        The losses and the best change; `model` has it merged.

    Raises:
        QualityError: Nothing beats the start, or the loss is not a number before anything did; the model's
            weights are then as they were.
        InputError: Too few windows, a tensor that cannot be trained, or a teacher with another vocabulary;
            or a damaged state.
    """
    training, held_out = split_off(windows, options.held_out, options.seed)
    if teacher is not None:
        check_teacher(model, teacher)
        device: Any = model.device  # a torch.device, which transformers' types do not take
        teacher.to(device).eval()
    reapply(model, masks)
    removed = {name: zeros(model.get_parameter(name)) for name in masks}
    dtypes = {name: model.get_parameter(name).dtype for name in masks}
    with _in_float32(model), _seeded(options):
        layers = _layers(model, sorted(masks), options)
        try:
            loop = Loop(model, layers, dtypes, options, teacher, ranks, state)
            with checkpointed(model, asked=options.gradient_checkpointing):
                recovery = loop.run(training, held_out, progress)
        finally:
            layers.remove()
    if recovery.best_step == 0:
        raise _no_gain(recovery)
    for name, factors in recovery.factors.items():
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(merge(parameter, factors))
        check_merged(name, parameter, removed[name])
    recovery.zeros = removed
    return recovery


def train_divided(
    model: StreamedModel,
    plans: Sequence[Plan],
    windows: Tensor,
    options: RecoverOptions,
    *,
    teacher: StreamedModel | None = None,
    ranks: Ranks,
    state: TrainingState | None = None,
    progress: Progress = silent,
) -> Recovery:
    """Train as `train` does, with a part of the model in each process; arguments and errors are those.

    Args:
        model: Streamed; it is used up.
        plans: What was decided on it; beyond what they removed, what is zero stays zero.
        windows: Token ids, shape [windows, length].
        options: How to train.
        teacher: The dense model, streamed; it is used up, too.
        ranks: Those that train together, each calling this.
        state: Where to go on.
        progress: Told (stage, done, total): of the first look at the held-out loss, then of "recover".

    Returns:
        The losses, and in the first process the best change; nothing is merged.
    """
    training, held_out = split_off(windows, options.held_out, options.seed)
    if teacher is not None:
        check_teacher(model.skeleton, teacher.skeleton)
    shards = Shards(model)
    with _seeded(options), blaming_peers():
        names = trained_names(shards.module)
        layers = _layers(shards.module, names, options)
        shards.divide(names, plans)
        dense = None
        if teacher is not None:
            theirs = Shards(teacher)
            theirs.divide()
            dense = theirs.module
        loop = Loop(shards.module, layers, shards.dtypes, options, dense, ranks, state)
        with checkpointed(shards.module, asked=options.gradient_checkpointing):
            recovery = loop.run(training, held_out, progress)
    if recovery.best_step == 0:
        raise _no_gain(recovery)
    divided, recovery.factors = recovery.factors, {}
    with blaming_peers():
        for name, part in divided.items():
            factors = LowRankChange(whole(part.left), whole(part.right), part.scaling)
            if ranks.first:
                recovery.factors[name] = factors
    recovery.zeros = shards.zeros
    return recovery


@contextmanager
def _seeded(options: RecoverOptions) -> Iterator[None]:
    """Compute gradients, and draw from the recovery's own seed."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)
        yield


def _layers(model: PreTrainedModel, names: Sequence[str], options: RecoverOptions) -> MaskedLayers:
    assert options.ranks != "importance"
    return MaskedLayers(
        model,
        names,
        rank=options.rank,
        alpha=options.alpha,
        ranks=options.ranks,
        alphas=options.alphas,
    )


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model in float32, without dropout; its dtypes, devices and mode are restored at the end."""
    before = {name: (t.dtype, t.device) for name, t in _tensors(model)}
    mode = model.training
    # Dropout would only blur the few steps there are; what guards against overfitting is the held-out check.
    for _, tensor in _tensors(model):
        tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
    model.train(False)
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            dtype, device = before[name]
            tensor.data = tensor.data.to(device, dtype)
        model.train(mode)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that speaks of other tokens; both may be without weights.

    Raises:
        InputError: The vocabularies differ in size.
    """
    ours, theirs = (m.get_input_embeddings().get_parameter("weight").shape[0] for m in (model, teacher))
    if ours != theirs:
        raise InputError(
            f"the teacher has {theirs} tokens in its vocabulary, the model {ours}",
            hint="the teacher is the dense model that was pruned",
        )


def _no_gain(recovery: Recovery) -> QualityError:
    """Say by how much every check missed the start."""
    if recovery.stopped:
        return QualityError(
            f"{recovery.stopped}, and nothing before it beat the start ({recovery.start_loss:.4f})",
            hint="use a smaller learning rate",
        )
    best = min(recovery.history, key=lambda check: check.held_out_loss)
    return QualityError(
        f"no check beat the held-out loss at the start, {recovery.start_loss:.4f}; "
        f"the lowest was {best.held_out_loss:.4f} after step {best.step}",
        hint="use other data, more steps or another learning rate",
    )
