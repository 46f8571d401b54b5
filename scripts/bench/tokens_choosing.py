"""What choosing takes: every token pruner on an image of 576 tokens, over a dense prefill.

    python scripts/bench/tokens_choosing.py [--write]

The processor's seconds of all that a method does to choose, merging and what it notes on the way included, in
one process with one thread, of a random LLaVA of 300 M parameters whose tower has the width of CLIP's. Of
every method its defaults; not those that are fitted. ToMe matches inside the tower, which
is not seen here; its operations are counted in the account of a plan.
"""

import argparse
from statistics import median
from typing import Any

import torch
from figures import markdown, write_section
from tokens_model import TEXT, prompt, random_llava
from tokens_quality import token_methods
from tokens_seen import TimedChoosers, in_language_model

from structprune.errors import UsageError
from structprune.machine import environment
from structprune.pruners.catalogue import find
from structprune.pruners.while_running import pruning
from structprune.runtime.attach import engine_of, paused

WIDTH, LAYERS = 1024, 4


@torch.no_grad()
def choosing(model: Any, batch: Any, method: str, rounds: int) -> tuple[float, float] | None:
    """Return what choosing takes, and the whole prefill, over a dense prefill; None where it is not seen."""
    name, _, queries = method.partition(" ")
    pruner: Any = find(name).model_validate({"queries": queries} if queries else {})
    if pruner.needs_data:
        return None
    found = []
    with pruning(model, pruner):
        engine = engine_of(model)
        if engine is None or engine.fewer() is not None:
            return None
        for _ in range(rounds):
            with in_language_model(model) as dense, paused(model):
                model(**batch, logits_to_keep=1)
            with TimedChoosers(engine) as choosers, in_language_model(model) as mine:
                model(**batch, logits_to_keep=1)
            found.append((choosers.seconds / dense[0], mine[0] / dense[0]))
    return median(one for one, _ in found), median(two for _, two in found)


def main() -> None:
    """Measure, print and, with --write, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the section of README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, batch = random_llava(width=WIDTH, layers=LAYERS), prompt()
    rows = []
    for method in token_methods():
        try:
            found = choosing(model, batch, method, options.rounds)
        except UsageError as error:
            print(f"{method}: {error}")
            continue
        if found is not None:
            rows.append([method, f"{found[0]:.2%}", f"{found[1]:.2f}"])
            print(*rows[-1], flush=True)
    table = markdown(["method", "choosing / dense prefill", "prefill / dense prefill"], rows)
    processor = environment()["machine"]["processor"]
    said = (
        f"Image of 576 tokens, {TEXT} tokens of text, each method's defaults; medians of {options.rounds}. "
        "Prefill: choosing included, without the tower. Not here: what spares the tower, and fitprune, "
        f"whose figures stand under tokens.py. {processor}, a shared host."
    )
    if options.write:
        write_section("tokens_choosing.py", f"{table}\n\n{said}")


if __name__ == "__main__":
    main()
