"""Opening the tokenizer of a model folder, and checking that it fits the model."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from structprune.errors import InputError
from structprune.models.arch import HasSkeleton
from structprune.models.opening import Opening

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
    try:
        tokenizer = factory.from_pretrained(
            path, trust_remote_code=opening.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in text:
            raise InputError(
                f"{path}: the tokenizer brings its own code (auto_map)",
                hint="pass --trust-remote-code, with a pinned --revision, to run it",
            ) from error
        raise InputError(
            f"{path}: the tokenizer cannot be opened: {text[:200]}",
            hint="fetch the tokenizer files of the model again",
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


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
