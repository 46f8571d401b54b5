import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from structprune.checkpoint import output
from structprune.checkpoint.manifest import MANIFEST, check_manifest, read_manifest, write_manifest
from structprune.checkpoint.output import check_output, discard, partial_of, partials_of, publish, settle
from structprune.checkpoint.side_files import copy_side_files
from structprune.errors import EnvironmentFailure, InputError, StructpruneError, UsageError
from structprune.storage.reader import CheckpointReader
from structprune.storage.writer import ShardWriter
from tests.checkpoints import fingerprint, tensors, write


def build(source: Path, final: Path) -> None:
    """Write a whole result the way a run does: partial folder, manifest last, rename."""
    settle(final)
    fresh = partial_of(final, "0123456789abcdef0123")
    discard(fresh)
    fresh.mkdir()
    reader = CheckpointReader(source)
    hashes = copy_side_files(source, fresh)
    with ShardWriter(fresh, reader.layout, reader.metadata, index_metadata=reader.index_metadata) as writer:
        for name in reader.tensors:
            writer.write(name, reader.read(name))
    write_manifest(fresh, hashes | writer.hashes, version="1", stages=["01-wanda"], facts={"of": source.name})
    publish(fresh, final, overwrite=True)


def content_of(final: Path) -> str:
    """Which source a complete result came from; empty where there is no result."""
    manifest = read_manifest(final)
    if manifest is None:
        assert not final.exists()
        return ""
    assert check_manifest(final) == []
    return str(manifest.facts["of"])


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> Iterator[list[str]]:
    """Let the call with this number, counted over all that changes the disk, raise; yield what was called."""
    calls: list[str] = []

    def call(name: str, real: Callable[..., object], *args: object) -> object:
        calls.append(name)
        if len(calls) == number:
            raise error
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", partial(call, "write", os.write))
        patch.setattr(os, "replace", partial(call, "replace", os.replace))
        # Nothing here survives a power cut: waiting for the disk hundreds of times would prove nothing.
        patch.setattr(os, "fsync", partial(call, "fsync", lambda descriptor: None))
        yield calls


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_whatever_fails_the_old_result_or_the_whole_new_one_is_there(
    tmp_path: Path, monkeypatch, error
) -> None:
    old, new = write(tmp_path / "old"), write(tmp_path / "new", tensors(seed=1), shards=2)
    before = fingerprint(old) | fingerprint(new)
    final = tmp_path / "out"
    build(old, tmp_path / "former")
    outcomes = []
    for number in range(1, 200):
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(tmp_path / "former", final)
        with failing(monkeypatch, number, error) as calls:
            try:
                build(new, final)
            except (EnvironmentFailure, Killed) as failure:
                told = str(failure)
        if len(calls) < number:
            break
        if isinstance(error, OSError):
            assert str(tmp_path) in told
            assert "No space left" in told
        settle(final)
        outcomes.append(content_of(final))
    assert outcomes.count("old") > 20
    assert outcomes == ["old"] * outcomes.count("old") + ["new"] * outcomes.count("new")
    assert fingerprint(old) | fingerprint(new) == before
    build(new, final)
    assert content_of(final) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["former", "new", "old", "out"]


def test_a_first_result_that_fails_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch) -> None:
    source = write(tmp_path / "source")
    final = tmp_path / "out"
    for number in range(1, 200):
        with failing(monkeypatch, number, Killed()) as calls, suppress(Killed):
            build(source, final)
        if len(calls) < number:
            break
        settle(final)
        assert content_of(final) in ("", "source")
        shutil.rmtree(final, ignore_errors=True)
    assert number > 10


def test_the_partial_folder_of_a_run_has_its_fingerprint_in_its_name(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for print_ in ("a" * 64, "b" * 64):
        partial_of(final, print_).mkdir()
    (tmp_path / "out2.partial-c").mkdir()
    assert [path.name for path in partials_of(final)] == [
        f"out.partial-{16 * 'a'}",
        f"out.partial-{16 * 'b'}",
    ]
    discard(partial_of(final, "a" * 64))
    assert [path.name for path in partials_of(final)] == [f"out.partial-{16 * 'b'}"]


def test_an_incomplete_folder_is_never_published(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    with pytest.raises(ValueError, match="not complete"):
        publish(tmp_path / "partial", tmp_path / "out", overwrite=True)


def test_a_folder_that_came_into_being_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    build(write(tmp_path / "source"), tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "partial")
    with pytest.raises(EnvironmentFailure, match="came into being"):
        publish(tmp_path / "partial", tmp_path / "out", overwrite=False)
    assert content_of(tmp_path / "out") == "source"


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
    del found[MANIFEST]
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


def refuse(
    model: Path | None, out: Path, *, overwrite: bool = False, needed_bytes: int = 0
) -> StructpruneError:
    with pytest.raises(StructpruneError) as caught:
        check_output(model, out, overwrite=overwrite, needed_bytes=needed_bytes)
    assert "\n" not in str(caught.value)
    return caught.value


def test_input_and_output_are_never_inside_each_other_also_through_links(tmp_path: Path) -> None:
    model = write(tmp_path / "models" / "one")
    before = fingerprint(tmp_path)
    (tmp_path / "link").symlink_to(model)
    for out, relation in (
        (model, "is the input itself"),
        (tmp_path / "link", "is the input itself"),
        (tmp_path / "models" / "two" / ".." / "one", "is the input itself"),
        (model / "out", "lies inside the input"),
        (tmp_path / "link" / "deep" / "out", "lies inside the input"),
        (tmp_path / "models", "holds the input"),
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
    assert check_output(model, mine, overwrite=False) == mine
    (mine / "thesis.txt").write_text("years of work")
    error = refuse(model, mine)
    assert error.exit_code == 4
    assert "not made by structprune" in error.message
    assert "--overwrite" in error.hint
    assert check_output(model, mine, overwrite=True) == mine
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
    assert check_output(None, Path("out"), overwrite=False) == tmp_path / "work" / "deep" / "out"


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
