"""Whether what leaves of a random Llama of 100 M parameters is time, and what a look at it costs.

Width: seconds of prefill dense over pruned at half the parameters of the blocks, against FLOPs dense over
pruned. Depth: seconds of the blocks that are left over those of all, against their numbers; a model without
blocks, which takes its turn too, says what embeddings, norm and head take. Calibration: all that flap does
before it writes, against one plain forward of the calibration tokens through the blocks. One process and
one thread, whose seconds on the processor are counted: other programs do not show in them. In every round all
take turns, and each figure is the median of the rounds' own ratios.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from figures import markdown, write_section
from model import random_llama, token_file
from transformers import LlamaForCausalLM, PreTrainedModel

import structprune
from structprune.calibration import data
from structprune.calibration.text_source import TextSource
from structprune.evaluation.speed import Workload, prompts
from structprune.machine import environment
from structprune.models.cost import count
from structprune.models.opening import Opening
from structprune.models.streamed import Batch, open_model
from structprune.models.tokenizer import open_tokenizer
from structprune.pruners.catalogue import find
from structprune.pruners.pruner import Pruner

BLOCKS, HIDDEN, FFN, VOCABULARY = 13, 768, 2048, 4096
LENGTH, SAMPLES, BATCH = 512, 8, 8
DROPPED = 4
METHOD = "flap"
WANTED = {"width": 0.95, "depth": 0.03, "calibration": 1.05}

Seconds = dict[str, float]


def shallow(model: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """Return the model with its first blocks only; their weights are shared."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_hidden_layers": blocks})
    with torch.device("meta"):
        other = LlamaForCausalLM(config)
    state = {name: value for name, value in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(state, assign=True)
    other.model.rotary_emb = model.get_submodule("model.rotary_emb")
    return other.eval()


def prefill_flops(model: PreTrainedModel) -> float:
    """Return the FLOPs of a prefill, whose head sees the last token only."""
    flops = count(model, length=LENGTH).flops_per_token
    assert flops is not None
    return flops * LENGTH - 2 * VOCABULARY * HIDDEN * (LENGTH - 1)


@torch.no_grad()
def forward(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Run the calibration tokens through the blocks."""
    for batch in batches:
        model.base_model(**batch, use_cache=False)


def seconds(work: Callable[[], object]) -> float:
    """Return how long the processor works on something."""
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Read a prompt into a cache, as generation begins."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def look(pruner: Pruner, model: PreTrainedModel, batches: list[Batch]) -> None:
    """Do what a run does with the calibration tokens; the hash of the weights it knows from reading them."""
    pruner.calibrate(model, batches, pruner.writer(None, model, "0" * 64))


def ratios(rounds: list[Seconds], flops: float) -> dict[str, list[float]]:
    """Return each round's figures."""
    depth = (BLOCKS - DROPPED) / BLOCKS
    return {
        "width": [row["dense"] / row["pruned"] / flops for row in rounds],
        "depth": [
            (row["shallow"] - row["empty"]) / (row["dense"] - row["empty"]) / depth - 1 for row in rounds
        ],
        "calibration": [row["calibrate"] / row["forward"] for row in rounds],
    }


def measure(folder: Path, repeats: int) -> tuple[list[Seconds], float]:
    """Return the seconds of every round, and FLOPs dense over pruned."""
    source = random_llama(folder / "dense", blocks=BLOCKS, hidden=HIDDEN, ffn=FFN, vocabulary=VOCABULARY)
    text = TextSource(str(token_file(folder / "text.txt", tokens=SAMPLES * LENGTH * 2)))
    few = {"source": text.source, "samples": 2, "length": 32}
    structprune.prune(
        str(source),
        folder / "pruned",
        METHOD,
        sparsity=0.5,
        budget="uniform",
        repair=None,
        calibration=few,
        evaluate=False,
        writing=structprune.Writing(reload=False),
    )
    dense, pruned = (open_model(folder / name, Opening(stream=False)) for name in ("dense", "pruned"))
    assert isinstance(dense, PreTrainedModel) and isinstance(pruned, PreTrainedModel)
    tokenizer = open_tokenizer(source)
    assert tokenizer is not None
    batches = data.load(text, tokenizer, samples=SAMPLES, length=LENGTH, batch_size=BATCH).batches
    timed = {"dense": dense, "pruned": pruned, "shallow": shallow(dense, BLOCKS - DROPPED)}
    timed["empty"] = shallow(dense, 0)
    ids = prompts(dense.config, Workload(LENGTH, 2, (1,), 1), 1)
    turns = {name: partial(prefill, one, ids) for name, one in timed.items()}
    turns |= {
        "forward": partial(forward, dense, batches),
        "calibrate": partial(look, find(METHOD)(), dense, batches),
    }
    for turn in turns.values():
        turn()
    rounds = [{name: seconds(turn) for name, turn in turns.items()} for _ in range(repeats)]
    return rounds, prefill_flops(dense) / prefill_flops(pruned)


def table(rounds: list[Seconds], flops: float) -> str:
    """Return the figures as Markdown."""
    found = {name: statistics.median(values) for name, values in ratios(rounds, flops).items()}
    spread = {
        name: f"{min(values):.3f} to {max(values):.3f}" for name, values in ratios(rounds, flops).items()
    }
    asked = {"width": f"at least {WANTED['width']}", "depth": f"within {WANTED['depth']:.0%}"}
    asked["calibration"] = f"at most {WANTED['calibration']}"
    called = {
        "width": f"width, half of the blocks' parameters: times faster / times fewer FLOPs ({flops:.3f})",
        "depth": f"depth, {DROPPED} of {BLOCKS} blocks dropped: blocks' time / their share, less 1",
        "calibration": f"{METHOD}: whole calibration / one forward of {SAMPLES} x {LENGTH} tokens",
    }
    rows = [(called[name], f"{found[name]:.3f}", spread[name], asked[name]) for name in called]
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in medians.items())
    here = environment()
    machine, versions = here["machine"], here["versions"]
    told = (
        f"Medians of {len(rounds)} rounds, in seconds of the processor: {shown}. {machine['processor']}, "
        f"{machine['threads']} thread, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"float32; {BLOCKS} blocks of {HIDDEN} x {FFN}, {VOCABULARY} tokens, prefill of {LENGTH}."
    )
    return f"{markdown(('figure', 'median', 'rounds', 'wanted'), rows)}\n\n{told}"


def main() -> None:
    """Measure, and print one table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into README.md, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rounds, flops = measure(Path(name), options.repeats)
    if options.write:
        write_section(Path(__file__).name, table(rounds, flops))
    if options.json:
        print(json.dumps({"flops": flops, "rounds": rounds, "ratios": ratios(rounds, flops)}))
    else:
        print(table(rounds, flops))


if __name__ == "__main__":
    main()
