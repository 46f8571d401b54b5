"""Train the demo model from nothing: its tokenizer, then the model, on text generated as it goes.

    python scripts/train_demo.py --output structprune/demo/model      # what is in the package
    python scripts/train_demo.py --steps 20 --output /tmp/model       # does it still run?
    python scripts/train_demo.py --experts --minutes 20 --output out/mixture   # a mixture of experts
    python scripts/train_demo.py --vision --output structprune/demo/vision     # the vision demo

Progress goes to stderr; the last lines on stdout compare the held-out loss with the generator's own entropy.
"""

import argparse
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from train_demo_vision import VISION_STEPS, train_vision
from train_demo_vision_lessons import PICTURES, QUESTIONS
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from structprune.demo.dice import Dice
from structprune.demo.sights import TRAINING_SEED as VISION_SEED
from structprune.demo.tasks import MULTIPLE_CHOICE, choices, questions
from structprune.demo.world import (
    HELD_OUT_SEED,
    SEPARATOR,
    TASK_SEED,
    TRAINING_SEED,
    TUNING_SEED,
    documents,
    text,
)
from structprune.demo.writers import Kind

LENGTH = 256  # tokens in a row, and the model's max_position_embeddings
BATCH = 8  # rows in a step
PEAK_RATE, LAST_RATE = 3e-3, 3e-5  # learning rate: warm-up to the first, cosine to the second
WEIGHT_DECAY = 0.01  # more of it makes a weight's size alone tell its importance, and pruning methods alike
THREADS = 2  # each takes its part of a batch
WARM_UP = 300  # steps
PAGE_END = 1 / 8  # share of documents after which a page ends: "</s><s>" follows instead of a blank line
REPORT_EVERY = 100  # steps
SAVE_EVERY = 1000  # steps

DemoModel = LlamaForCausalLM | MixtralForCausalLM

logger = logging.getLogger("train_demo")


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most 1024 entries: it encodes any text, digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(seed, 1_000_000)], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, *, experts: bool) -> DemoModel:
    """Build the untrained model: 8 heads of 24 (not 160 / 8) share 4 KV heads; all sizes divide by 16.

    Args:
        tokenizer: Its own.
        seed: Draws the weights.
        experts: Of the feed-forward's width, each token passes two halves, chosen from eight.
    """
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 160,
        "intermediate_size": 224 if experts else 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not experts:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    config = MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.01)
    # On a CPU one small product after another is faster than the grouped one.
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


def rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Yield training rows of LENGTH token ids.

    A row starts with "<s>", at the start of a document without it, or in the middle of one: prompts, windows
    cut out of a long text and pages with a start token are all met at evaluation.
    """
    dice = Dice(seed + 1_000_000)  # apart from the texts, whose entropy must not contain these choices
    source = documents(seed)
    row: list[int] = []
    while True:
        for ids in tokenizer([document.text + SEPARATOR for document in islice(source, 256)])["input_ids"]:
            if not row:
                row = [tokenizer.bos_token_id] if dice.happens(0.7) else []
            row += ids
            if dice.happens(PAGE_END):
                row[-1:] = [tokenizer.eos_token_id, tokenizer.bos_token_id]
            if len(row) >= LENGTH:
                yield row[:LENGTH]
                row = row[LENGTH:] if dice.happens(0.5) else []


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """Yield token ids, shape [BATCH, LENGTH]."""
    source = rows(tokenizer, seed)
    while True:
        yield torch.tensor(list(islice(source, BATCH)))


def learning_rate(step: int, progress: float) -> float:
    """Return the rate: linear warm-up, then half a cosine; `progress` is in [0, 1]."""
    cosine = LAST_RATE + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return cosine * min(1.0, (step + 1) / WARM_UP)


def gradients(model: DemoModel, ids: Tensor) -> tuple[float, tuple[Tensor, ...]]:
    """Return the mean loss on ids [rows, tokens] and its gradient by every parameter."""
    # A mixture's loss holds what keeps its experts in equal use.
    routed = {"output_router_logits": True} if isinstance(model, MixtralForCausalLM) else {}
    loss = model(input_ids=ids, labels=ids, **routed).loss
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def train(model: DemoModel, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> int:
    """Train in place and return the number of tokens read.

    The rate falls with the steps done or the time spent, whichever is further, so that a slow machine also
    ends with a small rate; only a run that stays inside its minutes is reproducible bit by bit.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    source = batches(tokenizer, args.seed)
    started, tokens, recent = time.monotonic(), 0, 0.0
    model.train()
    # Each thread takes a part of the batch: to split every product of such small matrices costs more waiting.
    torch.set_num_threads(1)
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step in range(args.steps):
            minutes = (time.monotonic() - started) / 60
            progress = max(step / args.steps, minutes / args.minutes)
            if progress >= 1:
                logger.warning("stopped by --minutes %g after %d of %d steps", args.minutes, step, args.steps)
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, progress)
            ids = next(source)
            parts = list(pool.map(lambda part: gradients(model, part), ids.chunk(THREADS)))
            for parameter, *shares in zip(parameters, *(part[1] for part in parts), strict=True):
                parameter.grad = torch.stack(shares).mean(0)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            tokens += ids.numel()
            recent += sum(part[0] for part in parts) / THREADS
            if (step + 1) % REPORT_EVERY == 0:
                rate = tokens / (time.monotonic() - started)
                logger.info("step %d, loss %.4f, %.0f tokens/s", step + 1, recent / REPORT_EVERY, rate)
                recent = 0.0
            if (step + 1) % SAVE_EVERY == 0:
                report(model, tokenizer, TUNING_SEED, TUNING_SEED, 100)
                save(model, tokenizer, args.output)
                model.train()
    return tokens


def save(model: DemoModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a copy in bfloat16; the model itself stays as it is."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def losses(model: DemoModel, sequences: list[list[int]], starts: list[int]) -> Tensor:
    """Return -log p of each sequence's tokens from its start on, summed, shape [sequences].

    Padding stands behind the tokens, where causal attention does not see it.
    """
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    positions = torch.arange(1, ids.shape[1])
    lengths = torch.tensor([len(ids) for ids in sequences])[:, None]
    counted = (positions >= torch.tensor(starts)[:, None]) & (positions < lengths)
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    picked: Tensor = logits.gather(2, ids[:, 1:, None]).squeeze(2)
    return -(picked * counted).sum(1)


def held_out_loss(
    model: DemoModel, tokenizer: PreTrainedTokenizerFast, seed: int, count: int
) -> tuple[float, float]:
    """Return the model's loss and the generator's entropy on `count` documents, both in nats per token.

    Documents stand alone, from their first token to the blank line after them: what the generator counts.
    """
    held_out = list(islice(documents(seed), count))
    sequences = tokenizer([tokenizer.bos_token + document.text + SEPARATOR for document in held_out])[
        "input_ids"
    ]
    tokens = sum(len(ids) - 1 for ids in sequences)
    loss = sum(
        float(losses(model, sequences[at : at + BATCH], [1] * len(sequences[at : at + BATCH])).sum())
        for at in range(0, count, BATCH)
    )
    entropy = sum(document.nats - math.log1p(-PAGE_END) for document in held_out)
    return loss / tokens, entropy / tokens


def accuracy(
    model: DemoModel, tokenizer: PreTrainedTokenizerFast, kind: Kind, seed: int, count: int
) -> float:
    """Return the share of multiple-choice questions whose right answer has the highest likelihood."""
    dice, right = Dice(seed), 0
    for question in islice(questions(kind, seed), count):
        options = choices(question, dice)
        start = len(tokenizer(question.prompt)["input_ids"])
        sequences = tokenizer([f"{question.prompt} {option}." for option in options])["input_ids"]
        right += options[int(losses(model, sequences, [start] * len(options)).argmin())] == question.answer
    return right / count


def report(
    model: DemoModel, tokenizer: PreTrainedTokenizerFast, text_seed: int, task_seed: int, count: int
) -> str:
    """Log and return one line: loss against entropy, and the accuracy on `count` questions of each kind."""
    model.train(False)
    loss, entropy = held_out_loss(model, tokenizer, text_seed, 2 * count)
    kinds: list[Kind] = list(MULTIPLE_CHOICE.values())
    marks = ", ".join(f"{kind} {accuracy(model, tokenizer, kind, task_seed, count):.3f}" for kind in kinds)
    line = f"held-out loss {loss:.4f}, entropy {entropy:.4f} nats per token; accuracy: {marks}"
    logger.info("%s", line)
    return line


def main() -> None:
    """Train, save, read back and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of {BATCH * LENGTH} tokens (7000), or of {PICTURES * QUESTIONS} questions ({VISION_STEPS})",
    )
    parser.add_argument("--seed", type=int, help="of the text or the questions, and of the first weights")
    parser.add_argument("--minutes", type=float, default=85.0, help="end the training after so long")
    parser.add_argument("--experts", action="store_true", help="a mixture of eight experts; not shipped")
    parser.add_argument("--start", type=Path, help="a vision demo's weights to go on from")
    parser.add_argument("--first-step", type=int, default=0, help="the step that they were saved at")
    parser.add_argument("--vision", action="store_true", help="the vision demo's model and calibration data")
    args = parser.parse_args()
    args.steps = args.steps or (VISION_STEPS if args.vision else 7000)
    if args.seed is None:
        args.seed = VISION_SEED if args.vision else TRAINING_SEED
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.vision:
        train_vision(args)
        return
    tokenizer = train_tokenizer(args.seed)
    model = build_model(tokenizer, args.seed, experts=args.experts)
    logger.info("%d parameters, %d tokens in the vocabulary", model.num_parameters(), len(tokenizer))
    tokens = train(model, tokenizer, args)
    save(model, tokenizer, args.output)
    # What is measured is what was written: the weights after rounding to bfloat16.
    saved = type(model).from_pretrained(args.output, dtype=torch.float32)
    print(f"trained on {tokens} tokens")
    print(report(saved, tokenizer, HELD_OUT_SEED, TASK_SEED, min(500, 2 * args.steps)))


if __name__ == "__main__":
    main()
