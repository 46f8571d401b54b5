"""The command line: what it prints where, how it fails, how it is stopped."""

import contextlib
import errno
import io
import json
import logging
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch

import structprune
from structprune.checkpoint.writing import Writing
from structprune.cli.outlet import Outlet
from structprune.cli.terminal import logging_to_stderr, progress_on_stderr, say, stoppable
from structprune.errors import InputError, Interrupted, QualityError
from structprune.models.opening import Opening
from structprune.pruners import catalogue
from structprune.recipe.options import EvaluateOptions, RecoverOptions

ROOT = Path(__file__).parents[1]
DONE = {
    "output": "out",
    "method": "wanda",
    "stages": [
        {"method": "wanda", "unit": "weights", "asked": "2:4", "reachable": 0.5, "measured": 0.5},
    ],
    "sparsity": 0.5,
    "parameters": {"dense": 1000, "pruned": 1000},
    "bytes": {"dense": 4000, "pruned": 4000},
    "seconds": 1.0,
    "peak_rss_bytes": 2**29,
    "blocks_resumed": 0,
    "loads_in": ["transformers 5"],
    "evaluation": {"perplexity": {"demo": {"model": float("inf"), "dense": 10.0}}},
}

TAKEN = {"name": "", "family": "weight", "needs_data": False, "reads": "text", "reason": None, "range": None}
TAKEN |= {"fractions": False, "whole": None, "patterns": []}

FOUND = {
    "model": "demo",
    "model_type": "llama",
    "class": "LlamaForCausalLM",
    "known_family": True,
    "blocks": 1,
    "linears": 7,
    "experts": 0,
    "parameters": 2_000_000,
    "prunable": 1_500_000,
    "pruned": None,
    "found": {"zeros": 3},
    "while_running": [],
    "weights_in": None,
    "constant_matrices": ["model.layers.0.mlp.up_proj.weight"],
    "dtype": "bfloat16",
    "bytes": 4_012_345,
    "files": 1,
    "flops_per_token": 4.4e6,
    "kv_bytes_per_token": 1920.0,
    "length": 2048,
    "max_positions": None,
    "tied_embeddings": True,
    "vocabulary": 32000,
    "patterns": ["2:4"],
    "methods": [
        TAKEN | {"name": "one", "needs_data": True, "fractions": True, "patterns": ["2:4"]},
        TAKEN | {"name": "few", "fractions": True, "whole": {"units": "blocks", "most": 4, "of": 5}},
        TAKEN | {"name": "two", "reason": "no such matrix"},
    ],
    "architecture": "21aa",
    "weights": "6944",
}


@pytest.fixture
def calls(monkeypatch):
    """Replace the pipeline by functions that remember how they were called."""
    made = {}

    def fake(name, result):
        def run(*words, **options):
            made[name] = (words, options)
            options.get("progress", lambda *_: None)("calibrate", 1, 2)
            print("a library prints to stdout")  # what datasets and lm-eval do
            return result

        monkeypatch.setattr(structprune, name, run)

    fake("prune", DONE)
    fake("dry_run", {"recipe": "model: demo\n", "bytes": {"dense": 1}})
    fake("apply", DONE)
    fake("inspect", FOUND)
    fake("evaluate", {"perplexity": {"demo": {"model": 12.0, "dense": 10.0}}, "tasks": {}, "protocol": {}})
    trained = {"start_loss": 2.0, "best_loss": 1.0, "best_step": 5, "history": [{"step": 5}, {"step": 8}]}
    trained["data"] = {"source": "text.txt", "windows": 90, "length": 24}
    fake("recover", DONE | {"recovery": trained})
    fake("environment", {"versions": {"torch": "2"}})
    checks = [
        {"name": "manifest", "ok": True, "detail": "fine"},
        {"name": "count", "ok": False, "detail": "off by 1"},
    ]
    fake("verify", {"ok": False, "sparsity": 0.5, "pattern": "2:4", "parameters": 5, "checks": checks})
    return made


def recipe_of(calls):
    ((recipe,), options) = calls["prune"]
    return recipe, options


def test_the_flags_of_prune_become_a_recipe(calls, command):
    done = command(
        *("prune", "demo", "out", "--method", "wanda", "--sparsity", "2:4", "--calibration", "a.txt"),
        *(
            "--samples",
            "4",
            "--length",
            "64",
            "--seed",
            "3",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--stream",
            "--allow-external-symlinks",
        ),
        *("--set", "compare=matrix", "--include", "mlp", "--exclude", "down", "--exclude", "up", "--restart"),
        *("--revision", "main", "--max-ppl-ratio", "1.5", "--set", "evaluate.text=words.txt"),
        *("--overwrite", "--trust-remote-code"),
    )

    recipe, options = recipe_of(calls)
    assert done.code == 0, done.err
    (stage,) = recipe.prune
    assert (stage.method(), stage.sparsity, stage.compare) == ("wanda", "2:4", "matrix")
    assert (stage.include, stage.exclude) == (("mlp",), ("down", "up"))
    assert (recipe.model, recipe.output, recipe.seed) == ("demo", Path("out"), 3)
    assert (recipe.device, recipe.dtype, recipe.revision) == ("cpu", "float32", "main")
    assert (recipe.calibration.source, recipe.calibration.samples, recipe.calibration.length) == (
        "a.txt",
        4,
        64,
    )
    assert recipe.evaluate.max_ppl_ratio == 1.5
    assert options.pop("progress")
    assert options == {
        "opening": Opening(stream=True, trust_remote_code=True, allow_external_symlinks=True),
        "writing": Writing(overwrite=True, restart=True),
        "scores": None,
    }


@pytest.mark.parametrize("dash", ["-", "_"])
def test_the_words_of_the_papers_are_understood(calls, command, dash):
    words = ["--nsamples", "4", "--seqlen", "64", "--sparsity-ratio", "0.5", "--sparsity-type", "2:4"]
    words = [word[:2] + word[2:].replace("-", dash) if word.startswith("--") else word for word in words]

    done = command("prune", "demo", "out", "--method", "wanda", *words)

    recipe, options = recipe_of(calls)
    assert done.code == 0, done.err
    assert recipe.prune[0].sparsity == "2:4"
    assert (recipe.calibration.samples, recipe.calibration.length) == (4, 64)
    assert options["opening"] == Opening()


def test_underscores_in_a_value_stay(calls, command):
    command("prune", "demo", "out", "--method=wanda", "--set=exclude=q_proj", "--calibration=a_b.txt")

    recipe, _ = recipe_of(calls)
    assert recipe.prune[0].exclude == ("q_proj",)
    assert recipe.calibration.source == "a_b.txt"


def test_a_recipe_file_and_flags_are_one_recipe(calls, command, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: demo\noutput: out\nprune: wanda\n")

    assert command("prune", path).code == 0
    assert recipe_of(calls)[0].output == Path("out")
    assert command("prune", path, "elsewhere", "--sparsity", "0.25").code == 0
    assert recipe_of(calls)[0].output == Path("elsewhere")
    assert recipe_of(calls)[0].prune[0].sparsity == 0.25


def test_a_folder_that_is_called_demo_is_not_the_built_in_model(calls, command):
    for name in ("demo", "./demo"):
        command("inspect", name)
        assert calls["inspect"][0] == (name,)
        command("verify", name)
        assert calls["verify"][0][0] == name
        command("prune", name, "out", "--method", "wanda")
        assert recipe_of(calls)[0].model == name


def test_a_folder_that_is_called_demo_is_said_to_be_shadowed(command, llama, tmp_path, monkeypatch):
    (tmp_path / "demo").symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    built_in, mine = command("inspect", "demo"), command("inspect", "./demo")

    assert "warning: 'demo' is a built-in model; the folder of that name here is ./demo" in built_in.err
    assert "5 blocks" in built_in.out
    assert "warning" not in mine.err
    assert mine.out.splitlines()[0].startswith("model       ./demo: LlamaForCausalLM")


def test_a_warning_names_the_output_and_not_the_folder_under_work(capsys):
    with logging_to_stderr():
        logging.getLogger("structprune.x").warning("%s: odd", "out.partial-0123456789abcdef/config.json")

    assert capsys.readouterr().err == "warning: out/config.json: odd\n"


@pytest.mark.parametrize(("flag", "shown"), [("-q", False), ("--quiet", False), ("-v", True)])
def test_quiet_says_no_progress_and_verbose_says_more(command, monkeypatch, flag, shown):
    def run(*words, progress=None, **options):
        logging.getLogger("structprune.x").info("a detail")
        logging.getLogger("structprune.x").warning("a trap")
        progress("evaluate", 0, 2)
        return {"perplexity": {}}

    monkeypatch.setattr(structprune, "evaluate", run)
    done = command("evaluate", "demo", flag)

    assert "warning: a trap" in done.err
    assert ("info: a detail" in done.err) == shown
    assert ("evaluate: 0 of 2" in done.err) == shown


def test_stdout_holds_the_result_alone(calls, command):
    done = command("prune", "demo", "out", "--method", "wanda", "--json")

    assert done.json["status"] == "ok"
    assert done.json["output"] == "out"
    assert done.json["evaluation"]["perplexity"]["demo"] == {"model": None, "dense": 10.0}
    assert "a library prints to stdout" in done.err
    assert "calibrate: 1 of 2" in done.err


def test_people_get_four_lines(calls, command):
    done = command("prune", "demo", "out", "--method", "wanda")

    labels = [line.split()[0] for line in done.out.splitlines() if not line.startswith(" ")]
    assert labels == ["asked", "got", "where", "loads"]
    assert "50% of the prunable weights removed" in done.out
    assert "537 MB" in done.out


def test_what_a_model_is_stands_in_words_and_units_and_its_hashes_in_json_alone(calls, command):
    lines = command("inspect", "demo").out.splitlines()

    assert lines[1] == "size        2,000,000 parameters in 1 block, 4.01 MB of bfloat16 in 1 file"
    assert lines[3] == "pruned      no, 3 weights are zero"
    assert "constant    1 matrix of one value only: model.layers.0.mlp.up_proj.weight" in lines
    assert "text        32,000 tokens in the vocabulary, no limit of positions" in lines
    assert "cost        4.4 MFLOP per token at length 2,048, 1.92 kB of cache per token" in lines
    assert lines[-3:] == [
        "one  needs text  any fraction, 2:4",
        "few  no data     1 to 4 of 5 blocks",
        "two  no data     no: no such matrix",
    ]
    assert not any("6944" in line or "21aa" in line for line in lines)
    assert command("inspect", "demo", "--json").json["weights"] == "6944"


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_every_result_fits_the_columns_there_are(calls, command, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = [["inspect", "demo"], ["methods"], ["methods", "wanda"], ["evaluate", "demo"], ["verify", "out"]]
    lines += [["prune", "demo", "out", "--method", "wanda"], ["recover", "demo", "out", "--data", "demo"]]
    for line in lines:
        # A word that is longer than a line is broken in none of them.
        wide = [row for row in command(*line).out.splitlines() if len(row) > columns and row.count(" ") > 4]

        assert not wide, line


def test_the_columns_of_a_table_that_is_too_wide_are_named_in_each_row(calls, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")

    assert command("evaluate", "demo").out.splitlines() == ["perplexity, demo", "  dense 10, model 12"]


def test_a_dry_run_prunes_nothing(calls, command):
    done = command("prune", "demo", "out", "--method", "wanda", "--dry-run", "--json")

    assert done.json["bytes"] == {"dense": 1}
    assert "prune" not in calls


TRAINING = {"steps": 9, "memory_bytes": 3_000_000, "state_bytes": 7, "seconds": None}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {},
            ["memory to decide: 5 MB", "time to decide: told once `structprune bench --rates` has measured"],
        ),
        ({"seconds": 90.5}, ["time to decide: 1 min 30 s at best"]),
        ({"bench": {"new": 8}}, ["memory to decide and time it: 5 MB"]),
        (
            {"ranks": {"count": 2, "memory_bytes": 4_000_000, "time": "of deciding"}},
            ["memory to decide: 5 MB", "  memory to decide: 4 MB", "  time: of deciding"],
        ),
        ({"parameters": {"dense": 1000, "pruned": 800}}, ["removed: 20.0% of the model's"]),
        (
            {"recover": TRAINING | {"free_bytes": 4_000_000}},
            ["  memory to train: 3 MB\n", "  time to train: told once `structprune bench --rates`"],
        ),
        (
            {"recover": TRAINING | {"free_bytes": 2_000_000, "seconds": 90}},
            [
                "  memory to train: 3 MB, and 2 MB are free: --gradient-checkpointing",
                "  time to train: 1 min 30 s at best",
            ],
        ),
    ],
)
def test_a_dry_run_says_what_its_figures_are_of(calls, command, monkeypatch, more, said):
    planned = {"memory_bytes": 5_000_000, "bytes": {"dense": 1}, **more}
    for result in (planned, {"runs": {"0.3": planned, "0.5": planned}}):
        monkeypatch.setattr(structprune, "dry_run", lambda *_, result=result, **__: result)
        done = command("prune", "demo", "out", "--method", "wanda", "--dry-run")

        assert all(words in done.out for words in said)
        assert "memory_bytes" not in done.out
        assert "time to decide" in done.out


def test_evaluate_and_recover_take_their_options(calls, command):
    command(
        "evaluate",
        "out",
        "--text",
        "a.txt",
        "--text",
        "b.txt",
        "--tasks",
        "a,b",
        "--compare",
        "demo",
        "--limit",
        5,
    )
    (model, options), rest = calls["evaluate"]
    assert (model, rest["opening"]) == ("out", Opening(strict=False))
    assert options == EvaluateOptions(text=("a.txt", "b.txt"), tasks=("a", "b"), compare="demo", limit=5)

    done = command(
        "recover",
        "out",
        "new",
        "--data",
        "demo",
        "--steps",
        7,
        "--set",
        "warmup=0.1",
        "--keep-adapter",
        "--seed",
        3,
    )
    (asked,), rest = calls["recover"]
    assert (asked.model, asked.output, rest["opening"]) == ("out", Path("new"), Opening())
    assert asked.recover == RecoverOptions(data="demo", steps=7, warmup=0.1, keep_adapter=True, seed=3)
    assert done.out.startswith("trained        8 steps on 90 windows of 24 tokens of text.txt\n")
    assert "held-out loss  2 -> 1 nats per token after step 5" in done.out


def test_every_command_prints_one_json_object(calls, command, tmp_path):
    lines = [
        ["prune", "demo", "out", "--method", "wanda"],
        ["apply", "demo", "out", "--plan", "plans"],
        ["inspect", "demo"],
        ["methods"],
        ["methods", "wanda"],
        ["evaluate", "demo"],
        ["recover", "demo", "out", "--data", "demo"],
        ["env"],
    ]
    for line in lines:
        done = command(*line, "--json")
        assert (done.code, done.json["code"], done.json["status"]) == (0, 0, "ok"), line
        assert command(*line).out.strip(), line


def test_a_folder_that_fails_its_checks_gives_six_and_the_figures(calls, command):
    done = command("verify", "out", "--json")

    assert done.code == done.json["code"] == 6
    assert done.json["status"] == "error"
    assert done.json["error"]["message"] == "count: off by 1"
    assert (done.json["ok"], done.json["sparsity"], len(done.json["checks"])) == (False, 0.5, 2)
    assert "FAILED  count" in command("verify", "out").out


def test_methods_lists_every_file_under_pruners(command):
    listed = command("methods", "--json").json["methods"]

    assert [row["name"] for row in listed] == list(catalogue.names())
    assert all(row["source"] and row["about"] for row in listed)
    assert command("methods", "wnda").code == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["prune"], "MODEL is missing"),
        (["prune", "demo", "--method", "wanda"], "OUT is missing"),
        (["prune", "demo", "out"], "prune.method is missing"),
        (["prune", "demo", "out", "--methd", "wanda"], "--method"),
        (["prune", "demo", "out", "--method"], "argument"),
        (["prune", "demo", "out", "--samples", "many"], "--samples"),
        (["prune", "demo", "out", "extra", "--method", "wanda"], "extra"),
        (["prun"], "prune"),
        (["recover", "a", "b"], "--data"),
        (["recover", "a", "--data", "demo"], "OUT is missing"),
        (["recover", "a", "b", "-o", "c", "--data", "demo"], "two outputs"),
        (["prune", "a.yaml", "-C", "b.yaml"], "two recipes"),
        (["evaluate", "demo", "--windows", "0"], "windows"),
        (["evaluate", "demo", "--device", "gpu"], "device"),
    ],
)
def test_a_bad_command_line_gives_two(calls, command, line, said):
    done = command(*line)
    machine = command(*line, "--json")

    assert done.code == machine.code == machine.json["code"] == 2
    assert machine.json["error"]["kind"] == "usage"
    assert machine.json["error"]["hint"]
    assert said in done.err
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 2
    assert done.out == ""


def test_a_training_that_runs_out_of_memory_has_a_hint_of_its_own(command, monkeypatch):
    def fail(*words, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(structprune, "recover", fail)
    done = command("recover", "demo", "out", "--data", "demo")

    assert done.code == 4
    assert "try --gradient-checkpointing, with which this run goes on" in done.err


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (InputError("model.safetensors: cut off", hint="download it again"), 3, "input"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"), 4, "environment"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 4, "environment"),
        (MemoryError(), 4, "environment"),
        (torch.OutOfMemoryError("CUDA out of memory"), 4, "environment"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 TB"), 4, "environment"),
        (QualityError("loss is NaN", hint="use a smaller learning rate"), 5, "quality"),
        (Interrupted(signal.SIGTERM), 143, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_has_its_code_and_one_line(command, monkeypatch, error, code, kind):
    def fail(*words, **options):
        raise error

    monkeypatch.setattr(structprune, "inspect", fail)
    done = command("inspect", "demo", "--json")

    assert done.code == done.json["code"] == code
    assert done.json["error"]["kind"] == kind
    assert done.json["error"]["hint"]
    assert "Traceback" not in done.err
    assert "Traceback" in command("inspect", "demo", "--debug").err


def test_a_bug_keeps_its_traceback_and_is_one_in_json(command, monkeypatch, capsys):
    def fail(*words, **options):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(structprune, "inspect", fail)
    with pytest.raises(ZeroDivisionError):
        command("inspect", "demo", "--json")
    out, err = capsys.readouterr()

    assert json.loads(out)["code"] == 1
    assert json.loads(out)["error"]["kind"] == "bug"
    assert "structprune env" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_run_and_says_how_to_go_on(command, monkeypatch, number):
    monkeypatch.setattr(structprune, "inspect", lambda *words, **options: os.kill(os.getpid(), number))
    # Whoever started the tests in the background may have had the signal ignored.
    former = signal.signal(number, signal.SIG_DFL)
    try:
        done = command("inspect", "demo", "--json")
    finally:
        signal.signal(number, former)

    assert done.code == done.json["code"] == 128 + number
    assert "same command again" in done.json["error"]["hint"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_a_library_swallowed_stops_at_the_next_report():
    with stoppable() as check, progress_on_stderr(check) as progress:
        with contextlib.suppress(Interrupted):  # what a careless library does
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            progress("calibrate", 1, 2)


def test_a_signal_that_was_ignored_at_the_start_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_progress_is_plain_lines_without_a_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("structprune.cli.terminal.time.monotonic", lambda: now[0])
    with progress_on_stderr() as progress:
        for done in range(101):
            progress("calibrate", done, 100)
            now[0] += 1
        progress("write", 1, 1)

    assert capsys.readouterr().err.splitlines() == [
        "calibrate: 0 of 100",
        "calibrate: 30 of 100, about 1 min 10 s left",
        "calibrate: 60 of 100, about 40 s left",
        "calibrate: 90 of 100, about 10 s left",
        "calibrate: 100 of 100, done in 1 min 40 s",
        "write",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("variables", "bars"),
    [
        ({"TERM": "xterm", "LANG": "en_US.UTF-8"}, True),
        ({"TERM": "dumb", "LANG": "en_US.UTF-8"}, False),
        ({"TERM": "xterm", "LANG": "C"}, False),
        ({"TERM": "xterm", "LANG": "en_US.UTF-8", "LC_ALL": "C"}, False),
    ],
)
def test_progress_is_bars_on_a_terminal_that_can_show_them(monkeypatch, variables, bars):
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_on_stderr() as progress:
        progress("calibrate", 1, 4)
        progress("calibrate", 4, 4)

    assert ("\x1b[" in screen.getvalue()) == bars
    assert "4/4" in screen.getvalue() if bars else "4 of 4" in screen.getvalue()
    assert bars or screen.getvalue().isascii()


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_bar_is_one_line_on_any_terminal(monkeypatch, columns):
    for name, value in {"TERM": "xterm", "LANG": "en_US.UTF-8", "COLUMNS": str(columns)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LC_ALL", raising=False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_on_stderr() as progress:
        progress("calibrate a method with a long name", 30, 100)
        progress("calibrate a method with a long name", 100, 100)
    shown = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue()).splitlines() if line]

    assert any("100/100" in line for line in screen.getvalue().splitlines())
    assert max(len(line.rstrip()) for line in shown) <= columns


def test_text_that_the_terminal_cannot_show_is_escaped():
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("KL 0.1 ± 0.01", screen)

    assert screen.buffer.getvalue() == b"KL 0.1 \\xb1 0.01\n"


def test_a_reader_that_went_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        outlet = Outlet(stream)
        say("first", outlet)
        say("second", outlet)

    assert outlet.lost.errno == errno.EPIPE


def test_the_module_and_the_scripts_are_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["structprune", "--version"])
    # The handlers of a process that is the command line and nothing else.
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("structprune", run_name="__main__")

    assert not stopped.value.code
    assert capsys.readouterr().out.startswith("structprune ")
    for script in ("prune", "recover", "evaluate"):
        text = (ROOT / "scripts" / f"{script}.py").read_text()
        assert f'main(["{script}", *sys.argv[1:]])' in text


def test_help_tells_the_defaults_that_a_number_or_a_rule_gives(command):
    recover = " ".join(command("recover", "--help").out.split())
    assert f"Optimizer steps (default {RecoverOptions().steps})" in recover
    assert "(default as many as the model takes, 2048 at most)" in recover
    evaluate = " ".join(command("evaluate", "--help").out.split())
    assert "(default no overlap)" in evaluate and "(default all)" in evaluate
