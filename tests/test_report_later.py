"""Figures of a later evaluation on the page: they find their run, and what is no figure is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import structprune
from structprune.report.comparison import side_by_side, trade_offs
from structprune.report.finished import FinishedRun, read_runs
from structprune.report.later import add_figures
from tests.conftest import Command
from tests.specimens import TEXT, no_fresh_process, quick, run
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, two runs of it, and what two evaluations of "half" printed."""
    folder = tmp_path_factory.mktemp("later")
    save_tiny("llama", folder / "model")
    text, other = folder / "text.txt", folder / "other.txt"
    text.write_text(TEXT)
    other.write_text(TEXT[200:])
    with no_fresh_process():
        for name, sparsity in (("half", "0.5"), ("third", "0.3")):
            words = ["prune", folder / "model", folder / name, "--method", "magnitude"]
            done = run(*words, "--sparsity", sparsity, *quick(text))
            assert done.code == 0, done.err
    for name, model, read, length in (
        ("other.json", "half", other, 16),
        ("third.json", "third", other, 16),
        ("again.json", "half", text, 24),
        ("dense.json", "model", text, 16),
    ):
        words = ["evaluate", folder / model, "--compare", folder / "model", "--text", read]
        done = run(*words, "--length", length, "--windows", 3, "--json")
        assert done.code == 0, done.err
        (folder / name).write_text(done.out)
    return folder


def read(runs: Path, *figures: str) -> tuple[FinishedRun, FinishedRun]:
    half, third = add_figures(read_runs([runs / "half", runs / "third"]), [runs / name for name in figures])
    return half, third


def said(runs: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / name).read_text())
    return found


class TestFigures:
    def test_they_stand_beside_those_of_their_run_alone(self, runs: Path) -> None:
        before, unchanged = read(runs)
        half, third = read(runs, "other.json")
        assert third == unchanged
        later = said(runs, "other.json")
        for what in ("perplexity", "divergence"):
            assert half.report["evaluation"][what] == before.report["evaluation"][what] | later[what]
            assert set(half.report["evaluation"][what]) == {"text", "other"}
        stamps = half.report["evaluation"]["protocol"]["texts"]
        assert stamps["other"] == later["protocol"]["texts"]["other"] | {"dense": later["dense"]}
        assert stamps["text"] == before.report["evaluation"]["protocol"]["texts"]["text"]
        assert half.report["evaluation"]["generations"] == before.report["evaluation"]["generations"]

    def test_of_one_text_the_later_ones_count(self, runs: Path) -> None:
        before, _ = read(runs)
        half, _ = read(runs, "other.json", "again.json")
        later = said(runs, "again.json")
        found = half.report["evaluation"]
        assert found["divergence"]["text"] == later["divergence"]["text"]
        assert found["divergence"]["text"] != before.report["evaluation"]["divergence"]["text"]
        assert found["protocol"]["texts"]["text"]["length"] == 24
        assert "other" in found["perplexity"]

    def test_runs_of_other_sources_are_compared_where_both_stand_beside_one_dense_model(
        self, runs: Path
    ) -> None:
        half, third = read(runs, "other.json", "third.json")
        second = copy.deepcopy(dict(third.report))
        second["parameters"]["dense"] += 1000  # its source had been made from another model
        rows = side_by_side([half, replace(third, report=second)])
        both = {row.what for row in rows if row.how and "-" not in row.cells}
        assert both >= {"Perplexity, other", "KL from dense in nats per token, other"}
        assert "Perplexity, text" not in both
        assert [chart.title for chart in trade_offs([half, third])][-1].startswith("KL from dense on other")

    def test_a_run_that_measured_nothing_gets_them(self, runs: Path) -> None:
        (half,) = read_runs([runs / "half"])
        bare = replace(half, report={**half.report, "evaluation": None})
        (with_figures,) = add_figures([bare], [runs / "other.json"])
        assert with_figures.report["evaluation"]["perplexity"] == said(runs, "other.json")["perplexity"]

    def test_they_are_on_the_page_wherever_the_folder_lies(
        self, runs: Path, tmp_path: Path, command: Command
    ) -> None:
        (tmp_path / "moved").symlink_to(runs / "half")
        page = tmp_path / "page.html"
        words = ["report", tmp_path / "moved", runs / "third"]
        done = command(*words, "--figures", runs / "other.json", "-o", page)
        assert done.code == 0, done.err
        text = page.read_text()
        assert "Perplexity, other" in text and "3 windows of 16 tokens" in text
        structprune.report_runs([runs / "half"], tmp_path / "bare.html")
        assert "Perplexity, other" not in (tmp_path / "bare.html").read_text()


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no such file"),
            ("not JSON", "JSON"),
            ("[]", "no figures of an evaluation"),
            ('{"status": "error", "code": 3, "error": {}}', "perplexity: Field required"),
            ({"perplexity": {"text": 3}}, "perplexity.text"),
            ({"run": None}, "no run of structprune wrote"),
            ({"run": "0" * 64}, "none of the folders"),
        ],
    )
    def test_it_is_refused_in_a_line(
        self, content: str | dict[str, Any] | None, message: str, runs: Path, tmp_path: Path, command: Command
    ) -> None:
        file = tmp_path / "figures.json"
        if content is not None:
            whole = content if isinstance(content, str) else json.dumps(said(runs, "other.json") | content)
            file.write_text(whole)
        done = command("report", runs / "half", "--figures", file, "-o", tmp_path / "a.html", "--json")
        assert done.code == 3
        assert str(file) in done.json["error"]["message"] and message in done.json["error"]["message"]
        assert done.json["error"]["hint"]
        assert not (tmp_path / "a.html").exists()

    def test_figures_of_the_dense_model_belong_to_no_run(self, runs: Path, command: Command) -> None:
        assert said(runs, "dense.json")["run"] is None

    def test_a_file_of_figures_is_never_the_output(
        self, runs: Path, tmp_path: Path, command: Command
    ) -> None:
        file = tmp_path / "figures.html"
        file.write_text((runs / "other.json").read_text())
        before = file.read_text()
        done = command("report", runs / "half", "--figures", file, "-o", file, "--overwrite", "--json")
        assert done.code == 2 and "never written to" in done.json["error"]["message"]
        assert file.read_text() == before
