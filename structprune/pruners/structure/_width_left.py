"""What a loss of width leaves in a checkpoint: configuration, equal widths, values of what reads units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from structprune.calibration.statistics import Statistics
from structprune.decide.unit_counts import UnitCounts
from structprune.decide.units import first_units, sizes_left
from structprune.errors import QualityError, UsageError
from structprune.models.arch import Linear
from structprune.models.groups import BlockKeep
from structprune.models.identity import names_of, skeleton, stored_dtypes
from structprune.models.native import CONFIG_KEY, sizes_patch
from structprune.models.streamed import Model
from structprune.plan.key import Key
from structprune.pruners.structure._family import bias_key
from structprune.pruners.structure._width_block import WidthBlock
from structprune.pruners.structure._width_goal import Share
from structprune.solvers.columns import ColumnRepair, Repaired


@dataclass(frozen=True)
class Columns:
    """Columns of a matrix that reads units.

    Attributes:
        kept: Those that are read afterwards, ascending, shape [kept].
        stored: Those that the matrix still has, others of which are zeros then; None for all.
    """

    kept: Tensor
    stored: Tensor | None


def repaired_tensors(
    model: Model, linear: Linear, columns: Columns, repair: ColumnRepair | None, seen: Statistics
) -> dict[Key, Tensor]:
    """Return new values of a matrix that lost columns, and of its bias.

    Args:
        model: For names and dtypes.
        linear: The matrix as it is.
        columns: Which of them are read, and which are stored.
        repair: What makes up for the others.
        seen: Of the matrix's input.
    """
    found: dict[Key, Tensor] = {}
    made = Repaired() if repair is None else repair.repair(linear.weight, columns.kept, seen)
    name = names_of(model).stored_of[linear.name][0]
    dtype, value = stored_dtypes(model)[name], made.weight
    kept, stored = columns.kept, columns.stored
    if stored is None or len(stored) > len(kept):
        left = linear.weight.detach()[:, kept] if value is None else value
        places = kept if stored is None else torch.searchsorted(stored, kept)
        value = left.new_zeros(len(left), linear.weight.shape[1] if stored is None else len(stored))
        value[:, places] = left
    if value is not None:
        found[Key(name, "value")] = (value.T if linear.transposed else value).to(dtype).contiguous()
    if made.bias is not None:
        before = linear.module._parameters.get("bias")
        total = made.bias if before is None else made.bias + before.detach().float()
        found[bias_key(name)] = total.to(dtype)
    return found


def cut_readers(known: WidthBlock, keep: BlockKeep) -> list[str]:
    """Return the paths of a block's matrices that lose columns."""
    return [path for kind, (path, _) in known.readers.items() if known.columns(kind, keep) is not None]


def patch_of(
    model: Model,
    found: Sequence[WidthBlock],
    keeps: Sequence[BlockKeep],
    *,
    bias: bool = False,
    listed: bool = False,
) -> dict[str, Any]:
    """Return what config.json must say of what is left.

    Args:
        model: As it is.
        found: Its blocks.
        keeps: What stays of each.
        bias: Whether matrices that lose columns get a bias.
        listed: Whether blocks are listed in any case.
    """
    pairs = list(zip(found, keeps, strict=True))
    new = [[path for path in cut_readers(*pair) if bias and pair[0].lacks_bias(path)] for pair in pairs]
    sizes = [sizes_left(known.sizes, keep) for known, keep in pairs]
    return sizes_patch(skeleton(model).config, sizes, new, listed=listed)


def check_native(
    model: Model, found: Sequence[WidthBlock], shares: Mapping[int, Share], native: str, *, bias: bool
) -> None:
    """Check that the family's configuration can say what is to be left.

    Args:
        model: As it is.
        found: Its blocks.
        shares: What is known of the blocks before any data.
        native: "uniform" or "pad".
        bias: Whether matrices that lose columns get a bias.

    Raises:
        UsageError: It has no place for a bias, or for so many heads.
    """
    family = skeleton(model).config.get_text_config().model_type
    if bias and any(known.new_biases for known in found):
        raise UsageError(
            f"native: the configuration of {family} has no place for the biases that this repair adds",
            hint="choose repair: least_squares, or none",
        )
    keeps = [first_units(known.sizes, shares[index].stay) for index, known in enumerate(found)]
    if native == "uniform" and CONFIG_KEY in patch_of(model, found, keeps):
        raise UsageError(
            f"native: the configuration of {family} cannot say the heads that would be left",
            hint="let only channels leave (units), or choose native: pad",
        )


def padded(model: Model, found: Sequence[WidthBlock], shares: Mapping[int, Share]) -> dict[int, Share]:
    """Return shares that leave room in every block for as many units as the widest keeps.

    Raises:
        QualityError: Some block lost nothing, so that no tensor would become smaller.
    """
    there, stay = found[0].there, [one.stay for one in shares.values()]
    room = UnitCounts(*(max(one.of(kind) for one in stay) for kind in ("kv_group", "channel", "head")))
    if CONFIG_KEY in patch_of(model, found, [first_units(one.sizes, room) for one in found]):
        # The family cannot say that number of heads.
        room = replace(room, kv_groups=there.kv_groups, heads=there.heads)
    if room == there:
        raise QualityError(
            "native: pad: some block lost nothing, and all others are to be as wide",
            hint="choose native: uniform",
        )
    return {index: replace(one, room=room) for index, one in shares.items()}
