"""One page about one or several runs, complete in itself: no network, no script, no other file."""

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from structprune.errors import UsageError
from structprune.report.block_charts import block_charts
from structprune.report.charts import COLOURS
from structprune.report.comparison import side_by_side, trade_offs
from structprune.report.finished import FinishedRun
from structprune.report.report import table_rows
from structprune.report.sentences import (
    about,
    calibration_sentence,
    composition,
    goals_header,
    goals_rows,
    made_sentence,
    protocol_sentences,
    recovery_sentence,
)
from structprune.report.speed import speed_header, speed_notes, speed_rows
from structprune.storage import strict_yaml
from structprune.version import __version__

TEMPLATE = "page.html.jinja"
_SPOKEN = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*")


def page(runs: Sequence[FinishedRun]) -> str:
    """Return a page in HTML; the same runs give the same bytes.

    Whatever comes from the folders of runs is escaped, and the page allows no script to run.

    Args:
        runs: At least one.
    """
    # What is escaped: everything that is not Markup.
    writer = Environment(
        loader=PackageLoader("structprune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    writer.filters["spoken"] = _spoken
    writer.filters["drawn"] = Markup
    several = len(runs) > 1
    return writer.get_template(TEMPLATE).render(
        runs=[_content(run) for run in runs],
        names=[run.name for run in runs],
        rows=side_by_side(runs) if several else [],
        charts=trade_offs(runs) if several else [],
        colours=COLOURS,
        version=__version__,
    )


def _content(run: FinishedRun) -> dict[str, Any]:
    """Return what the page says of one run."""
    report = run.report
    base, speed = _base_of(run.recipe), report.get("bench")
    return {
        "name": run.name,
        "method": composition(report),
        "base": base,
        "about": list(about(report, base)),
        "goals_header": goals_header(report),
        "goals": goals_rows(report),
        "figures": table_rows(report),
        "protocol": list(protocol_sentences(report)),
        "recovery": recovery_sentence(report),
        "charts": block_charts(report, run.plans),
        "speed_header": speed_header(speed, "pruned") if speed else (),
        "speed": speed_rows(speed) if speed else [],
        "speed_notes": speed_notes(speed) if speed else [],
        "continuations": (report["evaluation"] or {}).get("generations", []),
        "loads_in": report["loads_in"],
        "checks": report["verification"]["checks"],
        "calibration": calibration_sentence(report),
        "recipe": run.recipe,
        "made": made_sentence(report),
    }


def _base_of(recipe: str) -> str:
    """Return what the model of a recipe is called; where it lay is nobody's business."""
    try:
        said = strict_yaml.parse(recipe, "recipe.yaml")
    except UsageError:  # edited after the run; it is shown as it is
        said = None
    model = said.get("model") if isinstance(said, dict) else None
    return PurePath(model).name if isinstance(model, str) else "the source"


def _spoken(sentence: str) -> Markup:
    """Return a sentence with its `code` and **bold** as HTML, and all else escaped."""
    said, end = Markup(""), 0
    for found in _SPOKEN.finditer(sentence):
        code, bold = found.groups()
        said += sentence[end : found.start()]
        said += Markup("<code>{}</code>").format(code) if code else Markup("<b>{}</b>").format(bold)
        end = found.end()
    return said + sentence[end:]
