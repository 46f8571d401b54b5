"""Opening the processor of a vision-language model: what turns images and text into a batch."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from structprune.errors import EnvironmentFailure, InputError
from structprune.models.opening import Opening

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def processor(folder: str | Path, opening: Opening = Opening()) -> ProcessorMixin:
    """Open the processor of a model folder.

    Args:
        folder: A vision-language model.
        opening: Whether a processor class that it brings along may run.

    Raises:
        EnvironmentFailure: What reads images is not installed.
        InputError: The folder has none, its files are damaged, or it needs its own code and is not trusted.
    """
    path = Path(folder).expanduser()
    if not any((path / name).is_file() for name in PROCESSOR_FILES):
        raise InputError(
            f"{path}: there is no processor for images",
            hint="use a vision-language model whose folder holds processor_config.json, or data of text",
        )
    if find_spec("PIL") is None:
        raise missing_vision(ModuleNotFoundError(name="pillow"))
    factory: Any = AutoProcessor
    try:
        found = factory.from_pretrained(
            path, trust_remote_code=opening.trust_remote_code, local_files_only=True
        )
    except ImportError as error:
        raise missing_vision(error) from error
    except Exception as error:
        # What is wrong in one of its files is told by the classes of many libraries.
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: the processor cannot be opened: {said[:200]}",
            hint="fetch the processor's files of the model again; its own code needs --trust-remote-code",
        ) from error
    if not isinstance(found, ProcessorMixin) or getattr(found, "image_processor", None) is None:
        raise InputError(
            f"{path}: its processor reads no images", hint="use a vision-language model, or data of text"
        )
    return found


def missing_vision(error: ImportError) -> EnvironmentFailure:
    """Return the refusal of images where what reads them is not installed."""
    needed = error.name or " ".join(str(error).split())[:100]
    return EnvironmentFailure(f"reading images needs {needed}", hint="pip install 'structprune[vision]'")
