"""Commands that write, the places that they run in, and what must be true of a place whatever happened."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from structprune.checkpoint.manifest import MANIFEST, check_manifest
from tests.forks import Ended, Parent
from tests.specimens import CHECKS, TRAINING, calibrated, quick, result_of

# What a user may have beside OUT; the latter under names that look like ours.
NEIGHBOURS = ("out.txt", "other.lock", "outer/structprune.json")
LOOK_ALIKES = (
    "out.old-backup/thesis.txt",
    "out.old-2024/model.safetensors",
    "out.old-x.removed/notes.txt",
    "out.partial-mine/structprune.json",
    "out.pruned.old-1/a.txt",
)


@dataclass(frozen=True)
class Story:
    """A command that writes `out`.

    Attributes:
        words: The command line, of the specimens' folder.
        replaces: Something stands at OUT before, and the command replaces it.
    """

    words: Callable[[Path], list[object]]
    replaces: bool = False


def _prune(specimens: Path, method: str, *more: object) -> list[object]:
    text = specimens / "text.txt"
    return ["prune", specimens / "model", "out", "--method", method, *calibrated(text), *quick(text), *more]


def _recover(specimens: Path, *more: object) -> list[object]:
    return [
        "recover",
        specimens / "pruned",
        "out",
        "--data",
        specimens / "text.txt",
        *TRAINING,
        *CHECKS,
        *more,
    ]


def _both(specimens: Path) -> list[object]:
    keys = {"data": specimens / "text.txt", "steps": 4, "check_every": 2, "length": 16, "rank": 2}
    keys |= {"batch_size": 2, "learning_rate": 1e-2}
    sets = [word for key, value in keys.items() for word in ("--set", f"recover.{key}={value}")]
    return _prune(specimens, "magnitude", "--sparsity", 0.6, *sets)


STORIES: dict[str, Story] = {
    "prune": Story(lambda s: _prune(s, "wanda", "--sparsity", 0.5)),
    "prune, streamed": Story(lambda s: _prune(s, "sparsegpt", "--sparsity", "2:4", "--stream")),
    "prune in place of a former result": Story(
        lambda s: _prune(s, "magnitude", "--overwrite"), replaces=True
    ),
    "sweep": Story(lambda s: _prune(s, "wanda", "--sparsity", "0.3,0.5")),
    "apply": Story(lambda s: ["apply", s / "model", "out", "--plan", s / "solved"]),
    "export": Story(lambda s: ["export", s / "pruned", "out", "--to", "bitmask"]),
    "unpack": Story(lambda s: ["export", s / "packed", "out", "--to", "dense"]),
    "recover": Story(_recover),
    "recover, adapter kept": Story(lambda s: _recover(s, "--keep-adapter")),
    "prune and recover": Story(_both),
}


@dataclass(frozen=True)
class Place:
    """A folder in which a command writes `out`, with a user's own files beside it."""

    folder: Path
    story: Story
    specimens: Path
    neighbours: tuple[str, ...] = NEIGHBOURS

    @classmethod
    def furnish(
        cls, folder: Path, story: Story, specimens: Path, neighbours: Sequence[str] = NEIGHBOURS
    ) -> "Place":
        """Make the folder, and what stands in it before the command."""
        for name in neighbours:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"the only copy of {name}")
        if story.replaces:
            shutil.copytree(specimens / "solved", folder / "out")
        return cls(folder, story, specimens, tuple(neighbours))

    @property
    def words(self) -> list[object]:
        """Return the command line."""
        return [*self.story.words(self.specimens), "--json"]

    def contents(self) -> dict[str, str]:
        """Return everything in the folder that the same command gives again."""
        return result_of(self.folder)

    def wrong_with_neighbours(self) -> list[str]:
        """Return what happened to the user's own files."""
        wrong = []
        for name in self.neighbours:
            path = self.folder / name
            if not path.is_file():
                wrong.append(f"{name} is gone")
            elif path.read_text() != f"the only copy of {name}":
                wrong.append(f"{name} was changed")
        return wrong

    def wrong_with_output(self, right: Mapping[str, str]) -> list[str]:
        """Return why `out` is neither absent, nor what stood there before, nor the whole new result.

        Args:
            right: The contents after an undisturbed run.
        """
        out = self.folder / "out"
        results = [out] if not out.exists() or (out / MANIFEST).exists() else sorted(out.iterdir())
        wrong = []
        for result in results:
            name = result.relative_to(self.folder).as_posix()
            if not result.exists() or ".partial-" in name or name.endswith(".lock"):
                continue
            wrong += [f"{name}: {problem}" for problem in check_manifest(result)]
            found = {f"{name}/{key}": value for key, value in result_of(result).items()}
            new = {key: value for key, value in right.items() if key.startswith(f"{name}/")}
            old = {f"{name}/{key}": value for key, value in result_of(self.specimens / "solved").items()}
            if found != new and not (self.story.replaces and found == old):
                wrong.append(f"{name} is neither old nor new: {differences(found, new)}")
        return wrong

    def wrong_after(self, ended: Ended, right: Mapping[str, str]) -> list[str]:
        """Return what is wrong after the command was run to its end where it had been stopped before."""
        done = ended.code == 0
        if not done and not (ended.code == 4 and "exists" in ended.error.get("message", "")):
            return [f"the same command: exit {ended.code}: {ended.err.strip()[-400:]}"]
        found = self.contents()
        if not done:
            # Complete, and killed before its lock was gone: the lock of a dead process is nobody's.
            stale = {name for name in found.keys() - right.keys() if name.endswith(".lock")}
            found = {name: said for name, said in found.items() if name not in stale}
        wrong = [] if found == right else [f"other than undisturbed: {differences(found, right)}"]
        return wrong + self.wrong_with_neighbours() + self.wrong_with_output(right)


def differences(found: Mapping[str, str], right: Mapping[str, str]) -> str:
    """Return the first names at which two contents differ."""
    told = [f"+{name}" for name in found.keys() - right.keys()]
    told += [f"-{name}" for name in right.keys() - found.keys()]
    told += [f"~{name}" for name in found.keys() & right.keys() if found[name] != right[name]]
    return ", ".join(sorted(told)[:8])


def undisturbed(parent: Parent, folder: Path, story: Story, specimens: Path) -> tuple[Ended, dict[str, str]]:
    """Run a story's command once to its end; return how it ended, and what is there then."""
    place = Place.furnish(folder, story, specimens)
    ended = parent.run(place.words, folder)
    assert ended.code == 0, ended.err
    assert place.wrong_with_neighbours() == []
    return ended, place.contents()
