"""The whole story on the built-in models: prune in eight ways, prove each, evaluate, recover one, report.

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
# Of the visual tokens of the model that sees, the same share is left to each method.
TOKENS = ("random_tokens", "divprune", "fastv")
KEPT = 0.11
ANEW = Writing(overwrite=True, restart=True)
RECOVERED = "wanda 70%"
# Enough windows and questions for errors well below the differences between methods, few enough for minutes.
WINDOWS, LENGTH, QUESTIONS = 48, 256, 100
ASKED = 150  # questions on images


def main() -> None:
    """Run the demo into a folder and print a table for each of the models."""
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
    seeing: dict[str, dict[str, Any]] = {}
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
        for method in TOKENS:
            recipe = structprune.Recipe.model_validate(
                {
                    "model": "demo-vision",
                    "output": output / method,
                    "prune": {"method": method, "target": {"keep_ratio": KEPT}},
                    "evaluate": {"questions": "demo-vision", "limit": ASKED, "generations": False},
                }
            )
            seeing[method] = structprune.prune(recipe, writing=ANEW, progress=staged(method))
    rows = [row(label, report) for label, report in reports.items()]
    plots.methods(output / "methods.png", rows, title=f"held-out text, {WINDOWS} windows of {LENGTH} tokens")
    found = {"runs": reports | seeing, "table": rows}
    (output / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    # Wide enough for a whole table where the output is no terminal.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    console.print(table_of(rows))
    console.print(table_of_seeing(seeing))
    console.print(
        f"{output}/report.json, {output}/methods.png; a model card in each of {len(reports | seeing)} folders"
    )


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


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the table of the model of text, the dense one first."""
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
    return table


def table_of_seeing(reports: dict[str, dict[str, Any]]) -> Table:
    """Return the table of the model that sees, the dense one first."""
    found = {label: one["evaluation"]["questions"]["demo-vision"] for label, one in reports.items()}
    first = next(iter(found.values()))
    table = Table(title=f"The vision demo with {KEPT:.0%} of its visual tokens, {first['asked']} questions")
    for column in ("", "tokens", "operations", "proved", "KL from dense", "right", *first["kinds"]):
        table.add_column(column, justify="left" if column == "" else "right")

    def shares(one: dict[str, Any], which: str) -> list[str]:
        return [f"{each[which]:.0%}" for each in (one["accuracy"], *one["kinds"].values())]

    table.add_row("dense", "all", "100%", "", "0", *shares(first, "dense"))
    for label, one in found.items():
        (stage,) = reports[label]["stages"]
        left = stage["while_running"]
        table.add_row(
            label,
            f"{left['tokens']} of {left['visual_tokens']}",
            f"{left['visual_flops']:.0%}",
            "yes" if reports[label]["verification"]["ok"] else "NO",
            f"{one['kl']:.3f} ± {one['kl_se']:.3f}",
            *shares(one, "model"),
        )
    return table


if __name__ == "__main__":
    main()
