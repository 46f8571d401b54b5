"""The report says what was measured, the card says it to people, the plots are pictures."""

import json
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from structprune import machine
from structprune.cli.summary import recovery_lines
from structprune.proof.verification import Check, Verification
from structprune.report import plots
from structprune.report.card import write_card
from structprune.report.report import RunRecord, Size, build, table, write_report
from structprune.report.sentences import calibration_sentence, seen_before

EVALUATION = {
    "perplexity": {"demo": {"model": 3.4567, "dense": 3.1}, "broken": {"model": None, "dense": 3.0}},
    "divergence": {"demo": {"kl": 0.0512, "kl_se": 0.0021, "top1_agreement": 0.934}},
    "tasks": {"facts": {"acc": {"model": 0.91, "dense": 0.98}, "acc_stderr": {"model": 0.01, "dense": 0.02}}},
    "protocol": {
        "texts": {
            "demo": {
                "windows": 64, "length": 128, "stride": None, "scored_tokens": 8128, "bos": "none",
                "dtype": "bfloat16", "sha256": "ab" * 32,
            }
        },
        "flags": ["broken: the perplexity of the given model is not finite"],
    },
    "generations": [{"prompt": "Once", "model": "``` | <b>", "dense": "upon a time"}],
}  # fmt: skip
CALIBRATION = {"source": "demo", "samples": 8, "length": 128, "seed": 0, "sha256": "cd" * 32}


def measured(pattern: str = "unstructured") -> Verification:
    kinds = {
        "self_attn.q_proj": {"parameters": 64, "zeros": 32},
        "mlp.up_proj": {"parameters": 128, "zeros": 0},
    }
    block = {"block": 0, "sparsity": 32 / 192, "parameters": 192, "zeros": 32, "matrices": kinds}
    checks = [Check("finite", True, "no NaN"), Check("masks", True, "all zero")]
    loads = ["structprune 0.1.0", "transformers 5.23.0 (AutoModelForCausalLM)"]
    blocks = [block, block | {"block": 1}]
    return Verification(0.5, pattern, 1000, 968, 4096, checks, blocks, loads, {"01-wanda": 0.25})


STAGE = {"folder": "01-wanda", "method": "wanda", "unit": "weights", "asked": 0.5, "reachable": 0.5}


def report(folder: Path, **changes: Any) -> dict[str, Any]:
    record = RunRecord("wanda", stages=[STAGE], calibration=changes.pop("calibration", CALIBRATION))
    parts: dict[str, Any] = {
        "output": folder,
        "dense": Size(1000, 4096),
        "seconds": 12.34567,
        "evaluation": EVALUATION,
    }
    return build(changes.pop("verification", measured()), record, **(parts | changes))


class TestReport:
    def test_has_the_promised_keys_and_the_measured_figures(self, tmp_path: Path) -> None:
        found = report(tmp_path / "out")
        promised = {"output", "method", "stages", "sparsity", "parameters", "bytes", "seconds"}
        assert found["stages"] == [STAGE | {"measured": 0.25}]
        assert found.keys() >= promised | {"peak_rss_bytes", "blocks_resumed", "loads_in"}
        assert found["parameters"] == {"dense": 1000, "pruned": 1000, "nonzero": 968}
        assert found["bytes"] == {"dense": 4096, "pruned": 4096}
        assert found["verification"]["ok"] is True
        assert "blocks" not in found["verification"]
        assert len(found["blocks"]) == 2

    def test_is_json_also_where_a_figure_is_not_finite(self, tmp_path: Path) -> None:
        found = report(tmp_path, calibration={"loss": math.nan, "list": [math.inf, 1.5]})
        path = write_report(tmp_path, found | {"seconds": -math.inf})
        assert path == tmp_path / "structprune" / "report.json"
        read = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert read["calibration"] == {"loss": None, "list": [None, 1.5]}
        assert read["seconds"] is None

    def test_the_table_sets_dense_beside_pruned(self, tmp_path: Path) -> None:
        rows = {what: (dense, pruned) for what, dense, pruned in table(report(tmp_path))}
        assert rows["Parameters that are not zero"] == ("-", "968")
        assert rows["Zeros in the pruned matrices"] == ("-", "50.00%")
        assert rows["Perplexity, demo"] == ("3.1", "3.457")
        assert rows["Perplexity, broken"] == ("3", "-")
        assert rows["KL from dense in nats per token, demo"] == ("0", "0.0512 ± 0.0021")
        assert rows["facts, acc"] == ("0.98 ± 0.02", "0.91 ± 0.01")
        assert not any("stderr" in what for what in rows)

    def test_the_table_does_without_an_evaluation(self, tmp_path: Path) -> None:
        assert len(table(report(tmp_path, evaluation=None))) == 4


class TestCard:
    def write(self, folder: Path, **changes: Any) -> tuple[dict[str, Any], str]:
        source = folder / "source"
        source.mkdir()
        (source / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# Base\n")
        found = report(folder / "small-wanda", **changes)
        recipe = "model: owner/base\nprune:\n  method: wanda\n"
        path = write_card(folder, found, recipe=recipe, base="owner/base", source=source)
        _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
        return yaml.safe_load(front), body

    def test_its_front_matter_is_what_the_hub_reads(self, tmp_path: Path) -> None:
        front, _ = self.write(tmp_path)
        assert front["base_model"] == "owner/base"
        assert front["library_name"] == "transformers"
        assert front["license"] == "mit"
        assert front["language"] == ["en"]
        assert {"pruning", "sparse", "structprune", "wanda"} <= set(front["tags"])
        (entry,) = front["model-index"]
        assert entry["name"] == "small-wanda"
        metrics = {row["dataset"]["name"]: row["metrics"][0]["value"] for row in entry["results"]}
        assert metrics == {"demo": 3.4567, "facts": 0.91}

    def test_its_text_tells_people_what_they_get(self, tmp_path: Path) -> None:
        (tmp_path / "structprune" / "plots").mkdir(parents=True)
        (tmp_path / "structprune" / "plots" / "sparsity_per_block.png").touch()
        _, body = self.write(tmp_path)
        assert "neither the files smaller nor dense kernels faster" in body
        assert "method: wanda" in body
        assert "- transformers 5.23.0 (AutoModelForCausalLM)" in body
        assert "64 windows of 128 tokens without overlap" in body
        assert "8 samples of 128 tokens from `demo`" in body
        assert "Note: broken: the perplexity" in body
        assert "![sparsity per block](structprune/plots/sparsity_per_block.png)" in body
        assert "| Perplexity, demo | 3.1 | 3.457 |" in body
        # A continuation cannot end the block that it is shown in.
        assert body.count("\n```") % 2 == 0

    def test_a_card_without_an_evaluation_has_no_results(self, tmp_path: Path) -> None:
        front, body = self.write(tmp_path, evaluation=None, calibration=None, verification=measured("2:4"))
        assert "model-index" not in front
        assert "model_name" not in front
        assert "The 2:4 pattern holds in every pruned matrix" in body
        assert "None: this method looks at the weights only." in body

    def test_a_recovery_of_an_unknown_model_tells_what_was_trained_on(self, tmp_path: Path) -> None:
        data = {"windows": 90, "length": 32, "source": "own.txt", "seed": 3, "sha256": "ef" * 32}
        told = calibration_sentence({"calibration": None, "recovery": {"data": data}})
        assert told.startswith("Trained on 90 windows of 32 tokens from `own.txt` (seed 3; ")
        assert "weights only" not in told

    def test_a_card_of_an_applied_plan_names_its_command(self, tmp_path: Path) -> None:
        record = RunRecord("wanda", command="apply", stages=[STAGE])
        found = build(measured(), record, output=tmp_path, dense=Size(1000, 4096), seconds=1.0)
        body = write_card(tmp_path, found, recipe="", base="owner/base").read_text(encoding="utf-8")
        assert "run `structprune apply recipe.yaml`" in body
        assert "None in this run: it carried out a plan that was decided before." in body

    @pytest.mark.parametrize("card", ["---\n- a list\n---\n", "---\nlicense: [\n---\n", "no front matter"])
    def test_a_source_with_a_damaged_card_gives_no_license(self, card: str, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(card)
        found = report(tmp_path / "out")
        written = write_card(tmp_path, found, recipe="", base=str(tmp_path), source=tmp_path)
        front = yaml.safe_load(written.read_text(encoding="utf-8").split("---\n", 2)[1])
        assert "license" not in front
        assert front["base_model"] == tmp_path.name


def pixels(path: Path) -> tuple[int, int, int]:
    """Return width and height of a PNG, and how many different bytes its picture holds."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    place, packed = 8, b""
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += length + 12
    width, height = struct.unpack(">II", data[16:24])
    return width, height, len(set(zlib.decompress(packed)))


class TestPlots:
    def test_sparsity_per_block_and_methods_are_pictures_with_something_on_them(self, tmp_path: Path) -> None:
        rows = [
            {"label": "wanda 50%", "kl": 0.05, "kl_se": 0.004, "perplexity": 3.3, "dense": 3.1},
            {"label": "random 50%", "kl": 2.5, "kl_se": 0.04, "perplexity": 52.1, "dense": 3.1},
            {"label": "broken", "kl": None, "kl_se": None, "perplexity": math.inf, "dense": 3.1},
        ]
        one = plots.sparsity_per_block(tmp_path / "plots" / "sparsity_per_block.png", report(tmp_path))
        two = plots.methods(tmp_path / "plots" / "methods.png", rows, title="demo")
        for path in (one, two):
            width, height, colours = pixels(path)
            assert width >= 1000
            assert height >= 500
            assert colours > 50

    def test_the_same_figures_give_the_same_bytes(self, tmp_path: Path) -> None:
        files = [plots.sparsity_per_block(tmp_path / name, report(tmp_path)) for name in ("a.png", "b.png")]
        assert files[0].read_bytes() == files[1].read_bytes()


class TestMachine:
    def test_the_environment_names_the_machine_and_the_versions(self) -> None:
        found = json.loads(json.dumps(machine.environment()))
        assert found["machine"]["cores"] >= 1
        assert found["machine"]["memory_bytes"] > 2**28
        assert found["versions"]["torch"]
        assert found["versions"]["python"].startswith("3.")

    def test_the_peak_is_that_of_the_hungriest_process(self) -> None:
        before = machine.peak_rss()
        assert before > 2**26  # torch alone takes more
        wanted = before + 2**27
        subprocess.run([sys.executable, "-c", f"len(bytearray(b'1') * {wanted})"], check=True)
        assert wanted < machine.peak_rss() < wanted + 2**28


class TestSeenBefore:
    READ: ClassVar = {"source": "own.txt", "split": "train"}

    def told(self, stamp: dict[str, Any], **report: Any) -> str:
        return seen_before({"evaluation": {"protocol": {"texts": {"own": stamp}}}, **report}, "own")

    def test_a_text_that_the_run_read_is_called_so(self) -> None:
        whole, left = self.READ | {"split": "test"}, self.READ | {"held_out": "the last windows"}
        assert self.told(whole, calibration=self.READ) == "calibration text"
        assert self.told(left, calibration=None, recovery={"data": self.READ}) == (
            "held-out part of the training text"
        )
        assert self.told(whole, calibration=self.READ, recovery={"data": self.READ}) == (
            "calibration and training text"
        )

    def test_the_line_for_people_says_it(self) -> None:
        training = {"start_loss": 2.5, "best_loss": 2.0, "best_step": 5}
        training |= {"data": self.READ | {"windows": 9, "length": 64}, "history": [{"step": 9}]}
        texts = {"own": self.READ | {"held_out": "the last windows", "length": 64}}
        evaluation = {"perplexity": {"own": {"dense": 3.0, "model": 4.0}}, "protocol": {"texts": texts}}
        made = {"output": "out", "adapter": {"base": "base"}, "loads_in": ["structprune"]}
        said = recovery_lines({"recovery": training, "evaluation": evaluation, **made})
        assert "9 steps on" in said
        assert "2.5 -> 2 nats per token after step 5" in said
        quality = "perplexity on own (held-out part of the training text, windows of 64 tokens) 3 -> 4"
        assert quality in " ".join(said.split())

    @pytest.mark.parametrize("source", ["other.txt", "demo", "a/dataset:name"])
    def test_another_text_or_split_is_not(self, source: str) -> None:
        read = self.READ | {"source": source if source != "other.txt" else "own.txt"}
        assert self.told({"source": source, "split": "test"}, calibration=read) == ""
