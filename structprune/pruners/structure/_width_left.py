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
from structprune.models.groups import BlockKeep, cuts
from structprune.models.identity import names_of, skeleton, stored_dtypes
from structprune.models.native import CONFIG_KEY, beside_biases, sizes_patch
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


def with_biases(
    model: Model, found: Sequence[WidthBlock], shares: Mapping[int, Share], *, native: bool
) -> dict[int, Share]:
    """Return shares that name the linears which get a bias where the mean of what left is put into one.

    Args:
        model: For its configuration.
        found: Its blocks.
        shares: How much of each stays.
        native: Whether the family's own configuration is to say it: of every block then, and of all linears
            that it does not tell apart.
    """
    keeps = [first_units(one.sizes, shares[index].stay) for index, one in enumerate(found)]
    cut = [cut_readers(one, keep) for one, keep in zip(found, keeps, strict=True)]
    new = _new_biases(model, found, cut, native=native)
    return {index: replace(shares[index], biases=paths) for index, paths in enumerate(new)}


def with_new_biases(model: Model, found: Sequence[WidthBlock], *, native: bool) -> list[WidthBlock]:
    """Return blocks counted with the biases that they get once units of every kind leave.

    Args:
        model: For its configuration.
        found: Its blocks.
        native: As for `with_biases`.
    """
    cut = [[path for path, _ in one.readers.values()] for one in found]
    new = _new_biases(model, found, cut, native=native)
    return [one.count_biases(paths) for one, paths in zip(found, new, strict=True)]


def _new_biases(
    model: Model, found: Sequence[WidthBlock], cut: Sequence[Sequence[str]], *, native: bool
) -> list[list[str]]:
    """Return which linears of each block get a bias where these of them lose columns."""
    new = [[*filter(one.lacks_bias, paths)] for one, paths in zip(found, cut, strict=True)]
    if not native:
        return new
    every = beside_biases(skeleton(model).config, {path for paths in new for path in paths})
    return [[*filter(one.lacks_bias, every or ())] for one in found]


def created_biases(
    model: Model, known: WidthBlock, share: Share, keep: BlockKeep
) -> dict[Key, tuple[torch.dtype, int]]:
    """Return the biases that a block gets: in which dtype, and of how many outputs.

    Args:
        model: For names and dtypes.
        known: The block.
        share: What was decided on it.
        keep: What its tensors have afterwards.
    """
    names, dtypes, found = names_of(model), stored_dtypes(model), {}
    rows = {cut.path: len(cut.indices) for cut in cuts(known.module, known.arch, keep) if cut.axis == 0}
    for path in share.biases:
        (stored,) = names.stored_of[f"{known.prefix}.{path}.weight"]
        whole = len(known.module.get_parameter(f"{path}.weight"))
        found[bias_key(stored)] = dtypes[stored], rows.get(f"{path}.weight", whole)
    return found


def patch_of(
    model: Model,
    found: Sequence[WidthBlock],
    keeps: Sequence[BlockKeep],
    shares: Mapping[int, Share],
    *,
    listed: bool = False,
) -> dict[str, Any]:
    """Return what config.json must say of what is left.

    Args:
        model: As it is.
        found: Its blocks.
        keeps: What its tensors have of each afterwards.
        shares: Name the linears that get a bias.
        listed: Whether blocks are listed in any case.
    """
    sizes = [sizes_left(one.sizes, keep) for one, keep in zip(found, keeps, strict=True)]
    biases = [shares[index].biases for index in range(len(found))]
    return sizes_patch(skeleton(model).config, sizes, biases, listed=listed)


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
    config = skeleton(model).config
    family = config.get_text_config().model_type
    for path in sorted({path for known in found for path, _ in known.readers.values() if bias}):
        if beside_biases(config, [path]) is None and any(known.lacks_bias(path) for known in found):
            raise UsageError(
                f"native: the configuration of {family} has no place for the bias of {path} that this repair "
                "adds",
                hint="choose repair: least_squares, or none",
            )
    keeps = [first_units(known.sizes, shares[index].stay) for index, known in enumerate(found)]
    if native == "uniform" and CONFIG_KEY in patch_of(model, found, keeps, shares):
        beside = " beside the biases that this repair adds" if any(shares[0].biases) else ""
        other = "choose repair: least_squares, " if beside else ""
        raise UsageError(
            f"native: the configuration of {family} cannot say the heads that would be left{beside}",
            hint=f"{other}let only channels leave (units), or choose native: pad",
        )


def padded(model: Model, found: Sequence[WidthBlock], shares: Mapping[int, Share]) -> dict[int, Share]:
    """Return shares that leave room in every block for as many units as the widest keeps.

    Raises:
        QualityError: Some block lost nothing, so that no tensor would become smaller.
    """
    there, stay = found[0].there, [one.stay for one in shares.values()]
    room = UnitCounts(*(max(one.of(kind) for one in stay) for kind in ("kv_group", "channel", "head")))
    if CONFIG_KEY in patch_of(model, found, [first_units(one.sizes, room) for one in found], shares):
        # The family cannot say that number of heads.
        room = replace(room, kv_groups=there.kv_groups, heads=there.heads)
    if room == there:
        raise QualityError(
            "native: pad: some block lost nothing, and all others are to be as wide",
            hint="choose native: uniform",
        )
    return {index: replace(one, room=room) for index, one in shares.items()}
