import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from structprune.checkpoint import output
from structprune.checkpoint.beside import beside, partial_of
from structprune.checkpoint.inputs import Input, local_inputs
from structprune.checkpoint.lock import Lock
from structprune.checkpoint.manifest import MANIFEST, check_manifest, read_manifest
from structprune.checkpoint.output import check_output
from structprune.errors import EnvironmentFailure, InputError, StructpruneError, UsageError
from tests.checkpoints import fingerprint, write
from tests.results import begin, build


def test_the_manifest_names_missing_changed_and_added_files(tmp_path: Path, caplog) -> None:
    final = tmp_path / "out"
    build(write(tmp_path / "source"), final)
    assert check_manifest(final) == []
    raw = bytearray((final / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (final / "model.safetensors").write_bytes(raw)
    (final / "config.json").unlink()
    (final / "adapter_config.json").write_text("{}")
    (final / "results.json").write_text("{}")
    (final / ".DS_Store").write_text("")
    with caplog.at_level(logging.WARNING):
        problems = check_manifest(final)
    assert len(problems) == 3
    assert any("model.safetensors was changed" in problem for problem in problems)
    assert "config.json is missing" in problems
    assert any(problem.startswith("adapter_config.json was added") for problem in problems)
    assert "results.json was added" in caplog.text
    assert ".DS_Store" not in caplog.text


def test_a_manifest_keeps_stages_and_facts_and_lists_every_file(tmp_path: Path) -> None:
    build(write(tmp_path / "source", shards=2), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.version, manifest.stages, manifest.facts) == ("1", ["01-wanda"], {"of": "source"})
    found = fingerprint(tmp_path / "out")
    del found[MANIFEST], found["structprune"]
    assert {name: file.sha256 for name, file in manifest.files.items()} == found


def test_a_folder_without_a_manifest_is_incomplete(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert "never completed" in check_manifest(tmp_path)[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"format": 1, "version": "1", "files": {"../x": {"bytes": 1, "sha256": "' + "0" * 64 + '"}}}',
            "leads out",
        ),
        ('{"version": "1", "files": {"x": {"bytes": 1, "sha256": "00"}}}', r"files\.x\.sha256"),
        ('{"version": "1", "files": {}, "format": 3}', "format"),
        ('{"version": "1", "files": {}, "format": 2}', "seal"),
        ('{"version": "1"', "not valid JSON"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=problem):
        read_manifest(tmp_path)


def inputs_of(model: Path | None) -> list[Input]:
    return local_inputs("the model", model)


def refuse(
    model: Path | None, out: Path, *, overwrite: bool = False, needed_bytes: int = 0
) -> StructpruneError:
    with pytest.raises(StructpruneError) as caught:
        check_output(inputs_of(model), out, overwrite=overwrite, needed_bytes=needed_bytes)
    assert "\n" not in str(caught.value)
    return caught.value


def test_input_and_output_are_never_inside_each_other_also_through_links(tmp_path: Path) -> None:
    model = write(tmp_path / "models" / "one")
    before = fingerprint(tmp_path)
    (tmp_path / "link").symlink_to(model)
    for out, relation in (
        (model, "is the model itself"),
        (tmp_path / "link", "is the model itself"),
        (tmp_path / "models" / "two" / ".." / "one", "is the model itself"),
        (model / "out", "lies inside the model"),
        (tmp_path / "link" / "deep" / "out", "lies inside the model"),
        (tmp_path / "models", "holds the model"),
    ):
        error = refuse(model, out, overwrite=True)
        assert isinstance(error, UsageError)
        assert error.exit_code == 2
        assert relation in error.message
    (tmp_path / "link").unlink()
    assert fingerprint(tmp_path) == before


def test_an_output_that_exists_is_replaced_only_on_demand(tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    mine = tmp_path / "mine"
    mine.mkdir()
    assert check_output(inputs_of(model), mine, overwrite=False) == mine
    (mine / "thesis.txt").write_text("years of work")
    error = refuse(model, mine)
    assert error.exit_code == 4
    assert "not made by structprune" in error.message
    assert "--overwrite would remove all that is in it" in error.hint
    assert check_output(inputs_of(model), mine, overwrite=True) == mine
    build(model, tmp_path / "out")
    assert "a result of structprune" in refuse(model, tmp_path / "out").message


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("text")
    for place in (tmp_path / "out", tmp_path / "out" / "deeper"):
        error = refuse(None, place, overwrite=True)
        assert error.exit_code == 4
        assert "is a file" in error.message


def test_working_folder_and_home_are_protected(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in (tmp_path / "work", Path(), tmp_path / "home", Path("/")):
        assert refuse(None, place, overwrite=True).exit_code == 2
    assert check_output([], Path("out"), overwrite=False) == tmp_path / "work" / "deep" / "out"


def test_a_disk_that_is_too_full_is_found_before_the_work(tmp_path: Path) -> None:
    error = refuse(None, tmp_path / "new" / "out", needed_bytes=10**18)
    assert error.exit_code == 4
    assert "GB free" in error.message
    assert "1000000000.06 GB" in error.message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_found_before_the_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(output.os, "access", lambda path, mode: False)
    error = refuse(None, tmp_path / "out")
    assert error.exit_code == 4
    assert "cannot be written to" in error.message


def place_inputs(out: Path, elsewhere: Path) -> dict[str, Path]:
    """Lay an input into the output in every way there is."""
    (out / "texts").mkdir(parents=True)
    (out / "text.txt").write_text("years of work")
    (out / "texts" / "deep.txt").write_text("years of work")
    elsewhere.mkdir()
    (elsewhere / "link.txt").symlink_to(out / "text.txt")
    (elsewhere / "shards").mkdir()
    (elsewhere / "shards" / "model.safetensors").symlink_to(out / "text.txt")
    (elsewhere / "real.txt").write_text("years of work")
    (out / "alias.txt").symlink_to(elsewhere / "real.txt")
    (elsewhere / "adapter").mkdir()
    (elsewhere / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(out)})
    )
    return {
        "a file": out / "text.txt",
        "a deeper file": out / "texts" / "deep.txt",
        "a folder": out / "texts",
        "a link to a file": elsewhere / "link.txt",
        "a folder with a link to a file": elsewhere / "shards",
        "a link in the output": out / "alias.txt",
        "the base of an adapter": elsewhere / "adapter",
    }


def test_no_input_lies_in_the_output_in_whatever_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for what, path in place_inputs(out, tmp_path / "elsewhere").items():
        with pytest.raises(UsageError, match=rf"out: the output (holds|is) (the base of )?{what}") as caught:
            check_output(local_inputs(what, str(path)), out, overwrite=True)
        assert caught.value.exit_code == 2


def test_names_that_are_no_paths_are_nobodys_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("a file of that name")
    for name in ("demo", "owner/model", "wikitext:wikitext-2-raw-v1", None):
        assert local_inputs("the text", name) == []
    assert local_inputs("the text", "./demo") == [Input("the text", Path("demo"))]


def test_the_built_in_model_and_what_was_downloaded_are_always_inputs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    demo = Path(output.__file__).parents[1] / "demo"
    for place, named in (
        (demo / "model" / "out", "lies inside the built-in model"),
        (demo, "holds the built-in model"),
        (tmp_path / "cache", "holds the folder of downloaded models"),
        (tmp_path / "cache" / "hub" / "models--a--b", "lies inside the folder of downloaded models"),
    ):
        assert named in refuse(None, place, overwrite=True).message


def test_a_plan_in_the_folder_of_an_unfinished_run_is_an_input_too(tmp_path: Path) -> None:
    plan = begin(tmp_path / "out") / "structprune" / "plans"
    plan.mkdir()
    with pytest.raises(UsageError, match="holds the plan"):
        check_output(local_inputs("the plan", plan), tmp_path / "out", overwrite=False)


def test_a_file_that_has_the_name_of_the_lock_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "poetry.lock").write_text("[[package]]")
    error = refuse(None, tmp_path / "poetry")
    assert error.exit_code == 4
    assert "poetry.lock: is a file of 11 bytes and no lock of structprune" in error.message
    with Lock(tmp_path / "out"):
        assert check_output([], tmp_path / "out", overwrite=False) == tmp_path / "out"


def in_a_fork_as_nobody(action: Callable[[], object]) -> str:
    """Run an action as another user and return the message with which it was refused."""
    read, told = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setegid(65534)
            os.seteuid(65534)
            action()
        except EnvironmentFailure as failure:
            os.write(told, failure.message.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(told)
    with os.fdopen(read) as pipe:
        return pipe.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("lock_up", "said"),
    [
        (lambda out: None, ""),
        (lambda out: (out / "plots").chmod(0o555), "plots may not be written to"),
        (lambda out: os.chown(out / "plots", 0, 0), "plots may not be written to"),
        (lambda out: (out / "a.txt").chmod(0o000), ""),
        (lambda out: os.chown(out / "a.txt", 0, 0), ""),
        (lambda out: os.chown(out.parent, 0, 0), "may not be written to"),
        (
            lambda out: out.chmod(0o1777) or os.chown(out, 0, 0) or os.chown(out / "a.txt", 0, 0),
            "a.txt belongs",
        ),
    ],
)
def test_what_could_not_be_removed_afterwards_is_found_before_the_work(lock_up, said: str) -> None:
    # Not under pytest's own folders, which other users may not enter.
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        out = Path(name) / "place" / "out"
        (out / "plots").mkdir(parents=True)
        (out / "plots" / "b.png").touch()
        (out / "a.txt").touch()
        for path in (out.parent, *out.parent.rglob("*")):
            os.chown(path, 65534, 65534)
        lock_up(out)
        told = in_a_fork_as_nobody(lambda: check_output([], out, overwrite=True))
        assert said in told
        assert bool(said) == bool(told)
        assert (out / "a.txt").exists()


def test_a_file_that_the_system_protects_is_found_before_the_work(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "immutable.txt").touch()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **more: "immutable" not in str(path) and access(path, mode)
    )
    error = refuse(None, out, overwrite=True)
    assert error.exit_code == 4
    assert "immutable.txt is protected by the system" in error.message


def test_a_name_that_leaves_no_room_for_an_ending_is_shortened_and_stays_its_own(tmp_path: Path) -> None:
    long, other = tmp_path / ("ä" * 120), tmp_path / ("ä" * 119 + "o")
    assert len(os.fsencode(long.name)) == 240
    names = {beside(one, ".partial-0123456789abcdef").name for one in (long, other)}
    assert len(names) == 2
    assert all(len(os.fsencode(name)) <= 255 for name in names)
    assert beside(tmp_path / "out", ".lock").name == "out.lock"
    model = write(tmp_path / "model")
    for final in (long, other):
        build(model, final)
        build(model, final)
        assert check_manifest(final) == []
        assert partial_of(final, "0" * 64).name.startswith("ä")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model", long.name, other.name])


def test_a_name_that_is_too_long_is_told_as_such(tmp_path: Path) -> None:
    for out in (tmp_path / ("o" * 256), tmp_path / "new" / ("o" * 256), tmp_path / ("o" * 256) / "out"):
        error = refuse(None, out)
        assert error.exit_code == 4
        assert error.message.endswith("a name of 256 bytes, the disk takes 255")
        assert error.hint == "choose a shorter name"
