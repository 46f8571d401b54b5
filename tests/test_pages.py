"""The pages tell the truth: links lead somewhere, and what a reader may type works on the built-in models.

Every command of a block `sh` and every block `python` is run, page by page and from top to bottom, in a
folder that holds what the pages take for granted (`text.txt`, `questions.jsonl` ...). `NOT_RUN` says what is
not, and why.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from safetensors.torch import load_file

import structprune
from structprune import Plan, pruners
from structprune.calibration.statistics import Part
from structprune.cli import app
from structprune.demo.sights import write_questions
from structprune.demo.tasks import write_tasks, write_text
from structprune.plan.key import EDITS
from structprune.pruners import catalogue
from structprune.storage import strict_yaml
from tests.conftest import Command
from tests.methods import QUICK, short_runs
from tests.pages import LANGUAGES, PAGES, ROOT, anchors_of, blocks_of, links_of, name_of, paths_of
from tests.test_imports import TIERS

# In capitals where a page means whatever the reader has.
MEANT = {"MODEL": "demo", "VLM": "demo-vision"}
# Beginnings of commands.
NOT_RUN = {
    "pip install": "installs packages",
    "scripts/demo": "takes minutes, and makes an environment of its own",
    "scripts/test": "is what runs this",
    "scripts/check": "is run before this",
    "jupyter": "opens a browser",
    "lm_eval": "downloads the questions of the task",
    "torchrun": "starts processes with imports of their own; tests/test_launches.py does, once",
    "accelerate launch": "starts processes with imports of their own; tests/test_launches.py does, once",
}
# Pages and folders of pages.
NOT_RUN_PAGES = {"scripts/bench": "a bench takes minutes to days"}
# Less of everything, of a command or of a method; what a line says itself stays.
LESS = {
    "prune": "--samples=4 --length=32",
    "evaluate": "--windows=1 --length=16 --limit=2 --set=evaluate.generations=false",
    # Small as they are, some of these steps lead down: what does not is refused.
    "recover": "--steps=4 --length=32 --learning-rate=1e-3 --set=recover.check_every=1",
    "bench": "--length=8 --new=2 --repeats=1",
    "armor": "--set=prune.rounds=2",
}
# Of what a run evaluates.
LESS["prune"] += "".join(
    f" --set=evaluate.{key}" for key in ("windows=1", "length=16", "limit=2", "generations=false")
)
EVERY = [pytest.param(page, id=name_of(page)) for page in PAGES]
RUNNING = [
    pytest.param(page, id=name_of(page))
    for page in PAGES
    if not name_of(page).startswith(tuple(NOT_RUN_PAGES))
    if any(block.language in ("sh", "python") for block in blocks_of(page))
]


@pytest.mark.parametrize("page", EVERY)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in links_of(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)}: {target}: there is no such file"
        assert not anchor or anchor in anchors_of(there), f"{name_of(page)}: {target}: no such heading"


@pytest.mark.parametrize("page", EVERY)
def test_every_path_that_is_set_in_code_is_there(page: Path) -> None:
    lost = [path for path in paths_of(page) if not (ROOT / path).exists()]

    assert not lost, f"{name_of(page)} speaks of {lost}"


@pytest.mark.parametrize("page", EVERY)
def test_every_block_says_what_it_is(page: Path) -> None:
    wrong = [f"line {one.line}: {one.language!r}" for one in blocks_of(page) if one.language not in LANGUAGES]

    assert not wrong, f"{name_of(page)}: a block is one of {', '.join(LANGUAGES)}; {wrong}"


@pytest.mark.parametrize("page", RUNNING)
def test_what_a_reader_may_type_works(page: Path, desk: Path, command: Command) -> None:
    for block in blocks_of(page):
        where = f"{name_of(page)}, line {block.line}"
        if block.language == "sh":
            for words in block.commands:
                _type(words, where, command)
        elif block.language == "python" and not block.text.startswith("# mine/"):
            exec(compile(block.text, where, "exec"), {"__name__": "page"})


def _type(words: list[str], where: str, command: Command) -> None:
    line = " ".join(words)
    if line.startswith(tuple(NOT_RUN)):
        return
    assert words[0] == "structprune", f"{where}: {line}: nobody runs this; NOT_RUN may say why"
    words, file = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
    typed = [MEANT.get(word, word) for word in words[1:]]
    if not {"--dry-run", "--rates"} & set(words):
        less = [flag for one in LESS if one in words for flag in LESS[one].split()]
        if "questions.jsonl" in words:
            less.remove("--length=" + ("32" if words[1] == "prune" else "16"))  # questions are read whole
        typed += [flag for flag in less if flag.partition("=")[0] not in words or flag.startswith("--set=")]
    done = command(*typed)
    assert done.code == 0, f"{where}: {line}: {done.err}"
    if file:
        Path(file).write_text(done.out)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in a folder with what the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_text(Path("text.txt"), seed=5, characters=20_000)
    write_text(Path("held_out.txt"), characters=20_000)
    write_tasks(Path("tasks"), size=2)
    write_questions(Path("questions.jsonl"), seed=5, scenes=1)
    os.link("questions/000.png", "picture.png")
    for one in ("recipes", "scripts"):
        Path(one).symlink_to(ROOT / one)
    _write_methods(Path("mine"))
    found = list(pruners.__path__)
    with short_runs():
        yield tmp_path
    pruners.__path__[:] = found


def _write_methods(folder: Path) -> None:
    """Write the methods that a page holds, each to where its first line says."""
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "python" and block.text.startswith(f"# {folder}/"):
                path = Path(block.text.partition("\n")[0].removeprefix("# "))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)


def test_what_is_said_not_to_be_run_is_there() -> None:
    blocks = [one for page in PAGES for one in blocks_of(page) if one.language == "sh"]
    typed = [" ".join(words) for one in blocks for words in one.commands]
    idle = [start for start in NOT_RUN if not any(line.startswith(start) for line in typed)]

    assert not idle, f"no page types {idle}"
    assert all((ROOT / page).exists() for page in NOT_RUN_PAGES)


def test_the_readme_is_short_and_names_every_command_and_method() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    said = re.findall(r"`(\w+)", text)

    assert len(text.encode()) <= 6000
    assert typer.main.get_group(app).commands.keys() <= set(said)
    assert catalogue.names().keys() <= set(said)


ARCHITECTURE = ROOT / "structprune" / "README.md"
FILES = [one for one in blocks_of(ARCHITECTURE) if one.text.startswith("# mine/")]
FAMILY_OF = {Path(one.text.split()[1]).stem: Path(one.text.split()[1]).parent.name for one in FILES}
STORED = [name for name, family in FAMILY_OF.items() if family != "token"]


def test_there_is_an_example_for_every_family_and_for_a_new_one() -> None:
    assert sorted(FAMILY_OF.values()) == ["structure", "token", "vocabulary", "weight", "weight"]


@pytest.mark.parametrize("method", STORED)
def test_an_added_method_leaves_in_the_files_what_it_promises(method: str, desk: Path) -> None:
    pruners.__path__.append("mine")
    goal: dict[str, Any] = {} if FAMILY_OF[method] == "vocabulary" else {"sparsity": 0.4}

    report = structprune.prune("demo", "out", method, **goal, **QUICK)

    (stage,) = report["stages"]
    promises = Plan.load(next(Path("out/structprune/plans").iterdir())).promises
    assert promises is not None
    assert stage["measured"] == stage["reachable"] == promises.removed / promises.of > 0
    assert abs(promises.removed / promises.of - 0.4) < 0.01 or not goal
    dense, left = _tensors(ROOT / "structprune/demo/model"), _tensors(Path("out"))
    if stage["unit"] == "weights":
        named = {name for one in promises.stored for name in one.tensors}
        assert promises.removed == sum(int((left[name] == 0).sum()) for name in named)
    else:
        assert promises.removed == sum(dense[name].numel() - left[name].numel() for name in dense)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.mark.parametrize("method", [name for name, family in FAMILY_OF.items() if family == "token"])
def test_an_added_token_method_lets_blocks_compute_as_many_as_it_promises(method: str, desk: Path) -> None:
    pruners.__path__.append("mine")
    model, _ = structprune.load("demo-vision")
    pixels = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    image = model.config.image_token_id
    batch = {
        "input_ids": torch.tensor([[image + 1, *[image] * 144, image + 2, image + 3]]),
        "pixel_values": pixels,
    }

    def computed() -> int:
        seen: list[int] = []
        layers = model.get_submodule("model.language_model.layers")
        hooks = [
            one.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1])) for one in layers
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        return sum(seen)

    dense = computed()
    with structprune.pruning(model, structprune.find(method)(target={"tokens": 36})) as plan:
        left = computed()
    assert plan.promises is not None
    assert dense - left == plan.promises.removed == 5 * (144 - 36)
    assert computed() == dense


def test_the_architecture_names_every_room_arrow_kind_and_part_as_they_are() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / "structprune").glob("*/__init__.py")}
    kinds = {kind for row in rows for kind in row.split("`, `")}
    (arrows,) = [one.text for one in blocks_of(ARCHITECTURE) if one.text.startswith("__main__")]

    assert kinds == rooms | set(EDITS) | set(get_args(Part))
    assert [line.split() for line in arrows.splitlines()] == TIERS


def test_the_forms_of_an_issue_ask_for_what_a_bug_report_needs() -> None:
    forms = {path.stem: strict_yaml.read(path)[0] for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    asked = {
        name: [part["attributes"]["label"] for part in form["body"] if part["type"] != "markdown"]
        for name, form in forms.items()
        if name != "config"
    }

    assert asked.keys() == {"bug", "figure", "method"}
    assert "structprune env" in asked["bug"] and "structprune env" in asked["figure"]
