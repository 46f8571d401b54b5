"""What training takes of one process, counted before anything runs: memory, operations, bytes that move."""

import math

from structprune.calibration.data import positions, window_length
from structprune.models.arch import Linear, all_linears
from structprune.models.cost import count, parameters_of, stored_bytes
from structprune.models.identity import skeleton
from structprune.models.outputs import SLICE_BYTES
from structprune.models.streamed import Model
from structprune.pruners.demand import Demand, Sharing
from structprune.recipe.options import RecoverOptions
from structprune.recovery.windows import held_out_of, windows_wanted

# Weights, gradients and moments are float32 whatever the files hold.
NUMBER = 4
# A change, its gradient and two moments; the best change so far, and a copy while that is taken.
FACTORS = 6
# What trains, two moments and the best change; twice.
STATES = 8
# Of a weight's size: its sum with a change, what that is made of, and its gradient.
WORKING = 4
# Logits of a slice, their logarithms and gradients, and once more in the backward pass.
SLICES = 8
# How much more than its tensors the memory of a processor holds, in which tensors of many sizes come and go,
# and how many blocks' states pass before what one left is used again: with glibc, on SmolLM2-135M.
HOLES, PASSING = 1.5, 6
# On a card: a block's states, and their gradients. Never measured.
PASSING_ON_CARD = 2
# How often something of a weight's size is read or written in a step: the sum is made forward and once more
# backward, the gradient made, masked and scaled.
WEIGHT_PASSES = 24
# What a product reads and writes, and what stands between two: forward, and twice as often backward.
STATE_PASSES = 9


def step_sharing(options: RecoverOptions, model: Model) -> Sharing:
    """Return the sequences of one step."""
    length = window_length(options.length, positions(model.config))
    routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return Sharing(options.batch_size, length, options.batch_size, routed=routed or 1)


def training_bytes(
    options: RecoverOptions, model: Model, teacher: Model | None, sharing: Sharing, device: str = "cpu"
) -> int:
    """Return the peak that training is expected to need, beside what Python takes.

    Args:
        options: How to train.
        model: What is trained; its parameters may be on the meta device.
        teacher: What is imitated, if anything.
        sharing: As `step_sharing` gives it.
        device: Where it is trained.
    """
    found = _linears(model)
    held = NUMBER * parameters_of(skeleton(model)) + _trained(found)  # a mask takes a byte for each weight
    if model.dtype.itemsize != NUMBER:
        held += stored_bytes(model).all  # what was read, too, until it was converted
    if teacher is not None:
        held += stored_bytes(teacher).all
    factors = FACTORS * _factors(options, found)
    working = WORKING * max((one.weight.numel() for one in found), default=0)
    on_processor = not device.startswith("cuda")
    kept = _kept(options, model, sharing, PASSING if on_processor else PASSING_ON_CARD)
    kept *= HOLES if on_processor else 1
    return held + int(NUMBER * (factors + working + kept)) + SLICES * SLICE_BYTES


def state_bytes(options: RecoverOptions, model: Model) -> int:
    """Return what the state of a training takes on disk: at a check the next one lies beside the last.

    Args:
        options: How to train.
        model: What is trained; its parameters may be on the meta device.
    """
    return NUMBER * STATES * _factors(options, _linears(model))


def training_demand(options: RecoverOptions, model: Model, teacher: Model | None, sharing: Sharing) -> Demand:
    """Return what all steps and all looks at the held-out text take.

    Args:
        options: How to train.
        model: What is trained; its parameters may be on the meta device.
        teacher: What is imitated, if anything.
        sharing: As `step_sharing` gives it.
    """
    found, flops = _linears(model), _flops(model, sharing)
    # Forward, and backward to what each product reads and to what it multiplies with.
    times = 4 if options.gradient_checkpointing else 3
    step = (times * flops + (_flops(teacher, sharing) if teacher is not None else 0)) * sharing.tokens
    looks = 1 + math.ceil(options.steps / options.check_every)
    look = flops * held_out_of(windows_wanted(options), options.held_out) * sharing.length
    moved = STATE_PASSES * _states(found, sharing) + WEIGHT_PASSES * _trained(found)
    return Demand(forward=step * options.steps + look * looks, state_bytes=NUMBER * moved * options.steps)


def _linears(model: Model) -> list[Linear]:
    return [one for block in all_linears(model) for one in block]


def _factors(options: RecoverOptions, found: list[Linear]) -> int:
    """Return how many numbers all changes have, at most."""
    ranks = options.ranks.values() if options.ranks != "importance" else ()
    rank = max([options.rank, *ranks])
    return sum(rank * int(sum(one.weight.shape)) for one in found)


def _trained(found: list[Linear]) -> int:
    return sum(one.weight.numel() for one in found)


def _states(found: list[Linear], sharing: Sharing) -> float:
    """Return how many numbers the linears read and write in a step; about as many stand between them."""
    return sum(sum(one.weight.shape) * sharing.tokens_of(one) for one in found)


def _kept(options: RecoverOptions, model: Model, sharing: Sharing, passing: int) -> float:
    """Return how many numbers wait for the backward pass.

    Args:
        options: How to train.
        model: What is trained.
        sharing: A step's sequences.
        passing: Of how many blocks the states are there where they are run once more.
    """
    each = [_states(found, sharing) for found in all_linears(model)]
    if not options.gradient_checkpointing:
        return sum(each)
    hidden: int = model.config.get_text_config().hidden_size
    return min(sum(each), passing * max(each) + len(each) * hidden * sharing.tokens)


def _flops(model: Model, sharing: Sharing) -> float:
    return count(model, length=sharing.length).flops_per_token or 0.0
