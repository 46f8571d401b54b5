"""Opens what structprune wrote, by the same act as pruning, and any plain model folder."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from structprune.checkpoint import accelerate as acceleration
from structprune.checkpoint.adapter import is_adapter, merge_adapter, read_adapter
from structprune.checkpoint.manifest import OURS, read_manifest
from structprune.checkpoint.plans import plans_of
from structprune.errors import InputError
from structprune.models.identity import applied, names_of
from structprune.models.opening import Opening
from structprune.models.streamed import Model, open_model, open_reader
from structprune.models.tokenizer import open_tokenizer
from structprune.pruners.catalogue import find


def load(
    folder: str | Path, opening: Opening = Opening(), *, accelerate: str | None = None
) -> tuple[Model, PreTrainedTokenizerBase | None]:
    """Open a folder that structprune wrote, or any model folder, and its tokenizer.

    Args:
        folder: A pruned or recovered model, a kept adapter (its base is opened too), or a plain model.
        opening: How; an adapter and an accelerated model are always held in memory.
        accelerate: "2:4" runs linears with that pattern on sparse kernels where the device measures faster.

    Returns:
        The model in eval mode, and its tokenizer or None.

    Raises:
        InputError: The folder is incomplete, damaged or packed, or an adapter's base is gone or has changed.
        UsageError: `accelerate` is not known, or the model is to be streamed as well.
    """
    if accelerate is not None:
        acceleration.check(accelerate, opening)
        model, tokenizer = load(folder, replace(opening, stream=False))
        acceleration.accelerate(model)
        return model, tokenizer
    path = Path(folder).expanduser()
    if is_adapter(path):
        return _with_adapter(path, opening)
    links = opening.allow_external_symlinks
    if (path / OURS).is_dir() and read_manifest(path, allow_external_symlinks=links) is None:
        raise InputError(
            f"{path}: incomplete, it has no manifest", hint="run the command that wrote it again"
        )
    model = open_model(path, opening)
    if (path / OURS).is_dir():
        for plan in plans_of(path):
            pruner = find(plan.method).model_validate(plan.config)
            if pruner.at_run_time:
                pruner.apply(model, plan)
            else:  # it is in the weights, and in the shapes that config.json tells of
                applied(model).append(plan.id)
    return model, open_tokenizer(path, opening)


def _with_adapter(path: Path, opening: Opening) -> tuple[Model, PreTrainedTokenizerBase | None]:
    adapter = read_adapter(path)
    base = Path(adapter.base)
    if not base.is_dir():
        raise InputError(f"{path}: its base model {base} is not there", hint="put the pruned model back")
    if opening.stream:
        raise InputError(f"{path}: an adapter is added in memory", hint="open it without streaming")
    model, tokenizer = load(base, replace(opening, stream=False))
    found = open_reader(base, opening).scan(names_of(model).ignored).weights
    if found != adapter.base_weights:
        raise InputError(
            f"{path}: trained on weights {adapter.base_weights[:12]}, {base} now holds {found[:12]}",
            hint="put back the pruned model that the adapter was trained on",
        )
    merge_adapter(model, adapter)  # type: ignore[arg-type]  # not streamed, so it is a module
    return model, tokenizer
