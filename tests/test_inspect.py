"""What `inspect` says of a model, asked of the methods themselves."""

import pytest

import structprune
from structprune.cli.inspection import inspection_lines
from structprune.errors import UsageError, counted
from structprune.pruners.catalogue import find, names
from structprune.report.figures import bytes_text
from tests.tiny import save_tiny


def test_every_method_says_what_it_can_do_with_a_model(llama):
    rows = {row["name"]: row for row in structprune.inspect(str(llama))["methods"]}

    assert list(rows) == list(names())
    assert rows["wanda"]["fractions"]
    assert rows["wanda"]["needs_data"]
    assert "2:4" in rows["wanda"]["patterns"]
    assert not rows["magnitude"]["needs_data"]
    assert not rows["armor"]["fractions"]  # its core holds a pattern


@pytest.mark.parametrize(
    ("family", "method", "whole", "said"),
    [
        ("llama", "block_drop", {"units": "blocks", "most": 1, "of": 2}, "1 of 2 blocks"),
        ("llama", "attention_skip", {"units": "attentions", "most": 1, "of": 2}, "1 of 2 attentions"),
        (
            "mixtral",
            "expert_drop",
            {"units": "experts of a block", "most": 2, "of": 4},
            "1 to 2 of 4 experts of a block",
        ),
        ("llama", "flap", None, "any fraction"),
    ],
)
def test_units_that_are_few_are_told_by_their_number(family, method, whole, said, tmp_path, command):
    folder = save_tiny(family, tmp_path / family)
    rows = {row["name"]: row for row in structprune.inspect(str(folder))["methods"]}

    assert rows[method]["whole"] == whole
    assert (rows[method]["reason"], rows[method]["unit"]) == (None, "parameters")
    row = next(line for line in command("inspect", folder).out.splitlines() if line.startswith(method))
    assert row.split("  ")[-1].strip() == said


def test_a_method_that_cannot_prune_a_model_says_why(tmp_path, command):
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    rows = {row["name"]: row for row in structprune.inspect(str(folder))["methods"]}

    assert rows["wanda"]["reason"] is None
    assert "Conv1D" in rows["armor"]["reason"]
    shown = " ".join(command("inspect", folder).out.split())  # however long the folder's name makes the lines
    assert f"no: {rows['armor']['reason']}" in shown


def test_methods_that_take_nothing_for_one_reason_share_a_row(llama, command):
    methods = structprune.inspect(str(llama))["methods"]
    blind = [row["name"] for row in methods if "reads no images" in (row["reason"] or "")]
    lines = command("inspect", llama).out.splitlines()

    assert len(blind) > 20
    (row,) = [line for line in lines if "reads no images" in line]
    assert row.startswith(f"{len(blind)} token methods")
    assert not [line for line in lines if line.split(" ")[0] in blind]
    # Where only some of a family are refused, they are named.
    for row in methods:
        if row["name"] in ("ria", "wanda"):
            row["reason"] = "no such matrix"
    said = inspection_lines(structprune.inspect(str(llama)) | {"methods": methods})
    assert "2 weight methods" in said
    assert "no: no such matrix (ria, wanda)" in said


def test_a_goal_that_a_method_cannot_have_is_refused():
    with pytest.raises(UsageError, match="needs a pattern"):
        find("armor")().with_goal(0.3)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (269_060_144, "269 MB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_a_size_is_told_in_the_unit_that_people_use(count, text):
    assert bytes_text(count) == text


def test_one_is_singular():
    assert [counted(count, "block") for count in (0, 1, 2, 1024)] == [
        "0 blocks",
        "1 block",
        "2 blocks",
        "1,024 blocks",
    ]
    assert counted(2, "matrix") == "2 matrices"
