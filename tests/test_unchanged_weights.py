"""Weight files of which a run changes nothing: copied, reflinked, hard links, or only referred to."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import structprune
from structprune.checkpoint.export import export
from structprune.checkpoint.manifest import MANIFEST, read_manifest
from structprune.checkpoint.output import check_linkable
from structprune.checkpoint.plans import plans_of
from structprune.checkpoint.writing import Writing
from structprune.errors import EnvironmentFailure, InputError, UsageError
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.pipeline.bench import contender
from structprune.progress import silent
from structprune.proof.verify import verify
from structprune.pruners import catalogue
from structprune.recipe.recipe import assemble
from structprune.storage.reader import CheckpointReader
from structprune.storage.reference import REFERENCE
from structprune.storage.unchanged import place_file
from tests.checkpoints import fingerprint
from tests.conftest import Command
from tests.killing import is_killed_at
from tests.methods import QUICK, short_runs
from tests.pictures import Pictures
from tests.seeing import save_rows
from tests.tiny import save_tiny

HALF = {"method": "divprune", "target": {"keep_ratio": 0.5}}
FILE = "model.safetensors"
QUIETLY = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    with short_runs():
        yield


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("sharded") / "model", shards=4, depth=4)


def prune_half(model: Path, out: Path, *, reload: bool = False, **writing: Any) -> dict[str, Any]:
    pruner = catalogue.find("divprune")(target={"keep_ratio": 0.5})
    return structprune.prune(model, out, pruner, writing=Writing(reload=reload, **writing))


@pytest.fixture
def referring(seeing: Path, tmp_path: Path) -> Path:
    """Return a folder that refers to a copy of its source: tmp_path / "base"."""
    shutil.copytree(seeing, tmp_path / "base")
    prune_half(tmp_path / "base", tmp_path / "out", unchanged="refer")
    return tmp_path / "out"


class TestOneFile:
    def test_a_copy_is_hashed_as_it_is_made_and_stands_alone(self, sharded: Path, tmp_path: Path) -> None:
        reader = CheckpointReader(sharded)
        (name, *_) = reader.shards
        source = tmp_path / name
        shutil.copyfile(sharded / name, source)
        source.chmod(0o400)
        placed = place_file(reader.stored_file(name), tmp_path / "copy")
        assert placed.way == "copied"
        assert placed.sha256 == fingerprint(sharded)[name]
        assert placed.digests == {
            entry: digest
            for entry, digest in placed.digests.items()
            if reader.scan().hashes[entry[0]] == digest
        }
        assert [entry[0] for entry in placed.digests] == [*reader.shards[name]]
        assert (tmp_path / "copy").stat().st_mode & 0o200 and (tmp_path / "copy").stat().st_nlink == 1

    def test_where_files_can_share_their_bytes_none_is_written(
        self, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def clone(target: int, request: int, source: int) -> int:
            assert request == 0x40049409  # FICLONE of linux/fs.h
            os.pwrite(target, os.pread(source, 2**24, 0), 0)
            return 0

        monkeypatch.setattr(fcntl, "ioctl", clone)
        reader = CheckpointReader(sharded)
        (name, *_) = reader.shards
        copied = place_file(reader.stored_file(name), tmp_path / "clone")
        assert copied.way == "reflinked" and copied.sha256 == fingerprint(sharded)[name]
        assert (tmp_path / "clone").read_bytes() == (sharded / name).read_bytes()

    def test_a_file_that_changes_meanwhile_is_refused(self, sharded: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(sharded, tmp_path / "model"))
        reader = CheckpointReader(folder)
        (name, *_) = reader.shards
        os.utime(folder / name, ns=(1, 1))
        with pytest.raises(InputError, match="was changed while it was being read"):
            place_file(reader.stored_file(name), tmp_path / "copy")
        assert not [*tmp_path.glob("copy*")]

    def test_what_cannot_be_a_link_is_refused(self, sharded: Path, tmp_path: Path) -> None:
        (name, *_) = CheckpointReader(sharded).shards
        with pytest.raises(EnvironmentFailure, match="on different disks") as caught:
            check_linkable([sharded / name], Path("/dev/shm/out"))
        assert "leave --link out" in caught.value.hint
        with pytest.raises(EnvironmentFailure, match="cannot be a hard link") as caught:
            place_file(CheckpointReader(sharded).stored_file(name), tmp_path / "no" / name, link=True)
        assert "leave --link out" in caught.value.hint

    @QUIETLY
    def test_a_kill_anywhere_leaves_what_the_next_run_replaces(self, sharded: Path, tmp_path: Path) -> None:
        before = fingerprint(sharded)
        for unchanged in ("copy", "link"):
            for number in range(2, 200, 9):
                folder = tmp_path / f"{unchanged}-{number}"
                folder.mkdir()

                def write(folder: Path = folder, unchanged: Any = unchanged) -> object:
                    return export(CheckpointReader(sharded), folder, silent, unchanged=unchanged)

                killed = is_killed_at(number, write)
                written = export(CheckpointReader(sharded), folder, silent)
                assert {name: written.hashes[name] for name in before} == before == fingerprint(sharded)
                assert written.weights.keys() == {"copied"}
                if not killed:
                    break
            assert not killed


class TestShards:
    def test_those_of_which_nothing_changes_are_not_written_anew(self, sharded: Path, tmp_path: Path) -> None:
        stage = {"method": "magnitude", "sparsity": 0.5, "include": [r"layers\.0\."]}
        raw = {"model": str(sharded), "output": str(tmp_path / "out"), "prune": stage}
        report = structprune.prune(assemble(raw), writing=Writing(reload=False))
        same = [
            file.name
            for file in sharded.glob("*.safetensors")
            if file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
        ]
        sizes = {file.name: file.stat().st_size for file in sharded.glob("*.safetensors")}
        assert 0 < len(same) < len(sizes)
        assert report["weights"] == {
            "written": sum(sizes.values()) - sum(sizes[name] for name in same),
            "copied": sum(sizes[name] for name in same),
        }
        assert verify(tmp_path / "out", sharded, reload=False).ok

    def test_linked_ones_are_the_sources_own(self, sharded: Path, tmp_path: Path, command: Command) -> None:
        words = ("prune", sharded, tmp_path / "out", "--method", "magnitude", "--include", r"layers\.0\.")
        done = command(*words, "--link", "--no-evaluate")
        assert done.code == 0 and "an edit of one would change" in done.err
        told = " ".join(done.out.split())
        assert "hard links to the model's" in told and "the others written anew" in told
        linked = [
            file for file in (tmp_path / "out").glob("*.safetensors") if file.samefile(sharded / file.name)
        ]
        assert 0 < len(linked) < 5
        card = (tmp_path / "out/README.md").read_text()
        assert "are hard links to those of `model`: **an edit of one is an edit of both**" in card

    def test_blocks_that_move_up_are_written(self, sharded: Path, tmp_path: Path) -> None:
        report = structprune.prune(
            sharded,
            tmp_path / "out",
            "block_drop",
            sparsity=0.25,
            **QUICK | {"writing": Writing(reload=False)},
        )
        assert report["weights"]["written"] > 0
        assert verify(tmp_path / "out", reload=False).ok


class TestReferring:
    def test_it_holds_no_weights_and_runs_as_a_copy_does(
        self, referring: Path, seeing: Path, tmp_path: Path, command: Command
    ) -> None:
        assert not [*referring.rglob("model*.safetensors")]
        report = json.loads((referring / "structprune/report.json").read_text())
        assert report["weights"] == {"referred": (seeing / FILE).stat().st_size}
        assert report["bytes"]["pruned"] == report["bytes"]["dense"]
        prune_half(seeing, tmp_path / "copy")
        model, tokenizer = structprune.load(referring)
        assert tokenizer is not None
        picture = Pictures("llava").batch()
        assert torch.equal(logits(model, picture), logits(structprune.load(tmp_path / "copy")[0], picture))
        assert [plan.id for plan in plans_of(referring)] == [plan.id for plan in plans_of(tmp_path / "copy")]
        one, other = (read_manifest(folder) for folder in (referring, tmp_path / "copy"))
        assert one is not None and other is not None
        assert (one.weights, one.tensors) == (other.weights, other.tensors)
        # A line of the terminal may end anywhere in a path.
        said = "".join(command("inspect", referring).out.split())
        told = "divprune drops visual tokens while structprune runs it; under any other program"
        where = f"those in {tmp_path / 'base'}: only structprune opens this folder"
        assert all("".join(one.split()) in said for one in (told, where))
        assert command("evaluate", referring, "--questions", save_rows(tmp_path)).code == 0
        assert verify(referring, seeing).ok
        assert (
            contender("out", referring, Opening()).as_json()["file_bytes"] == (seeing / FILE).stat().st_size
        )

    def test_no_other_program_takes_it_for_a_model(self, referring: Path) -> None:
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForImageTextToText.from_pretrained(referring)

    def test_the_card_and_the_summary_say_so(self, seeing: Path, tmp_path: Path, command: Command) -> None:
        words = ("prune", seeing, tmp_path / "out", "--method", "divprune", "--no-evaluate", "--refer")
        planned = command(*words, "--dry-run", "--json").json
        assert planned["loads_in"] == ["structprune"]
        assert planned["disk_bytes"] < (seeing / FILE).stat().st_size
        done = command(*words)
        assert done.code == 0
        assert "not in the folder, only where they are" in done.out and "transformers" not in done.out
        card = (tmp_path / "out/README.md").read_text()
        assert "**Only structprune opens it**" in card and "library_name: structprune" in card

    def test_a_base_that_moved_is_named_and_the_plan_outlives_it(
        self, referring: Path, tmp_path: Path, command: Command
    ) -> None:
        (tmp_path / "base").rename(tmp_path / "moved")
        for words in (("inspect", referring), ("evaluate", referring)):
            done = command(*words)
            assert done.code == 3, words
            assert f"{tmp_path}/base/{FILE} is not there, expected" in done.err and "sha256" in done.err
            assert f"structprune apply MODEL NEW --plan {referring}" in done.err
        assert command("verify", referring).code == 6
        again = Writing(reload=False, unchanged="refer")
        structprune.apply(str(tmp_path / "moved"), tmp_path / "new", referring, writing=again)
        assert command("inspect", tmp_path / "new").code == 0

    @pytest.mark.parametrize("how", ["longer", "touched", "unnoticed"])
    def test_a_base_that_changed_is_refused(
        self, how: str, referring: Path, tmp_path: Path, command: Command
    ) -> None:
        file = tmp_path / "base" / FILE
        tensors, status = load_file(file), file.stat()
        if how == "longer":
            tensors["more"] = torch.zeros(4)
        else:
            tensors[next(iter(tensors))].flatten()[0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        if how == "unnoticed":
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert not verify(referring, reload=False).ok  # which reads every byte
        done = command("evaluate", referring, "--text", "demo")
        assert done.code == 3
        if how == "unnoticed":  # what opens a model for a run hashes its tensors anyway
            assert "was changed after it was written" in done.err
            with pytest.raises(InputError, match="was changed after it was written"):
                structprune.load(referring, check=True)
        else:
            assert f"{file} was changed" in done.err and "put that file back" in done.err
            with pytest.raises(InputError, match=f"{FILE} was changed"):
                structprune.load(referring)

    def test_a_base_that_was_only_touched_is_read_and_taken(self, referring: Path, tmp_path: Path) -> None:
        os.utime(tmp_path / "base" / FILE, ns=(1, 1))
        assert structprune.load(referring)[0] is not None

    def test_the_base_is_no_output(self, referring: Path, tmp_path: Path, command: Command) -> None:
        done = command("prune", referring, tmp_path / "base", "--method", "magnitude", "--overwrite")
        assert done.code == 2 and "the base of the model" in done.err

    def test_what_it_says_is_held_to_what_was_written(self, referring: Path, command: Command) -> None:
        file = referring / REFERENCE
        file.write_text(file.read_text().replace('"format": 1', '"format":  1'))
        assert "structprune/weights.json has" in command("inspect", referring).err
        said = json.loads(file.read_text())
        for changed, told in (
            (said | {"folder": "elsewhere"}, "folder"),
            (said | {"files": {"../x.safetensors": next(iter(said["files"].values()))}}, "files"),
            (said | {"files": {}}, "files"),
        ):
            file.write_text(json.dumps(changed))
            (referring / MANIFEST).unlink(missing_ok=True)
            with pytest.raises(InputError, match=f"weights.json: {told}"):
                CheckpointReader(referring)

    def test_weights_beside_it_are_refused(self, referring: Path, seeing: Path) -> None:
        shutil.copyfile(seeing / FILE, referring / FILE)
        with pytest.raises(InputError, match="which says that they are elsewhere"):
            CheckpointReader(referring)

    def test_a_folder_that_refers_is_referred_through(self, seeing: Path, tmp_path: Path) -> None:
        everything = catalogue.find("divprune")(target={"keep_ratio": 1.0})
        writing = Writing(reload=False, unchanged="refer")
        structprune.prune(seeing, tmp_path / "one", everything, writing=writing)
        export(CheckpointReader(tmp_path / "one"), tmp_path, silent, unchanged="refer")
        assert json.loads((tmp_path / REFERENCE).read_text())["folder"] == str(seeing.resolve())


class TestFlags:
    def test_what_makes_no_sense_is_refused_by_name(
        self, seeing: Path, llama: Path, referring: Path, tmp_path: Path, command: Command
    ) -> None:
        out = tmp_path / "refused"
        for words, told in (
            (
                ("prune", seeing, out, "--method", "divprune", "--link", "--refer"),
                "--link and --refer are two",
            ),
            (("prune", llama, out, "--method", "magnitude", "--refer"), "--refer: magnitude changes weights"),
            (("prune", llama, out, "--method", "magnitude", "--refer", "--dry-run"), "magnitude changes"),
            (("recover", llama, out, "--data", "demo", "--refer"), "--refer: training changes weights"),
            (("recover", llama, out, "--data", "demo", "--link", "--keep-adapter"), "--link: an adapter"),
            (("export", llama, out, "--to", "2:4", "--link"), "--link: an export"),
        ):
            done = command(*words)
            assert done.code == 2, words
            assert told in done.err
        done = command("export", referring, out, "--to", "bitmask")
        assert done.code == 3 and "holds no weights of its own" in done.err
        with pytest.raises(UsageError, match="'steal' is not known"):
            Writing(unchanged="steal")  # type: ignore[arg-type]
        assert not out.exists()

    def test_an_interrupted_run_that_referred_is_no_start_for_one_that_copies(
        self, seeing: Path, tmp_path: Path
    ) -> None:
        def stop(stage: str, done: int, total: int) -> None:
            if stage == "verify":
                raise KeyboardInterrupt

        raw = {
            "model": str(seeing),
            "output": str(tmp_path / "out"),
            "prune": HALF,
            "evaluate": {"skip": True},
        }
        with pytest.raises(KeyboardInterrupt):
            structprune.prune(assemble(raw), writing=Writing(unchanged="refer"), progress=stop)
        with pytest.raises(EnvironmentFailure, match="an interrupted run differs in unchanged"):
            structprune.prune(assemble(raw), writing=Writing(reload=False))
        structprune.prune(assemble(raw), writing=Writing(reload=False, unchanged="refer"))
        assert not [*(tmp_path / "out").glob("*.safetensors")]
