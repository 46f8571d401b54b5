"""Impossible arguments and recipes: exit 2 (or 4 for a place that is taken), one line that names the key."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import structprune
from structprune.recipe.recipe import load

HEAD = "model: demo\noutput: out\n"
WANDA = "prune: {method: wanda, sparsity: 0.5}\n"


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """Run a recipe that must be refused; return its one-line message and the hint."""
    monkeypatch.chdir(tmp_path)

    def run(text, code=2):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        done = command("prune", path, "--json")
        said = done.json["error"]
        assert done.code == code == done.json["code"], said
        assert done.err.splitlines()[0] == f"error: {said['message']}"
        assert not (tmp_path / "out").exists()
        return f"{said['message']} | {said['hint']}"

    return run


@pytest.fixture
def without_reload(monkeypatch):
    """Leave out the fresh process at the end of a run, which would take most of the time here."""
    prune = structprune.prune

    def quick(recipe, *, writing, **options):
        return prune(recipe, writing=replace(writing, reload=False), **options)

    monkeypatch.setattr(structprune, "prune", quick)


@pytest.mark.parametrize(
    ("sparsity", "meant"),
    [("-0.1", ""), ("1", "everything"), ("1.5", ""), ("nan", ""), ("inf", ""), ("50", "did you mean 0.5?")],
)
def test_an_impossible_sparsity_is_refused(sparsity, meant, command, tmp_path):
    done = command("prune", "demo", tmp_path / "out", "--method", "wanda", f"--sparsity={sparsity}")

    assert done.code == 2
    assert "sparsity" in done.err
    assert meant in done.err
    assert done.out == ""


@pytest.mark.parametrize("sparsity", ["0", "50%", "0.5", "2:4"])
def test_a_possible_sparsity_is_taken(sparsity, llama, command, tmp_path, without_reload):
    done = command(
        "prune", llama, tmp_path / "out", "--method", "magnitude", "--sparsity", sparsity, "--json"
    )

    assert done.code == 0, done.err
    assert done.json["sparsity"] == (0 if sparsity == "0" else 0.5)


def test_a_key_twice_is_refused_with_both_lines(refused):
    said = refused(HEAD + "seed: 1\n" + WANDA + "seed: 2\n")

    assert "'seed'" in said
    assert "line 3" in said
    assert "line 5" in said
    assert "line 4" in refused(HEAD + "prune:\n  method: wanda\n  sparsity: 0.1\n  method: random\n")


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("prune: {method: wanda, sparisty: 0.5}\n", "prune.sparisty", "sparsity"),
        (WANDA + "calibration: {sampels: 4}\n", "calibration.sampels", "samples"),
        (WANDA + "recover: {learning_rat: 1e-4}\n", "recover.learning_rat", "learning_rate"),
        (WANDA + "evaluete: {}\n", "evaluete", "evaluate"),
        ("prune: [{method: wanda}, {method: random, sed: 1}]\n", "prune.1.sed", "seed"),
        ("prune: {method: wnda}\n", "wnda", "wanda"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(refused, text, key, near):
    said = refused(HEAD + text)

    assert key in said
    assert f"did you mean '{near}'" in said


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed: true\n" + WANDA, "seed"),
        ("seed: no\n" + WANDA, "seed"),
        ("seed: 1.5\n" + WANDA, "seed"),
        ("revision: 1234567\n" + WANDA, "revision"),
        ("prune: {method: wanda, sparsity: true}\n", "prune.sparsity"),
        ("prune: {method: wanda, sparsity: 124}\n", '"2:4"'),
        ("prune: 7\n", "prune"),
        ("prune: []\n", "prune"),
        ("prune: {sparsity: 0.5}\n", "prune.method"),
        ("prune: {method: 5}\n", "prune.method"),
        (WANDA + "calibration: {samples: true}\n", "calibration.samples"),
        (WANDA + "calibration: 5\n", "calibration"),
        (WANDA + "recover: {learning_rate: true}\n", "recover.learning_rate"),
        (WANDA + "recover: {learning_rate: .nan}\n", "recover.learning_rate"),
        (WANDA + "evaluate: {text: [3]}\n", "evaluate.text"),
        (WANDA + "dtype: f32\n", "dtype"),
        (WANDA + "device: gpu\n", "device"),
    ],
)
def test_a_value_of_another_type_is_refused(refused, text, key):
    assert key in refused(HEAD + text)


def test_numbers_that_yaml_versions_read_differently_are_no_surprise(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + "prune: {method: wanda, sparsity: 2:4}\nrecover: {learning_rate: 1e-4}\n")

    # PyYAML by itself reads 124 and the text "1e-4".
    assert load(path).prune[0].sparsity == "2:4"
    assert load(path).recover.learning_rate == 1e-4


@pytest.mark.parametrize("number", ["010", "0x1F", "0o17", "1_000"])
def test_a_number_of_only_some_yaml_versions_is_refused(refused, number):
    assert f"{number} is a number only in some versions" in refused(f"{HEAD}seed: {number}\n{WANDA}")


@pytest.mark.parametrize(
    "text",
    [
        f"seed: {'9' * 400}\n" + WANDA,
        f"seed: {'9' * 5000}\n" + WANDA,
        "seed: 99999999999\n" + WANDA,
        "seed: -1\n" + WANDA,
        WANDA + "calibration: {samples: 0}\n",
        WANDA + "calibration: {samples: 99999999999}\n",
        WANDA + "calibration: {length: 99999999999}\n",
        WANDA + "recover: {rank: 0}\n",
        WANDA + "recover: {learning_rate: 1e999}\n",
        WANDA + "evaluate: {max_ppl_ratio: .inf}\n",
    ],
)
def test_a_number_out_of_range_is_refused(refused, text):
    assert len(refused(HEAD + text)) < 400


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_a_flag_with_very_many_digits_is_refused(digits, command, tmp_path):
    done = command("prune", "demo", tmp_path / "out", "--method", "wanda", "--samples", "9" * digits)

    assert done.code == 2
    assert "samples" in done.err.replace("'--nsamples'", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found nothing"),
        ("- 1\n", "expected the keys"),
        (HEAD, "prune.method is missing"),
        (HEAD + "prune: &a {method: wanda}\nx: *a\n", "anchors"),
        (HEAD + "prune: !!python/object:os.system {}\n", "tags"),
        (HEAD + "prune: " + "[" * 100, "deeper"),
        (HEAD + "prune: {method: wanda\n", "line"),
        (HEAD + WANDA + "---\n" + HEAD, "another document"),
        (b"model: \xff\n", "not UTF-8 at byte 7"),
        (b"model: a\x00b\n", "#x0000"),
        ("#" * (2**20 + 1), "more than"),
        (HEAD + "prune: {1: 2}\n", "key must be text"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(refused, text, said):
    assert said in refused(text)


def test_a_recipe_that_is_not_there_is_refused(command, tmp_path):
    done = command("prune", tmp_path / "none.yaml")

    assert done.code == 2
    assert "none.yaml: no such file" in done.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_recipe_that_would_block_is_refused(command, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")

    assert command("prune", tmp_path / "pipe.yaml").code == 2


@pytest.mark.parametrize(
    "text", ["seed", "=3", "a..b=1", "seed=010", "seed={a: 1}", "calibration.samples.x=1"]
)
def test_a_set_that_means_nothing_is_refused(text, command, tmp_path):
    done = command("prune", "demo", tmp_path / "out", "--method", "wanda", "--set", text)

    assert done.code == 2
    assert done.err.startswith("error: ")


@pytest.mark.parametrize("flag", ["--sparsity", "--method", "--calibration", "--set", "--device", "--dtype"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_flag_whose_shell_variable_is_not_set_is_refused_by_name(flag, joined, command, tmp_path):
    words = [f"{flag}="] if joined else [flag, ""]
    done = command("prune", "demo", tmp_path / "out", *words, "--json")

    assert (done.code, done.json["error"]["kind"]) == (2, "usage")
    assert done.json["error"]["message"] == f"{flag} is empty: found ''"
    assert "shell" in done.json["error"]["hint"]


def test_a_model_whose_shell_variable_is_not_set_is_refused(command, tmp_path):
    done = command("prune", "", tmp_path / "out", "--method", "magnitude", "--json")

    assert (done.code, done.json["error"]["message"]) == (2, "an argument is empty: found ''")


@pytest.mark.parametrize(
    "line", ["output: ''", "calibration: {source: ''}", "revision: ' '", "evaluate: {include_path: ''}"]
)
def test_an_empty_text_of_a_recipe_is_refused_by_its_key(line, refused):
    key = line.partition(":")[0]
    kept = HEAD if key != "output" else "model: demo\n"

    said = refused(f"{kept}{WANDA}{line}\n")

    assert key in said
    assert "found an empty text" in said


@pytest.mark.parametrize("skip", ["99", "0-99", "2,99", "-1", "0--1"])
def test_blocks_that_a_model_does_not_have_cannot_be_skipped(skip, command, llama, tmp_path):
    done = command("prune", llama, tmp_path / "out", "--method", "magnitude", f"--set=skip={skip}", "--json")

    assert (done.code, done.json["error"]["kind"]) == (2, "usage")
    assert "skip" in done.json["error"]["message"]
    if "99" in skip:
        assert "the model has 2 blocks" in done.json["error"]["message"]
        assert done.json["error"]["hint"].endswith("0 to 1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "found", "known", "near"),
    [
        (
            "method: wanda, repair: leastsquares",
            "'leastsquares'",
            "obs, least_squares, dsnot, none",
            "least_squares",
        ),
        ("method: wanda, repair: {name: obss}", "'obss'", "obs, least_squares, dsnot, none", "obs"),
        ("method: wanda, repair: {damping: 0.1}", "{'damping': 0.1}", "obs, least_squares, dsnot, none", ""),
        ("method: wanda, repair: 3", "3", "obs, least_squares, dsnot, none", ""),
        ("method: wanda, budget: owll", "'owll'", "owl, ramp, table, target_params, uniform", "owl"),
        ("method: sparsegpt, repair: leastsquares", "'leastsquares'", "least_squares, none", "least_squares"),
        ("method: flap, repair: biass", "'biass'", "bias, least_squares, none", "bias"),
        ("method: flap, budget: globall", "'globall'", "uniform, global, sigmoid or {name: table", "global"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_with_those_there_are(refused, stage, found, known, near):
    said = refused(f"{HEAD}prune: {{{stage}}}\n")

    assert f"found {found}, expected" in said
    assert known in said
    assert said.endswith(f"| did you mean {near!r}?") if near else "| repair: What makes up" in said


@pytest.mark.parametrize(
    ("stage", "hint"),
    [
        ("method: alps, repair: least_squares", "leave repair out"),
        ("method: thanos, repair: dsnot", "leave repair out, or choose repair: least_squares"),
        ('method: wanda, sparsity: "2:4", budget: owl', "leave budget out"),
    ],
)
def test_a_choice_that_does_not_fit_the_other_keys_is_refused_with_those_that_do(refused, stage, hint):
    assert refused(f"{HEAD}prune: {{{stage}}}\n").endswith(f"| {hint}")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("prune: {method: cfsp, uniform: true}", "--uniform sets prune.native: uniform"),
        ("prune: [{method: cfsp, pad: true}, wanda]", "--pad sets prune.native: pad"),
        ("prune: wanda\nuniform: true", "--uniform sets prune.native: uniform"),
        ("prune: wanda\nsamples: 4", "--samples sets calibration.samples"),
        ("prune: wanda\nno-evaluate: true", "--no-evaluate sets evaluate.skip: true"),
        ("prune: {method: wanda, fold: true}", "one of: "),  # it is a key, and armor's
    ],
)
def test_a_flag_that_is_written_as_a_key_is_refused_with_the_key_that_it_sets(refused, text, hint):
    assert f"| {hint}" in refused(f"{HEAD}{text}\n")


@pytest.mark.parametrize("place", ["same", "inside", "around", "link"])
def test_an_output_that_overlaps_the_input_is_refused(place, llama, command, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(llama)
    output = {"same": llama, "inside": llama / "out", "around": llama.parent, "link": link}[place]
    before = digest(llama)

    done = command("prune", llama, output, "--method", "magnitude", "--overwrite", "--json")

    assert (done.code, done.json["error"]["kind"]) == (2, "usage")
    assert digest(llama) == before


def test_an_output_that_is_taken_is_refused(llama, command, tmp_path, without_reload):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("the only copy")
    words = ["prune", llama, output, "--method", "magnitude", "--json"]

    done = command(*words)

    assert (done.code, done.json["error"]["kind"]) == (4, "environment")
    assert "--overwrite" in done.json["error"]["hint"]
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    assert command(*words, "--overwrite").code == 0
    assert json.loads((output / "structprune.json").read_text())


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
