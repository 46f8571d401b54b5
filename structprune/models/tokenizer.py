"""Opening the tokenizer of a model folder, and checking that it fits the model."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from structprune.errors import InputError
from structprune.models.arch import HasSkeleton
from structprune.models.opening import Opening
from structprune.models.shipped import is_shipped, own_config
from structprune.storage.strict_json import read_json

# Settings with a chat template for every occasion stay far below.
SETTINGS_BYTES = 16 * 2**20
# Any of these means that the folder has a tokenizer; special_tokens_map.json alone does not.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def open_tokenizer(path: Path, opening: Opening = Opening()) -> PreTrainedTokenizerBase | None:
    """Open the tokenizer of a model folder, or the one that is meant instead; None when the folder has none.

    Args:
        path: The model folder.
        opening: Which other folder is meant, and whether a tokenizer class that it brings along may run.

    Raises:
        InputError: The other folder has none, the tokenizer's files are damaged, or it needs its own code
            and is not trusted.
    """
    if opening.tokenizer is not None:
        path = Path(opening.tokenizer).expanduser()
    if not has_tokenizer(path):
        if opening.tokenizer is None:
            return None
        raise InputError(f"{path}: there is no tokenizer", hint="--tokenizer takes the folder that holds one")
    factory: Any = AutoTokenizer
    _check_settings(path, opening)
    try:
        tokenizer = factory.from_pretrained(
            path,
            trust_remote_code=opening.trust_remote_code,
            local_files_only=True,
            **_dense_config(path, opening),
        )
    except Exception as error:
        # The library that reads tokenizer.json raises nothing more special than this.
        text = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in text:
            raise InputError(
                f"{path}: the tokenizer brings its own code (auto_map)",
                hint="pass --trust-remote-code, with a pinned --revision, to run it",
            ) from error
        raise InputError(
            f"{_blamed(path, error)}: the tokenizer cannot be opened: {text[:200]}",
            hint="fetch the tokenizer files of the model again",
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _dense_config(path: Path, opening: Opening) -> dict[str, PreTrainedConfig]:
    """Return the configuration that a tokenizer is chosen by, where the folder's own names a file of ours.

    Transformers would warn of a type that it does not know, or run that file.
    """
    file = path / "config.json"
    said = read_json(file, limit_bytes=SETTINGS_BYTES, root=opening.root(path)) if file.exists() else None
    if not isinstance(said, dict) or not is_shipped(said):
        return {}
    return {"config": AutoConfig.for_model(**own_config(said))}


def _check_settings(path: Path, opening: Opening) -> None:
    """Check what transformers reads of the settings without a look at its type.

    Raises:
        InputError: The file is damaged, or a setting is of another type; names file and key.
    """
    file = path / "tokenizer_config.json"
    if not file.exists():
        return
    settings = read_json(file, limit_bytes=SETTINGS_BYTES, root=opening.root(path))
    longest = settings.get("model_max_length") if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        said = f"must hold an object, found {str(settings)[:60]!r}"
    elif longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float)):
        said = f"model_max_length is {str(longest)[:60]!r}, expected a number"
    else:
        return
    raise InputError(f"{file}: {said}", hint="fetch the tokenizer files of the model again")


def _blamed(path: Path, error: Exception) -> Path:
    """Return which file an error is about: the library that reads tokenizer.json has no error of its own."""
    file = path / "tokenizer.json"
    return file if type(error) is Exception and file.exists() else path


def check_vocabulary(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel | HasSkeleton) -> None:
    """Check that there is a tokenizer and that the model has an embedding for each of its ids.

    Raises:
        InputError: No tokenizer, or its largest id has no row in the embeddings.
    """
    skeleton = model if isinstance(model, PreTrainedModel) else model.skeleton
    if tokenizer is None:
        raise InputError(
            f"{skeleton.config.name_or_path}: there is no tokenizer in the model folder",
            hint="give the folder of its tokenizer with --tokenizer, or use a method that needs no data",
        )
    embeddings: Any = skeleton.get_input_embeddings()
    rows, entries = embeddings.weight.shape[0], max(tokenizer.get_vocab().values(), default=-1) + 1
    if entries > rows:
        raise InputError(
            f"{skeleton.config.name_or_path}: the tokenizer has ids up to {entries - 1}, "
            f"the model has embeddings for {rows} ids only",
            hint="use the tokenizer that belongs to this model",
        )
