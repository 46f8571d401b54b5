"""From what a user typed to a folder with a model in it: the built-in one, a local folder, or a hub name."""

import logging
import re
from pathlib import Path

from structprune.calibration.text_source import DEMO, DEMO_VISION, DEMOS
from structprune.errors import InputError, UsageError
from structprune.storage.hub import hub_failure

logger = logging.getLogger(__name__)

# Nothing else is fetched: no pickles, no other frameworks' weights.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md", "*.py")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str, *, revision: str | None = None) -> Path:
    """Return the folder of a model.

    Args:
        model: "demo" or "demo-vision" for a built-in model, a local folder, or a hub name "owner/name".
        revision: Branch, tag or commit of a hub name.

    Raises:
        UsageError: It is no text and no path, but a model in memory, say.
        InputError: Nothing of that name exists here, and it is no hub name.
        EnvironmentFailure: The hub cannot be reached, or refuses.
    """
    check_name(model)
    if model in DEMOS:
        if Path(model).is_dir():
            logger.warning("'%s' is a built-in model; the folder of that name here is ./%s", model, model)
        return demo_folder(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(
            f"{model}: a file, expected a model folder", hint="give the folder that holds config.json"
        )
    if not _HUB_NAME.fullmatch(model) or model.startswith("."):
        raise InputError(
            f"{model}: no such folder", hint="give a model folder, 'demo', or a hub name 'owner/name'"
        )
    return _download(model, revision)


def check_name(model: object) -> str:
    """Return what names a model; the library is called with whatever people have at hand.

    Raises:
        UsageError: It is no text and no path.
    """
    if isinstance(model, str | Path):
        return str(model)
    raise UsageError(
        f"a model is named by a folder or a hub name, found an object of type {type(model).__name__}",
        hint="save it with save_pretrained and give the folder",
    )


def demo_folder(name: str = DEMO) -> Path:
    """Return the folder of a built-in model."""
    return Path(__file__).parents[1] / "demo" / ("vision/model" if name == DEMO_VISION else "model")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, OSError) as error:
        raise hub_failure(error, name) from None
