"""What the benches of structure pruners work out from their cells, and where they put it."""

import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "scripts" / "bench"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benches are scripts: each finds the files beside it."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


def cell(row: str, kl: float, *, time: float = 0.5, parameters: int = 10, **more: Any) -> dict[str, Any]:
    figures = {"windows": [kl * 9, kl * 11], "tokens": [10, 10], "kl": kl, "parameters": parameters}
    figures |= {"perplexity": 3.0, "blocks": 0.5, "agreement": [1, 2], "repetition": 0.25}
    speed = [1 / time] * 3
    return {"row": row, "sparsity": 0.5, "prefill": speed, "decode": speed, **figures, **more}


def test_a_front_holds_what_no_other_point_beats_in_both() -> None:
    from structure_plots import front_of

    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 3.5), (2.0, 2.0), (2.5, 2.0), (4.0, 1.0)]
    assert front_of(points) == [1, 3, 0]
    assert front_of([]) == []


def test_every_row_has_a_sign_of_its_kind() -> None:
    from structure_plots import GREY, style_of
    from structure_rows import ROWS

    signs = {name: style_of(row) for name, row in ROWS.items()}
    assert {name for name, sign in signs.items() if sign["color"] == GREY} == {
        *(f"random_units{end}" for end in ("", " + bias", " + least_squares")),
        "block_drop, random",
    }
    assert signs["flap + bias"]["markerfacecolor"] != "white" == signs["flap"]["markerfacecolor"]


def test_a_plot_has_panels_of_what_was_measured_and_is_small(tmp_path: Path) -> None:
    from structure_plots import draw, file_of, panels_of

    cells = [cell("flap", 0.2), cell("cfsp", 0.1, time=0.7), cell("block_drop, influence", 0.4, parameters=8)]
    kept = {"model": "tiny", "itemsize": 2, "parameters": 20, "cells": cells}
    assert [dense for _, dense in panels_of(kept).values()] == pytest.approx([1, 1, 4e-05])
    draw(kept, tmp_path / "new" / file_of(kept))
    assert 0 < (tmp_path / "new" / "tiny-structure.png").stat().st_size < 100_000
    untimed = [{key: one[key] for key in one if key not in ("prefill", "decode")} for one in cells]
    assert [*panels_of(kept | {"cells": untimed})] == ["weights, MB"]


def test_rows_that_trained_are_held_against_the_composition_that_was_chosen_before() -> None:
    from structure_recovery_tables import order_kept, section

    def trained(row: str, before: float, after: float, choose: float) -> dict[str, Any]:
        later = cell(row, after, tuned=cell(row, after))
        return cell(row, before, recovered=later, training={}, choose={"kl": choose})

    cells = [
        trained("flap + bias", 0.4, 0.3, 0),
        trained("flap + least_squares", 0.3, 0.1, 0.2),
        trained("cfsp + least_squares", 0.2, 0.15, 0.25),
    ]
    dense = cell("dense", 0.01, blocks=1.0, dense_perplexity=2.0)
    facts = {"model": "tiny", "protocol": "P", "processor": "C", "date": "D", "repetition": 0.1}
    said = section(facts | {"cells": cells, "dense": dense})
    # Both windows of 10 tokens lie a tenth beside the mean: 0.2 * (1 +- 0.1) apart, an error of 0.02.
    assert "+0.200 (+10.0 SE)" in said and "less flap + least_squares" in said
    assert "is closer after it than 1 of 1 rows" in said
    assert "Of 3 pairs of rows, 2 stand in the same order" in said
    assert order_kept([(1, 1), (2, 3), (3, 2)]) == (2, 3)
