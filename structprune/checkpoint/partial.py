"""An unfinished folder: which files in it are ours, what a later run can go on from, and how it ended.

A run that was interrupted (killed, stopped by a signal, a full disk) is gone on with by the same command, and
is in the way of any other. A run that ended (a refusal, a missed gate, a failed proof) leaves only its
decisions, for a command that changes what they do not depend on, and is in nobody's way.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from structprune.checkpoint import plans
from structprune.checkpoint.adapter import CONFIG_FILE, TENSOR_FILE
from structprune.checkpoint.beside import find_beside
from structprune.checkpoint.manifest import MANIFEST, OURS, list_files
from structprune.checkpoint.modelling import FILE
from structprune.errors import EnvironmentFailure, InputError
from structprune.storage.durable import UNFINISHED, DurableFile, blame
from structprune.storage.strict_json import read_json
from structprune.storage.weight_files import INDEX, PACKING, SINGLE

FINGERPRINT = f"{OURS}/fingerprint.json"
FINGERPRINT_LIMIT = 2**20
PLANS = plans.PLANS.as_posix()
TRAINING = f"{OURS}/training"
# What the partial says of itself; it is not published.
NOTE = f"{OURS}/partial.json"
_NOTE_LIMIT = 16 * 2**20

# Whatever a run writes into its folder stands here, or is the copy of a file of its source.
_STATE = (
    re.escape(FINGERPRINT),
    re.escape(NOTE),
    rf"{PLANS}/\d\d+-\w+/(plan\.json|(block|budget|fit|gradients|loss)-\d{{4,}}\.safetensors)",
    rf"{TRAINING}/[^/]+",
)
_RESULT = (
    *(re.escape(name) for name in (MANIFEST, SINGLE, INDEX, PACKING, FILE, CONFIG_FILE, TENSOR_FILE)),
    r"(model|packed)-\d+-of-\d+\.safetensors",
    r"config\.json|README\.md",
    rf"{OURS}/(recipe\.yaml|run\.json|report\.json|plots/\w+\.png|evaluation/lm_eval-\w+\.json)",
    rf"{OURS}/source/.+",
)
# Activations on disk of a walk that was killed.
_SCRATCH = re.compile(rf"({PLANS}/[^/]+/structprune-backward-[^/]+)/.*")


class Partial:
    """The unfinished folder of a run.

    Args:
        folder: Where it stands; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, fingerprint: Mapping[str, Any], files: Iterable[str]) -> None:
        """Make the folder ready for a run, which goes on from what it holds.

        Args:
            fingerprint: What shapes the bytes of the result.
            files: Names of the files that the run will write beside those that every run may write.

        Raises:
            EnvironmentFailure: Something else has the name, or a file in it is not ours.
        """
        known = {*files, *self.note.get("files", ())}
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise EnvironmentFailure(
                f"{self.folder}: is no folder, and a run works under this name",
                hint="move it away, or choose another output",
            )
        with blame(self.folder):
            self.folder.mkdir(exist_ok=True)
        self.refuse_foreign(known)
        self._remove_unfinished(known)
        with blame(self.folder):
            (self.folder / MANIFEST).unlink(missing_ok=True)
        self._write(NOTE, {"files": sorted(known), "ended": None})
        self._write(FINGERPRINT, fingerprint)

    def end(self, reason: str) -> None:
        """Note that the run ended, and drop what only it could have published: weights, report, side files.

        Args:
            reason: Why it ended.
        """
        known = self.note.get("files", ())
        self._write(NOTE, {"files": sorted(known), "ended": reason})
        with blame(self.folder):
            for name in self._files():
                if _is_ours(name, known) and not _matches(name, _STATE):
                    (self.folder / name).unlink()
            for path in sorted(self.folder.rglob("*"), reverse=True):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()

    def close(self) -> None:
        """Remove what the folder says of itself, so that it can be published."""
        with blame(self.folder):
            (self.folder / NOTE).unlink(missing_ok=True)

    @property
    def is_ours(self) -> bool:
        """Tell whether a run of ours made the folder: it holds the fingerprint of one."""
        file = self.folder / FINGERPRINT
        return self.folder.is_dir() and not self.folder.is_symlink() and file.is_file()

    @property
    def is_empty(self) -> bool:
        """Tell whether a run was killed here before it wrote anything."""
        begun = {f"{name}{ending}" for name in (NOTE, FINGERPRINT) for ending in ("", UNFINISHED)}
        return not self.folder.is_symlink() and self.folder.is_dir() and begun >= set(self._files())

    @property
    def note(self) -> Mapping[str, Any]:
        """Return what the folder says of itself; empty where that was not written or is damaged."""
        try:
            note = read_json(self.folder / NOTE, limit_bytes=_NOTE_LIMIT)
        except InputError:
            return {}
        sound = isinstance(note, dict) and isinstance(note.get("files"), list)
        return note if sound and all(isinstance(name, str) for name in note["files"]) else {}

    @property
    def has_ended(self) -> bool:
        """Tell whether its run ended by itself."""
        return self.note.get("ended") is not None

    @property
    def has_state(self) -> bool:
        """Tell whether a run could go on from anything."""
        return any(name.startswith((f"{PLANS}/", f"{TRAINING}/")) for name in self._files())

    def describe(self) -> str:
        """Return what is in the folder, and how large it is."""
        names = self._files()
        size = sum((self.folder / name).lstat().st_size for name in names)
        parts = []
        for plan in sorted({name.split("/")[2] for name in names if name.startswith(f"{PLANS}/")}):
            inside = [name for name in names if name.startswith(f"{PLANS}/{plan}/")]
            blocks = sum(Path(name).name.startswith("block-") for name in inside)
            whole = ", complete" if f"{PLANS}/{plan}/plan.json" in inside else ""
            parts.append(f"{plan} ({blocks} block{'s' * (blocks != 1)} decided{whole})")
        if any(name.startswith(f"{TRAINING}/") for name in names):
            parts.append("training")
        if any(name.endswith(".safetensors") and "/" not in name for name in names):
            parts.append("weights")
        return f"{', '.join(parts) or 'nothing decided'}; {_size(size)}"

    def refuse_foreign(self, known: Collection[str] = ()) -> None:
        """Check that every file is one that a run of ours writes.

        Args:
            known: Names of files that belong to its run, beside those that the folder says itself.

        Raises:
            EnvironmentFailure: One is not; it is neither removed nor published.
        """
        known = {*known, *self.note.get("files", ())}
        foreign = [name for name in self._files() if not _is_ours(name, known)]
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise EnvironmentFailure(
                f"{self.folder / foreign[0]}{more}: not written by the run whose unfinished folder holds it",
                hint="move it away; such a folder is removed or renamed as a whole",
            )

    def _files(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        with blame(self.folder):
            names = list_files(self.folder)
        return [*names, MANIFEST] if (self.folder / MANIFEST).exists() else names

    def _remove_unfinished(self, known: Collection[str]) -> None:
        """Remove what was being written when a run was killed."""
        with blame(self.folder):
            for name in self._files():
                if scratch := _SCRATCH.fullmatch(name):
                    shutil.rmtree(self.folder / scratch[1], ignore_errors=True)
                elif name.endswith(UNFINISHED) and name not in known:
                    (self.folder / name).unlink()

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        path = self.folder / name
        with blame(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with DurableFile(path) as file:
            file.write((json.dumps(dict(content), indent=1, sort_keys=True) + "\n").encode())


def partials_of(final: Path) -> list[Partial]:
    """Return the unfinished folders of all runs for this output, and no others, sorted by name."""
    with blame(final.parent):
        found = [Partial(path) for path in find_beside(final, r"\.partial-[0-9a-f]{16}")]
        return [one for one in found if one.is_ours or one.is_empty]


def _is_ours(name: str, known: Collection[str]) -> bool:
    plain = name.removesuffix(UNFINISHED)
    return (
        name in known or plain in known or bool(_SCRATCH.fullmatch(name)) or _matches(plain, _STATE + _RESULT)
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _size(count: int) -> str:
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 10**9
        else f"{count / 1e6:.1f} MB"
        if count >= 10**5
        else f"{count} bytes"
    )
