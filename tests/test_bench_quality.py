"""What the bench of weight pruners works out from its cells."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from structprune.pruners.catalogue import find
from tests.tiny import tiny

BENCH = Path(__file__).parent.parent / "scripts" / "bench"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benches are scripts: each finds the files beside it."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


def cell(row: str, at: str, kl: float, **more: Any) -> dict[str, Any]:
    found = {"row": row, "sparsity": at, "seed": 0, "fields": {"sparsity": at}, "matrices": {}}
    found |= {"windows": [kl * 9, kl * 11], "tokens": [10, 10], "kl": kl, "parameters": 100}
    return found | {"perplexity": 8.0, "dense_perplexity": 4.0, "calibration_cpu_seconds": 3.2} | more


def kept(*cells: dict[str, Any]) -> dict[str, Any]:
    facts = {"model": "tiny", "protocol": "2 windows", "parameters": 100, "linears": 80, "date": "2026-01-02"}
    return facts | {
        "processor": "one",
        "prompts": ["Once"],
        "dense": cell("dense", "0", 0),
        "cells": [*cells],
    }


def test_files_of_one_model_are_taken_together(tmp_path: Path) -> None:
    from quality_tables import together

    first, second = tmp_path / "1.json", tmp_path / "2.json"
    first.write_text(json.dumps(kept(cell("wanda", "0.5", 0.2))))
    second.write_text(json.dumps(kept(cell("wanda", "2:4", 0.4)) | {"date": "2026-01-03"}))
    [found] = together([first, second])
    assert [one["sparsity"] for one in found["cells"]] == ["0.5", "2:4"] and found["date"] == "2026-01-03"
    second.write_text(json.dumps(kept() | {"protocol": "3 windows"}))
    with pytest.raises(SystemExit, match=r"2\.json: tiny was measured with another protocol"):
        together([first, second])


def test_a_table_has_what_was_measured_beside_dense() -> None:
    from quality_tables import table

    cells = cell("wanda", "0.5", 0.2), cell("cfsp", "20% smaller", 0.1, perplexity=6.0)
    assert table(kept(*cells)).splitlines() == [
        "|  | 0.5 | 20% smaller | s to decide | seeds |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 8 (0) | 8 (0) |  |  |",
        "| wanda | 8 (0.200 ± 0.020) |  | 3 | 1 |",
        "| cfsp |  | 6 (0.100 ± 0.010), 0.0 M left | 3 | 1 |",
    ]


def test_a_pair_is_told_in_errors_of_its_windows() -> None:
    from quality_tables import pairs

    worse, better = cell("magnitude", "0.5", 0.4), cell("wanda", "0.5", 0.2, perplexity=6.0)
    *_, line = pairs([worse, better])
    # 0.36 and 0.44 less 0.18 and 0.22 are 0.18 and 0.22: 0.2 with an error of 0.02.
    assert line == "| magnitude - wanda | 0.5 | 0.20000 | 10.0 | 10.0 | 50%, 50% |"


@pytest.mark.parametrize(
    ("at", "fields", "parameters", "left"),
    [
        ("0.5", {"sparsity": "0.5"}, 100, 0.6),
        ("2:4", {"sparsity": "2:4"}, 110, 0.7),
        ("2:4", {"sparsity": "0.4"}, 100, 0.68),
        ("20% smaller", {"sparsity": "0.2"}, 84, 0.84),
    ],
)
def test_what_is_left_is_stored_and_not_zero(
    at: str, fields: dict[str, str], parameters: int, left: float
) -> None:
    from quality_plot import left_of

    one = cell("wanda", at, 0.2, fields=fields, parameters=parameters)
    assert left_of(kept(), one) == pytest.approx(left)


@pytest.mark.parametrize("size", ["20% smaller", "50% smaller"])
def test_methods_of_other_kinds_of_unit_leave_a_model_as_small(size: str) -> None:
    from quality import Bench

    bench: Any = SimpleNamespace(dense=tiny("llama"))
    gone = {}
    for method in ("random_units", "cfsp"):
        stage = find(method).model_validate({"sparsity": Bench.share(bench, method, {}, size)})
        gone[method] = float(stage.sparsity) * stage.forecast(bench.dense).of
    assert gone["cfsp"] == pytest.approx(gone["random_units"], rel=1e-5)


def test_a_plot_leaves_out_what_is_beyond_it(tmp_path: Path) -> None:
    from quality_plot import draw, file_of, points_of

    found = kept(cell("wanda", "0.5", 0.2), cell("wanda", "0.7", 2, perplexity=1e6), cell("cfsp", "2:4", 1))
    assert points_of(found, "wanda") == {"0.5": (0.6, 8.0)}
    draw(found, tmp_path / "new" / file_of(found))
    assert 0 < (tmp_path / "new" / "tiny.png").stat().st_size < 150_000


def test_a_model_that_was_not_measured_again_keeps_its_figures(tmp_path: Path) -> None:
    from figures import write_section

    page = tmp_path / "README.md"
    write_section("quality.py", "old words\n\n### one\n\n1\n\n### two\n\n2", page)
    write_section("quality.py", "new words\n\n### two\n\n3", page, others_stay=True)
    write_section("alone.py", "4", page)
    said = page.read_text()
    assert "\n\nSections: [quality.py](#qualitypy) · [alone.py](#alonepy)\n\n## " in said
    assert said.count("Sections:") == 1
    assert said.endswith("## quality.py\n\nnew words\n\n### two\n\n3\n\n### one\n\n1\n\n## alone.py\n\n4\n")
