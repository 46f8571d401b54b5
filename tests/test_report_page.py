"""The page about runs: complete in itself, true to the reports, safe whatever stands in a folder."""

import copy
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import structprune
from structprune.checkpoint.beside import partial_of
from structprune.checkpoint.partial import FINGERPRINT
from structprune.errors import InputError
from structprune.plan.plan import PlanHead
from structprune.plan.promise import Computed, Promises
from structprune.report.block_charts import block_charts
from structprune.report.charts import COLOURS, Axis, Dot, front, scatter
from structprune.report.comparison import side_by_side, trade_offs
from structprune.report.figures import number
from structprune.report.finished import FinishedRun, checked_report, read_runs
from structprune.report.page import page
from structprune.report.report import table
from structprune.report.sentences import composition
from tests.conftest import Command
from tests.specimens import TEXT, calibrated, no_fresh_process, quick, run, stamps
from tests.tiny import save_tiny

EVIL = "<script>alert('1')</script>"
VOID = {"meta", "br", "img", "link", "hr", "input"}
REPORT, RECIPE = "structprune/report.json", "structprune/recipe.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of one tiny model: by zeros, by zeros in more stages, and by units."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny("llama", folder / "model")
    text = folder / "text.txt"
    text.write_text(TEXT)
    stages = {
        "model": str(folder / "model"),
        "output": str(folder / "two"),
        "prune": [
            {"method": "magnitude", "sparsity": 0.25, "include": ["self_attn"]},
            {"method": "magnitude", "sparsity": "2:4", "exclude": ["self_attn"]},
        ],
        "evaluate": {"text": [str(text)], "windows": 1, "length": 16},
    }
    (folder / "two.yaml").write_text(json.dumps(stages))
    lines: list[list[object]] = [
        [
            "prune",
            folder / "model",
            folder / "half",
            "--method",
            "magnitude",
            "--sparsity",
            "0.5",
            *quick(text),
        ],
        ["prune", folder / "two.yaml"],
        ["prune", folder / "model", folder / "units", "--method", "flap", "--sparsity", "0.3"],
    ]
    lines[2] += [*calibrated(text), *quick(text)]
    with no_fresh_process():
        for line in lines:
            done = run(*line, "--json")
            assert done.code == 0, done.err
    return folder


NAMES = ("half", "two", "units")


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def alter(folder: Path, name: str, text: str) -> None:
    """Change a file of a run as a user does who means it: its entry goes too."""
    (folder / name).write_text(text, encoding="utf-8")
    manifest = json.loads((folder / "structprune.json").read_text())
    manifest["files"].pop(name, None)
    (folder / "structprune.json").write_text(json.dumps(manifest))


class Parsed(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


class TestPage:
    def test_it_needs_nothing_but_itself(self, runs: Path) -> None:
        text = page(read_runs([runs / name for name in NAMES]))
        found = Parsed(text)
        targets = {given["id"] for _, given in found.tags if "id" in given}
        for tag, given in found.tags:
            assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
            assert not {name for name in given if name.startswith("on")} and "src" not in given
            for link in (given.get("href"), given.get("xlink:href")):
                assert link is None or link.removeprefix("#") in targets
        assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
        assert "default-src 'none'" in text
        for number_ in range(COLOURS):
            assert text.count(f"--s{number_}: #") == 2  # by day and by night

    def test_it_holds_the_figures_of_every_report(self, runs: Path) -> None:
        found = Parsed(page(read_runs([runs / name for name in NAMES])))
        for name in NAMES:
            report = report_of(runs / name)
            assert len(table(report)) >= 5
            for what, dense, pruned in table(report):
                assert f"{what}" in found.text
                assert dense in found.text and pruned in found.text
            for check in report["verification"]["checks"]:
                assert " ".join(check["detail"].split()) in found.text
            assert " ".join((runs / name / RECIPE).read_text().split()) in found.text
            assert name in found.text
        for said in ("2:4", "25.00%", "30.00%", "transformers"):
            assert said in found.text

    def test_the_same_runs_give_the_same_bytes(self, runs: Path, tmp_path: Path, command: Command) -> None:
        before = stamps(runs)
        words = [runs / name for name in NAMES]
        done = command("report", *words, "-o", tmp_path / "new/a.html", "--json")
        assert done.code == 0, done.err
        assert done.json["output"] == str(tmp_path / "new/a.html")
        assert [one["name"] for one in done.json["runs"]] == [*NAMES]
        assert [one["method"] for one in done.json["runs"]] == ["magnitude", "magnitude+magnitude", "flap"]
        shown = command("report", *words, "-o", tmp_path / "b.html")
        # A long path is wrapped.
        assert "".join(f"where{tmp_path / 'b.html'}".split()) in "".join(shown.out.split())
        assert "run    half, magnitude" in shown.out
        assert (tmp_path / "b.html").read_bytes() == (tmp_path / "new/a.html").read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {"new", "b.html"}
        assert stamps(runs) == before

    def test_runs_of_one_name_are_told_apart(self, runs: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            shutil.copytree(runs / "half", tmp_path / name / "out")
        shutil.copytree(runs / "units", tmp_path / "units")
        folders = [tmp_path / "a/out", tmp_path / "b/out", tmp_path / "units"]
        assert [one.name for one in read_runs(folders[:1])] == ["out"]
        assert [one.name for one in read_runs(folders)][:2] == ["a/out", "b/out"]

    def test_what_stands_in_a_folder_is_never_markup(self, runs: Path, tmp_path: Path) -> None:
        folder = tmp_path / f"<b onclick=x>{EVIL.replace('/', '')}"
        shutil.copytree(runs / "half", folder)
        report = report_of(folder)
        evil = json.loads(
            re.sub(
                r'("(?:method|detail|name|pattern|prompt|processor)": )"[^"]*"',
                rf'\1"{EVIL}"',
                json.dumps(report),
            )
        )
        evil["evaluation"]["perplexity"] = {EVIL: {"model": 2.0, "dense": 1.0}}
        evil["evaluation"]["divergence"] = {EVIL: {"kl": 0.5, "kl_se": 0.1, "top1_agreement": 0.5}}
        evil["evaluation"]["protocol"]["texts"] = {EVIL: {"windows": EVIL, "length": EVIL, "bos": EVIL}}
        evil["evaluation"]["protocol"]["flags"] = [EVIL, f"`{EVIL}` **{EVIL}**"]
        evil["evaluation"]["generations"] = [{"prompt": EVIL, "dense": f"</pre>{EVIL}", "model": EVIL}]
        evil["versions"] = {EVIL: EVIL}
        evil["loads_in"] = [EVIL]
        evil["blocks"][0]["matrices"] = {
            EVIL: {"parameters": 4, "zeros": 2},
            "b": {"parameters": 4, "zeros": 1},
        }
        evil["stages"][0]["note"] = evil["stages"][0]["unit"] = EVIL
        evil["calibration"] = {"samples": EVIL, "source": EVIL}
        alter(folder, REPORT, json.dumps(evil))
        alter(folder, RECIPE, f"model: 'a/{EVIL.replace('/', '')}'\n# {EVIL}\n".replace("'1'", "1"))
        plain = [Parsed(page(read_runs([runs / name for name in names]))) for names in (NAMES, NAMES[:1])]
        known = {tag for one in plain for tag, _ in one.tags} | {"b", "code"}
        for folders in ([folder], [folder, runs / "half"]):
            text = page(read_runs(folders))
            found = Parsed(text)
            assert "<script" not in text and "<b onclick" not in text
            assert {tag for tag, _ in found.tags} <= known
            assert all(not name.startswith("on") for _, given in found.tags for name in given)
            assert found.text.count("<script>") > 15

    @pytest.mark.parametrize("count", [1, 200])
    def test_a_run_of_many_blocks_and_no_evaluation_has_a_page(self, count: int, runs: Path) -> None:
        (one,) = read_runs([runs / "half"])
        report = copy.deepcopy(dict(one.report)) | {"evaluation": None}
        report["blocks"] = [report["blocks"][0] | {"block": index} for index in range(count)]
        text = page([FinishedRun("many", one.folder, report, one.recipe, one.plans)])
        assert Parsed(text).text.count("self_attn.q_proj:") == count


class TestCharts:
    def test_zeros_stand_in_the_bars_as_they_were_counted(self, runs: Path) -> None:
        (one,) = read_runs([runs / "two"])
        (chart,) = block_charts(one.report, one.plans)
        for block in one.report["blocks"]:
            for kind, matrix in block["matrices"].items():
                share = f"{matrix['zeros'] / block['parameters']:.1%}".replace(".0%", "%")
                assert f"{block['block']}, {kind}: {share}" in chart.svg
        assert f"measured {one.report['sparsity']:.2%}" in chart.svg
        assert len(chart.legend) == 7

    def test_units_that_are_left_are_counted(self, runs: Path) -> None:
        (one,) = read_runs([runs / "units"])
        charts = {chart.title: chart.svg for chart in block_charts(one.report, one.plans)}
        assert next(iter(charts)) == "Parameters left in each block's matrices"
        for index, kept in enumerate(one.plans[0].facts["kept"]):
            assert f"<title>{index}: {kept['channels']}</title>" in charts["Channels left in each block"]
            assert (
                f"<title>{index}: {kept['kv_groups']}</title>"
                in charts["Key-value groups left in each block"]
            )

    @pytest.mark.parametrize(("within", "titles"), [(4, 1), (2, 2)])
    def test_tokens_are_counted_where_attention_and_feed_forward_differ(
        self, within: int, titles: int
    ) -> None:
        said = [
            Computed(block=f"layers.{index}", attention=4, feed_forward=4 if index else within, of=16)
            for index in range(3)
        ]
        promises = Promises(unit="tokens", asked=0.25, removed=36, of=48, stored=tuple(said))
        head = PlanHead(
            format=2, method="m", config={}, architecture="", weights="", facts={}, promises=promises,
            patch={}, blocks=3, id="",
        )  # fmt: skip
        report = {"sparsity": 0.0, "blocks": [], "parameters": {"dense": 1, "pruned": 1}}
        charts = block_charts(report, [head])
        assert len(charts) == titles
        assert "<title>2: 4</title>" in charts[0].svg and "16 in an image" in charts[0].svg
        assert titles == 1 or "<title>0: 2</title>" in charts[1].svg

    def test_the_front_is_what_no_other_beats_in_both(self) -> None:
        dots = [Dot("a", 1, 5), Dot("b", 2, 6), Dot("c", 3, 1), Dot("d", 3, 2), Dot("e", 0.5, 9)]
        assert [dot.label for dot in front(dots)] == ["e", "a", "c"]
        axis = Axis("x", number)
        drawn = scatter("t", "n", dots, axis, axis).svg
        assert drawn.count('class="best"') == 3 and drawn.count('class="beaten"') == 2
        assert drawn.count('class="front"') == 1

    @pytest.mark.parametrize(
        "values", [[(1, 0.0)], [(0, 0), (0, 0)], [(5, -1e-9), (5, 1e9)], [(1, 1e-300), (2, 1)]]
    )
    def test_any_values_can_be_drawn(self, values: list[tuple[float, float]]) -> None:
        axis = Axis("x", number)
        drawn = scatter("t", "n", [Dot("d" * 90, x, y, 0.1) for x, y in values], axis, axis).svg
        for place in re.findall(r' (?:cx|x)="([^"]+)"', drawn):
            assert 0 <= float(place) <= 360
        for place in re.findall(r' cy="([^"]+)"', drawn):
            assert 0 <= float(place) <= 220


class TestComparison:
    @pytest.mark.parametrize(
        ("method", "configs", "said"),
        [
            ("wanda", [{"budget": None, "repair": None}], "wanda"),
            (
                "wanda",
                [{"budget": {"name": "owl", "outlier": 5}, "repair": {"name": "least_squares"}}],
                "wanda (budget owl, repair least_squares)",
            ),
            (
                "llm_pruner+wanda+recover",
                [{"score": "element2", "budget": "global", "repair": None}, {"sparsity": 0.5}],
                "llm_pruner (score element2, budget global) + wanda + recover",
            ),
        ],
    )
    def test_compositions_of_one_method_are_told_apart(
        self, method: str, configs: list[dict[str, Any]], said: str
    ) -> None:
        stages = [{"method": "any", "config": one} for one in configs]
        assert composition({"method": method, "stages": stages}) == said

    def test_runs_that_were_measured_alike_share_rows_and_charts(self, runs: Path) -> None:
        found = read_runs([runs / name for name in NAMES])
        rows = {row.what: row for row in side_by_side(found)}
        assert len(rows) == len(side_by_side(found))
        text = next(iter(found[0].report["evaluation"]["perplexity"]))
        figures = [one.report["evaluation"]["perplexity"][text] for one in found]
        assert rows[f"Perplexity, {text}"].cells == [number(one["model"]) for one in figures]
        assert rows[f"Perplexity, {text}"].dense == number(figures[0]["dense"])
        assert rows["Asked"].cells == ["50.00%", "25.00%, 2:4", "30.00%"]
        told = ["magnitude", "magnitude + magnitude", "flap (budget global, repair bias)"]
        assert rows["Method"].cells == told
        charts = trade_offs(found)
        assert [chart.title.partition(", against ")[2] for chart in charts] == [
            "parameters that are not zero",
            "bytes of the weight files",
        ]
        for chart in charts:
            assert all(f">{name}</text>" in chart.svg for name in NAMES)
            assert "not measured alike" not in chart.note

    @pytest.mark.parametrize("change", ["tokens", "length", "dense", "size"])
    def test_what_was_measured_otherwise_is_not_compared(self, change: str, runs: Path) -> None:
        half, two, units = read_runs([runs / name for name in NAMES])
        report = copy.deepcopy(dict(units.report))
        (stamp,) = report["evaluation"]["protocol"]["texts"].values()
        (figures,) = report["evaluation"]["perplexity"].values()
        if change == "tokens":
            stamp["tokens_sha256"] = "0" * 64
        elif change == "length":
            stamp["length"] += 1
        elif change == "dense":
            figures["dense"] *= 1.01
        else:
            report["parameters"]["dense"] += 1
        other = FinishedRun("units", units.folder, report, units.recipe, units.plans)
        (chart,) = trade_offs([half, two, other])
        assert "units" not in chart.svg and chart.note.endswith("not measured alike: units.")
        rows = [row.cells for row in side_by_side([half, two, other]) if row.what.startswith("Perplexity")]
        assert len(rows) == 2
        assert rows[0][2] == "-" and rows[1][:2] == ["-", "-"] and rows[1][2] != "-"
        assert trade_offs([half, other]) == []
        assert "there is nothing to draw" in page([half, other])

    def test_figures_of_dense_that_depend_on_the_run_stand_beside_those_of_the_run(self, runs: Path) -> None:
        (half,) = read_runs([runs / "half"])
        found = []
        for name, alone in (("one", 3), ("other", 4)):
            report = copy.deepcopy(dict(half.report))
            right = {"accuracy": {"model": 0.5, "dense": 0.75}, "kinds": {}, "kl": 0.1, "kl_se": 0.2}
            only = {"dense_only": alone, "model_only": 1, "p": 0.5}
            report["evaluation"]["questions"] = {"asked": right | {"mcnemar": only}}
            found.append(FinishedRun(name, half.folder, report, "", ()))
        rows = {row.what: row for row in side_by_side(found)}
        assert rows["Right answers, asked"].dense == "75.0%"
        assert rows["Right by one alone, asked"].cells == ["3 dense, 1 pruned", "4 dense, 1 pruned"]
        assert [chart.title.partition(",")[0] for chart in trade_offs(found)][1] == "KL from dense on asked"

    def test_runs_that_differ_in_operations_of_tokens_are_drawn_against_them(self, runs: Path) -> None:
        (half,) = read_runs([runs / "half"])
        found = []
        for name, share in (("few", 0.25), ("many", 0.75)):
            report = copy.deepcopy(dict(half.report))
            report["stages"][0]["while_running"] = {"visual_flops": share}
            found.append(FinishedRun(name, half.folder, report, "", ()))
        (chart,) = trade_offs(found)
        assert chart.title.endswith("against operations of visual tokens")
        assert "operations of visual tokens 25%" in chart.svg


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            ([], 2, "OUT"),
            (["half"], 2, "--output"),
            (["half", "half", "-o", "new.html"], 2, "given 2 times"),
            (["half", "link", "-o", "new.html"], 2, "given 2 times"),
            (["half", "-o", "new.pdf"], 2, "a page is written as HTML"),
            (["half", "-o", "half/new.html"], 2, "never written to"),
            (["half", "-o", "there.html"], 4, "exists"),
            (["half", "-o", "folder.html"], 4, "is no file"),
            (["half", "-o", "there.html/new.html"], 4, "there.html"),
            (["none", "-o", "new.html"], 3, "none: no such folder"),
            (["demo", "-o", "new.html"], 3, "demo: no such folder"),
            (["killed", "-o", "new.html"], 3, "the run that writes it was interrupted"),
            (["unfinished", "-o", "new.html"], 3, "incomplete, it has structprune/"),
            (["model", "-o", "new.html"], 3, "no folder that structprune wrote"),
            (["there.html", "-o", "new.html"], 3, "a file, expected a folder"),
            (["sweep", "-o", "new.html"], 3, "it holds 1 of them"),
            (["half", "lost", "-o", "new.html"], 3, "report.json is missing"),
            (["never", "-o", "new.html"], 3, "holds no structprune/report.json"),
            (["cut", "-o", "new.html"], 3, "report.json"),
            (["changed", "-o", "new.html"], 3, "report.json was changed"),
            (["recipe", "-o", "new.html"], 3, "recipe.yaml has 13 bytes"),
            (["plan", "-o", "new.html"], 3, "plan.json has"),
            (["future", "-o", "new.html"], 3, "format: Input should be 1 or 2"),
            (["lacking", "-o", "new.html"], 3, "report.json: parameters: Field required"),
            (["adapter", "-o", "new.html"], 3, "a kept adapter"),
        ],
    )
    def test_it_is_refused_in_a_line(
        self, words: list[str], code: int, said: str, damaged: Path, command: Command,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(damaged)
        before = stamps(damaged)
        done = command("report", *words, "--json")
        assert done.code == code, done.err
        assert said in done.json["error"]["message"]
        assert done.json["error"]["hint"]
        assert stamps(damaged) == before

    def test_a_page_is_replaced_when_asked_to(self, damaged: Path, command: Command) -> None:
        file = damaged.parent / "there.html"
        file.write_text("mine")
        done = command("report", damaged / "half", "-o", file, "--overwrite", "-q")
        assert done.code == 0 and file.read_text().startswith("<!DOCTYPE html>")

    def test_no_folder_at_all_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(structprune.UsageError, match="no folder is given"):
            structprune.report_runs([], tmp_path / "a.html")

    def test_whatever_a_report_holds_it_is_shown_or_refused(self, runs: Path) -> None:
        (one,) = read_runs([runs / "two"])
        whole = report_of(runs / "two")
        (half,) = read_runs([runs / "half"])
        shown = refused = 0
        for path in paths(whole):
            for value in (None, "x", -1, 10**30, 1e308, [], {}, GONE):
                damaged = replaced(whole, path, value)
                try:
                    report = checked_report(damaged, one.folder)
                except InputError:
                    refused += 1
                    continue
                Parsed(page([FinishedRun("x", one.folder, report, one.recipe, one.plans), half]))
                shown += 1
        assert shown > 100 and refused > 300


@pytest.fixture(scope="module")
def damaged(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a whole run, and with everything that is none."""
    folder = tmp_path_factory.mktemp("damaged") / "in"
    shutil.copytree(runs / "half", folder / "half")
    for name in (
        "unfinished",
        "lost",
        "never",
        "cut",
        "changed",
        "recipe",
        "plan",
        "future",
        "lacking",
        "adapter",
    ):
        shutil.copytree(runs / "half", folder / name)
    shutil.copytree(runs / "half", folder / "sweep/0.5")
    shutil.copytree(runs / "model", folder / "model")
    (folder / "link").symlink_to("half")
    (folder / "there.html").write_text("mine")
    (folder / "folder.html").mkdir()
    killed = partial_of(folder / "killed", "0123456789abcdef")
    (killed / FINGERPRINT).parent.mkdir(parents=True)
    (killed / FINGERPRINT).write_text("{}")
    (folder / "unfinished/structprune.json").unlink()
    (folder / "lost" / REPORT).unlink()
    alter(folder / "never", REPORT, "")
    (folder / "never" / REPORT).unlink()
    report = (folder / "cut" / REPORT).read_text()
    alter(folder / "cut", REPORT, report[: len(report) // 2])
    (folder / "changed" / REPORT).write_text(report.replace("0.5", "0.9"))
    (folder / "recipe" / RECIPE).write_text("model: other\n")
    plan = next((folder / "plan").glob("structprune/plans/*/plan.json"))
    plan.write_text(plan.read_text() + " ")
    manifest = json.loads((folder / "future/structprune.json").read_text())
    (folder / "future/structprune.json").write_text(json.dumps(manifest | {"format": 3}))
    whole = json.loads(report)
    alter(folder / "adapter", REPORT, json.dumps({"output": "x", "adapter": {}, "evaluation": {}}))
    whole.pop("parameters")
    alter(folder / "lacking", REPORT, json.dumps(whole))
    return folder


GONE = object()


def paths(value: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in JSON; of a list only to what is in its first entry."""
    if start:
        yield start
    inner = (
        value.items()
        if isinstance(value, dict)
        else [*enumerate(value)][:1]
        if isinstance(value, list)
        else ()
    )
    for key, part in inner:
        if start[:1] not in (("calibration",), ("versions",), ("phases",)) and "config" not in start:
            yield from paths(part, (*start, key))


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """Return JSON with another value in one place, or without what stood there."""
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    if other is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = other
    return value
