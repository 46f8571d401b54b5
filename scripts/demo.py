"""The whole story on the built-in model: prune it in five ways, prove each, evaluate, recover one, report.

`scripts/demo` prepares the environment and calls this file.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import structprune
from structprune.checkpoint.writing import Writing
from structprune.cli.terminal import logging_to_stderr, progress_on_stderr, stoppable
from structprune.demo.tasks import write_tasks, write_text
from structprune.recipe.options import EvaluateOptions, RecoverOptions
from structprune.report import plots

RUNS: dict[str, dict[str, Any]] = {
    "random 50%": {"method": "random", "sparsity": 0.5},
    "magnitude 50%": {"method": "magnitude", "sparsity": 0.5},
    "wanda 50%": {"method": "wanda", "sparsity": 0.5},
    "wanda 2:4": {"method": "wanda", "sparsity": "2:4"},
    "wanda 70%": {"method": "wanda", "sparsity": 0.7},
}
ANEW = Writing(overwrite=True, restart=True)
RECOVERED = "wanda 70%"
# Enough windows and questions for errors well below the differences between methods, few enough for minutes.
WINDOWS, LENGTH, QUESTIONS = 48, 256, 100


def main() -> None:
    """Run the demo into a folder and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-run"), help="the folder to write")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "held_out.txt")
    tasks = write_tasks(output / "tasks", size=QUESTIONS)
    measured = {
        "text": str(output / "held_out.txt"),
        "windows": WINDOWS,
        "length": LENGTH,
        "tasks": tasks,
        "include_path": output / "tasks",
    }
    reports: dict[str, dict[str, Any]] = {}
    with stoppable() as check, logging_to_stderr(), progress_on_stderr(check) as progress:

        def staged(label: str) -> Any:
            return lambda stage, done, total: progress(f"{label}: {stage}", done, total)

        for label, stage in RUNS.items():
            recipe = structprune.Recipe.model_validate(
                {"model": "demo", "output": output / folder(label), "prune": stage, "evaluate": measured}
            )
            reports[label] = structprune.prune(recipe, writing=ANEW, progress=staged(label))
        label = f"{RECOVERED} + LoRA"
        reports[label] = structprune.recover(
            str(output / folder(RECOVERED)),
            output / folder(label),
            RecoverOptions(
                data="demo", steps=120, learning_rate=2e-3, length=128, batch_size=16, teacher="demo"
            ),
            evaluate=EvaluateOptions.model_validate(measured),
            writing=ANEW,
            progress=staged(label),
        )
    rows = [row(label, report) for label, report in reports.items()]
    plots.methods(output / "methods.png", rows, title=f"held-out text, {WINDOWS} windows of {LENGTH} tokens")
    text = json.dumps({"runs": reports, "table": rows}, indent=2)
    (output / "report.json").write_text(text + "\n", encoding="utf-8")
    show(rows, reports, output)


def folder(label: str) -> str:
    """Return a label as a folder's name."""
    return label.replace(" + ", "-").replace(" ", "-").replace("%", "").replace(":", "-").lower()


def row(label: str, report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one run."""
    evaluation = report["evaluation"]
    (name,) = evaluation["perplexity"]
    perplexity, divergence = evaluation["perplexity"][name], evaluation["divergence"][name]
    return {
        "label": label,
        "sparsity": report["sparsity"],
        "proved": report["verification"]["ok"],
        "perplexity": perplexity["model"],
        "dense": perplexity["dense"],
        "kl": divergence["kl"],
        "kl_se": divergence["kl_se"],
        "top1_agreement": divergence["top1_agreement"],
        "tasks": {task: headline(metrics) for task, metrics in evaluation["tasks"].items()},
        "seconds": report["seconds"],
    }


def headline(metrics: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """Return the model's and the dense model's share of right answers; None for a task without one."""
    for metric, figures in metrics.items():
        if metric.partition(",")[0] in ("acc", "exact_match"):
            return figures
    return None


def show(rows: list[dict[str, Any]], reports: dict[str, dict[str, Any]], output: Path) -> None:
    """Print one table, the dense model first."""
    tasks = [task for task, figures in rows[0]["tasks"].items() if figures]
    table = Table(title="The demo model, dense, pruned and recovered")
    for column in (
        "",
        "zeros",
        "proved",
        "perplexity",
        "KL from dense",
        "top-1",
        *(t.removeprefix("demo_") for t in tasks),
    ):
        table.add_column(column, justify="left" if column == "" else "right")
    scores = [f"{rows[0]['tasks'][task]['dense']:.0%}" for task in tasks]
    table.add_row("dense", "0%", "", f"{rows[0]['dense']:.3f}", "0", "100%", *scores)
    for one in rows:
        scores = [f"{one['tasks'][task]['model']:.0%}" for task in tasks]
        table.add_row(
            one["label"],
            f"{one['sparsity']:.1%}",
            "yes" if one["proved"] else "NO",
            f"{one['perplexity']:.3f}",
            f"{one['kl']:.4f} ± {one['kl_se']:.4f}",
            f"{one['top1_agreement']:.1%}",
            *scores,
        )
    # Wide enough for the whole table where the output is no terminal.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        f"{output}/report.json, {output}/methods.png; a model card in each of {len(reports)} folders"
    )


if __name__ == "__main__":
    main()
