"""How far pruning scales, computed and not measured: large models on 1, 8 and 64 accelerators.

    python scripts/bench/scaling.py [--write]

The models are configurations without weights; what a run takes is the account that `structprune prune
--dry-run --ranks N` gives, and its time that of the rates below. Nothing is downloaded and nothing is run.
"""

import argparse
from functools import cache

import torch
from figures import markdown, write_section
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from structprune.cli.summary import bytes_text
from structprune.evaluation.rates import Rates, Site
from structprune.models.cost import parameters_of, stored_bytes
from structprune.pipeline.estimate import memory_bytes, seconds_of
from structprune.pruners import looking
from structprune.pruners.catalogue import find
from structprune.pruners.demand import Sharing

SAMPLES, LENGTH = 128, 2048
METHODS = ("wanda", "sparsegpt", "alps")
# Of the data sheet of the H100 SXM: 989 TFLOP/s in bfloat16, 67 in float32, 3.35 TB/s of memory, 450 GB/s to
# the others of a machine each way; between machines of 8 a common 400 Gb/s a card. Half of each is expected.
# Numbers are ranked in some twenty passes. A block comes from a disk of 6 GB/s; the processes of a machine
# read the same block at about the same time, so that the system's cache serves all but one of them.
SHARE = 0.5
FLOPS = {"float32": 67e12 * SHARE, "bfloat16": 989e12 * SHARE}
MEMORY, DISK, MACHINE, NETWORK = 3.35e12 * SHARE, 6e9, 450e9 * SHARE, 50e9 * SHARE
SAID = """
**Computed, not measured**: the account of `--dry-run --ranks`, streamed, bfloat16, 128 x 2048 tokens in
batches of 8, of 2 where 64 share them, on H100 SXM cards at half of their data sheet (989 TFLOP/s in
bfloat16, 67 in float32, 3.35 TB/s, 450 GB/s to the others of a machine of 8, 50 GB/s beyond), weights from a
disk of 6 GB/s, every part after the other. Memory, read, time: of each card, without what a solver takes
beside its Gram matrix; reduced: sent by all together, for a block. Deciding only: checking, writing and
measuring come on top. ALPS with its usual number of rounds. No card was at hand to try it.
"""


def models() -> dict[str, PreTrainedConfig]:
    """Return the configurations, written by hand."""
    llama = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    return {
        "Llama-3.1-8B": LlamaConfig(
            **llama,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        "Llama-3.1-70B": LlamaConfig(
            **llama,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
        ),
        "Llama-3.1-405B": LlamaConfig(
            **llama,
            hidden_size=16384,
            intermediate_size=53248,
            num_hidden_layers=126,
            num_attention_heads=128,
        ),
        "mixture of 30B, 3B a token": Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
        ),
    }


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model whose parameters are on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def rates_of(ranks: int) -> Rates:
    """Return what a card does in a second beside others."""
    site = Site("", "H100 SXM", 1, ranks, torch.__version__)
    sent = None if ranks == 1 else MACHINE if ranks <= 8 else NETWORK
    return Rates(site, FLOPS, MEMORY, DISK, MEMORY / 2, MEMORY / 80, sent)


def rows_of(name: str, model: PreTrainedModel) -> list[list[str]]:
    """Return the rows of one model: what a card takes, method by method."""
    rows, count = [], len(stored_bytes(model).blocks)
    for method in METHODS:
        pruner = find(method).model_validate({"sparsity": 0.5})
        for ranks in (1, 8, 64):
            sharing = Sharing(SAMPLES, LENGTH, min(8, SAMPLES // ranks), ranks, streamed=True)
            demand = pruner.demand(model, sharing)
            assert demand is not None
            seconds = seconds_of(demand, rates_of(ranks), "bfloat16")
            longest = max(seconds, key=lambda part: seconds[part])
            rows.append(
                [
                    name,
                    method,
                    str(ranks),
                    bytes_text(memory_bytes([pruner], model, sharing)),
                    bytes_text(round(demand.read_bytes)),
                    bytes_text(round(demand.sent_bytes / count)),
                    duration(sum(seconds.values())),
                    f"{longest} {seconds[longest] / sum(seconds.values()):.0%}",
                ]
            )
    return rows


def duration(seconds: float) -> str:
    """Return a time with two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


def main() -> None:
    """Compute the table, and print it or write it into the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    # The same for every method and number of cards.
    looking.body_flops = cache(looking.body_flops)
    rows = []
    for name, config in models().items():
        model = without_weights(config)
        rows += rows_of(f"{name} ({parameters_of(model) / 1e9:.3g} B)", model)
    header = ["model", "method", "cards", "memory", "read", "reduced", "time", "longest part"]
    text = f"{markdown(header, rows)}\n{SAID}"
    print(text)
    if write:
        write_section("scaling.py", text)


if __name__ == "__main__":
    main()
