"""LoRA with the same budget after every structure pruner: what is left of their differences.

Protocol: that of `structure_quality.py`. Every row, and the dense model itself, trains on the text that was
calibrated on: the same steps on the same sequences in the same order, the same rank in every linear. Neither
the text to choose on nor the one that is reported is among them. As training also adapts a model to its text,
which leads away from the dense one, a recovered model is compared with the dense model trained alike, too.

    python scripts/bench/structure_recovery.py --model demo --sparsities 0.5 --json /tmp/recovery.json
    python scripts/bench/structure_recovery_tables.py /tmp/recovery.json --write

The JSON is rewritten after every cell; a second call with the same file measures only what it lacks.
"""

import json
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from cells import Cell, kept_cells
from structure_quality import Bench, Judged, bench_of, facts_of, parser_of, protocol_of, texts_of
from structure_rows import TRAINED
from torch import Tensor
from transformers import PreTrainedModel

from structprune.calibration.text_source import TextSource
from structprune.errors import QualityError
from structprune.models.tokenizer import open_tokenizer
from structprune.recipe.options import RecoverOptions
from structprune.recovery.masks import nonzero_masks
from structprune.recovery.training import train
from structprune.recovery.windows import draw


def budget_of(options: Namespace) -> RecoverOptions:
    """Return how everything trains."""
    return RecoverOptions(
        steps=options.steps, batch_size=4, length=256, rank=8, learning_rate=1e-3, check_every=50
    )


def windows_of(options: Namespace, budget: RecoverOptions, bench: Bench) -> Tensor:
    """Return what is trained on, shape [windows, tokens]: no more than the steps can look at."""
    tokenizer = open_tokenizer(bench.folder)
    assert tokenizer is not None
    limit = int(budget.steps * budget.batch_size / (1 - budget.held_out)) + 1
    with TemporaryDirectory() as place:
        source, *_ = texts_of(options, Path(place))
        return draw(TextSource(source), tokenizer, limit=limit, length=budget.length).ids


def recover(model: PreTrainedModel, windows: Tensor, budget: RecoverOptions) -> Cell:
    """Train a model in place; return what there is to say of it."""
    began = time.process_time()
    try:
        recovery = train(model, nonzero_masks(model), windows, budget)
    except QualityError as error:  # nothing beat the start, and the model is as it was
        return {"failed": error.message}
    found = {"start_loss": recovery.start_loss, "best_loss": recovery.best_loss}
    return found | {"best_step": recovery.best_step, "cpu_seconds": time.process_time() - began}


def compared(model: PreTrainedModel, tuned: Judged) -> Cell:
    """Return how far a model is from the dense one that was trained alike."""
    scores = tuned.score(model)
    return {"windows": scores.kl, "tokens": scores.tokens, "kl": scores.mean(scores.kl)}


def main() -> None:
    """Measure what the JSON lacks."""
    parser = parser_of(__doc__, TRAINED, (0.5,))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    options.rounds = 0  # A change that is merged costs no time.
    torch.set_num_threads(1)
    bench, budget = bench_of(options), budget_of(options)
    protocol = (
        f"{protocol_of(options, bench)}; LoRA of all linears of the blocks on the text of the calibration, "
        f"{budget.steps} steps of {budget.batch_size} x {budget.length} tokens, rank {budget.rank}, alpha "
        f"{budget.alpha}, learning rate {budget.learning_rate:g}, no teacher"
    )
    kept = kept_cells(options.json, protocol) | facts_of(options.model, bench)
    done = {(cell["row"], cell["sparsity"]) for cell in kept["cells"]}
    missing = [(row, at) for row in options.rows for at in options.sparsities if (row, at) not in done]
    if not missing:
        return
    windows, dense = windows_of(options, budget, bench), bench.open()
    said = recover(dense, windows, budget)
    kept["dense"] = bench.facts(dense) | {"training": said}
    tuned = bench.report.of(dense)
    for row, sparsity in missing:
        ((pruned, cell),) = bench.prune(row, [sparsity])
        cell |= bench.facts(pruned)
        cell["training"] = recover(pruned, windows, budget)
        cell["recovered"] = bench.facts(pruned) | {"tuned": compared(pruned, tuned)}
        kept["cells"].append(cell)
        options.json.write_text(json.dumps(kept))
        print(f"{row} at {sparsity}: KL {cell['kl']:.4g}, recovered {cell['recovered']['kl']:.4g}")


if __name__ == "__main__":
    main()
