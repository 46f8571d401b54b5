"""Every reader of a file that somebody else may have written, by the file that it reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune.calibration.text_source import TextSource
from structprune.calibration.texts import pieces
from structprune.checkpoint.adapter import read_adapter
from structprune.checkpoint.delivery import is_delivered
from structprune.checkpoint.lock import Lock
from structprune.checkpoint.manifest import check_manifest
from structprune.checkpoint.packed import read_packing
from structprune.models.opening import Opening
from structprune.models.streamed import open_skeleton
from structprune.models.tokenizer import open_tokenizer
from structprune.plan.block import PlanBlock
from structprune.plan.plan import Plan
from structprune.recipe.recipe import load
from structprune.report.finished import FinishedRun, checked_report
from structprune.report.page import page
from structprune.report.report import read_report
from structprune.storage.header import read_header
from structprune.storage.reader import CheckpointReader
from structprune.storage.strict_json import read_json

STREAMED = Opening(stream=True)


@dataclass(frozen=True)
class Reader:
    """A reader and what it reads.

    Attributes:
        file: The file that is damaged, relative to the specimens.
        read: Reads it there; a value that compares with what it gave before, or None.
        share: How many of 100 000 damages are its own.
        exact: Whatever is read must be what was written: a hash stands for it.
    """

    file: str
    read: Callable[[Path], Any]
    share: int
    exact: bool = False


def _tensors(path: Path) -> Mapping[str, Any]:
    plan = Plan.load(path.parent)
    return {str(key): plan[key].tolist() for key in plan if not any(key in b.referred for b in plan.blocks)}


def _block(path: Path) -> Mapping[str, Any]:
    block = PlanBlock.load(path)
    return {str(key): block[key].tolist() for key in block if key not in block.referred}


def _factors(path: Path) -> None:
    read_adapter(path.parent)


def _lock(path: Path) -> None:
    with Lock(path.with_suffix("")):
        pass


def _text(path: Path) -> None:
    for _ in pieces(TextSource(str(path))):
        pass


def _skeleton(path: Path) -> None:
    open_skeleton(path.parent, STREAMED)


def _tokenize(path: Path) -> None:
    tokenizer = open_tokenizer(path.parent)
    if tokenizer is not None:
        assert tokenizer("a b c").input_ids is not None


def _page(path: Path) -> None:
    folder = path.parents[1]
    report = checked_report(read_report(folder), folder)
    page([FinishedRun("run", folder, report, "", ())])


MODEL, PRUNED, SOLVED = (
    "model",
    "pruned/structprune/plans/01-magnitude",
    "solved/structprune/plans/01-sparsegpt",
)
SHARD = "model-00003-of-00004.safetensors"

READERS: dict[str, Reader] = {
    "header": Reader(f"{MODEL}/{SHARD}", read_header, 24_000),
    "json": Reader(f"{MODEL}/config.json", lambda path: read_json(path, limit_bytes=2**20), 20_000),
    "index": Reader(
        f"{MODEL}/model.safetensors.index.json", lambda path: CheckpointReader(path.parent).shards, 6_000
    ),
    "shard": Reader(f"{MODEL}/{SHARD}", lambda path: CheckpointReader(path.parent).scan(), 2_500),
    "config": Reader(f"{MODEL}/config.json", _skeleton, 3_000),
    "tokenizer": Reader(f"{MODEL}/tokenizer.json", _tokenize, 1_500),
    "tokenizer_config": Reader(f"{MODEL}/tokenizer_config.json", _tokenize, 1_500),
    "recipe": Reader("recipe.yaml", load, 12_000),
    "plan": Reader(f"{PRUNED}/plan.json", _tensors, 4_000, exact=True),
    "solved plan": Reader(f"{SOLVED}/plan.json", _tensors, 2_000, exact=True),
    "block": Reader(f"{PRUNED}/block-0001.safetensors", _block, 4_000, exact=True),
    "solved block": Reader(f"{SOLVED}/block-0000.safetensors", _block, 2_000, exact=True),
    "manifest": Reader("pruned/structprune.json", lambda path: check_manifest(path.parent), 3_000),
    "fingerprint": Reader(
        "pruned/structprune/fingerprint.json", lambda path: is_delivered(path.parents[1], {}), 5_000
    ),
    "report": Reader("pruned/structprune/report.json", _page, 4_000),
    "packing": Reader(
        "packed/structprune/packing.json", lambda path: read_packing(path.parents[1], None), 4_000
    ),
    "adapter": Reader("adapter/adapter_config.json", _factors, 4_000),
    "adapter tensors": Reader("adapter/adapter_model.safetensors", _factors, 3_000),
    "lock": Reader("out.lock", _lock, 2_000),
    "text": Reader("text.txt", _text, 1_500),
    "rows": Reader("rows.jsonl", _text, 4_000),
}
