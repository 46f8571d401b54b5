"""Train the vision demo's model from nothing: `python scripts/train_demo.py --vision`.

A step reads pictures, each with several questions that all see the picture and never each other, so that
one picture pays for many answers; only answers are learned from. First the tower learns alone to tell, patch
by patch, the colour, the shape and the place of what is there, from heads that are thrown away: the answers
would take most of the time to get it off the ground. Then the rest learns from the patches of things and a
few of the ground, at half the cost; at last all learn together from whole pictures.
"""

import argparse
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from train_demo_vision_model import TOKENS, build_model, build_processor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from structprune.demo.dice import Dice
from structprune.demo.scenes import COLOURS, PLACES, SHAPES, Scene, covered, imagine, render
from structprune.demo.sights import (
    CALIBRATION_SCENES,
    HELD_OUT_SEED,
    SIGHTS,
    TUNING_SEED,
    VisualQuestion,
    ask,
    prompt_of,
    visual_questions,
    write_questions,
)

VISION_STEPS = 1500
PICTURES, QUESTIONS = 16, 12  # in a step; of a picture
PEAK_RATE, LAST_RATE = 2e-3, 2e-5  # learning rate: warm-up to the first, cosine to the second
WEIGHT_DECAY = 0.01
WARM_UP = 100  # steps
TOWER_ALONE = 150  # steps in which only the tower learns, from what stands in its patches
WHOLE_FROM = 0.7  # of the steps; before, the language model sees FEW patches of a picture
FEW = 32  # of which five things cover at most twenty
GROUND_WEIGHT = 0.1  # of a patch of ground among those, which are nine in ten
THREADS = 2
REPORT_EVERY = 50  # steps
SAVE_EVERY = 500  # steps
logger = logging.getLogger("train_demo")


def pixels(pictures: list[Tensor]) -> Tensor:
    """Return what the processor makes of pictures of its own size, shape [pictures, 3, SIDE, SIDE]."""
    return torch.stack(pictures).float() / 127.5 - 1


def patch_labels(scenes: list[Scene]) -> Tensor:
    """Return colour, shape and place in each patch, from 1, 0 for ground; shape [3, scenes, patches]."""
    labels = torch.zeros(3, len(scenes), TOKENS, dtype=torch.long)
    for row, scene in enumerate(scenes):
        for thing, mask in zip(scene.things, covered(scene) > 0, strict=True):
            values = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), PLACES.index(thing.place)
            labels[:, row, mask] = 1 + torch.tensor(values)[:, None]
    return labels


class Packer:
    """Writes a picture's questions into one row of tokens, each seeing the picture and itself only."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.tokenizer = processor.tokenizer
        start, self.rest = prompt_of("|").split("|")
        self.prefix = self.tokenizer(start.replace("<image>", "<image>" * TOKENS))["input_ids"]
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the ids of what stands behind the picture."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def pack(self, asked: list[list[VisualQuestion]]) -> dict[str, Tensor]:
        """Return input_ids, position_ids and labels [rows, tokens], attention_mask [rows, 1, tokens, tokens].

        Args:
            asked: The questions of each picture.
        """
        rows, positions, labels, parts = [], [], [], []
        for questions in asked:
            row, at = list(self.prefix), list(range(len(self.prefix)))
            label, part = [-100] * len(row), [0] * len(row)
            for number, one in enumerate(questions, start=1):
                answer = [*self.ids(f" {one.answer}"), self.tokenizer.eos_token_id]
                ids = self.ids(one.question + self.rest) + answer
                row += ids
                at += range(len(self.prefix), len(self.prefix) + len(ids))
                label += [-100] * (len(ids) - len(answer)) + answer
                part += [number] * len(ids)
            rows.append(torch.tensor(row))
            positions.append(torch.tensor(at))
            labels.append(torch.tensor(label))
            parts.append(torch.tensor(part))
        part = pad_sequence(parts, batch_first=True, padding_value=-1)
        sees = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
        sees &= torch.ones_like(sees).tril()
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "position_ids": pad_sequence(positions, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": torch.zeros(sees.shape).masked_fill(~sees, -1e4)[:, None],
        }


def learning_rate(step: int, progress: float) -> float:
    """Return the rate: linear warm-up, then half a cosine; `progress` is in [0, 1]."""
    cosine = LAST_RATE + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return cosine * min(1.0, (step + 1) / WARM_UP)


def lessons(seed: int) -> Iterator[tuple[list[Scene], list[list[VisualQuestion]]]]:
    """Yield scenes and the questions on each."""
    dice = Dice(seed)
    while True:
        scenes = [imagine(dice) for _ in range(PICTURES)]
        yield scenes, [[ask(dice.pick(SIGHTS), scene, dice) for _ in range(QUESTIONS)] for scene in scenes]


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> float:
    """Train in place and return the minutes of processor time that it took."""
    width = model.config.vision_config.hidden_size
    heads = torch.nn.ModuleList([Linear(width, 1 + len(names)) for names in (COLOURS, SHAPES, PLACES)])
    tower, parameters = model.model.vision_tower, [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    packer, source = Packer(processor), lessons(args.seed)
    started = time.process_time()
    recent: Counter[str] = Counter()
    model.train()
    model.set_attn_implementation("eager")  # on a CPU in bfloat16 the fused kernel's backward is the slower
    for step in range(args.steps):
        progress = max(step / args.steps, (time.process_time() - started) / 60 / args.minutes)
        if progress >= 1:
            logger.warning(
                "stopped by --minutes %g of processor time after %d of %d steps",
                args.minutes,
                step,
                args.steps,
            )
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        scenes, asked = next(source)
        pictures, labels = pixels([render(scene) for scene in scenes]), patch_labels(scenes)
        alone, whole = step < min(TOWER_ALONE, args.steps // 4), progress >= WHOLE_FROM
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(alone or whole):
                seen = tower(pictures, output_hidden_states=True).hidden_states[-2][:, 1:]
            if alone:
                loss = patch_loss(heads, seen, labels)
            else:
                patches = None if whole else some_patches(labels[0] > 0)
                loss = answer_loss(model, seen, packer.pack(asked), patches, recent)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.update({"loss": float(loss.detach()), "steps": 1})
        if (step + 1) % REPORT_EVERY == 0:
            minutes = (time.process_time() - started) / 60
            share = recent["right"] / max(1, recent["asked"])
            mean = recent["loss"] / recent["steps"]
            logger.info("step %d, loss %.3f, %.3f right, %.1f minutes", step + 1, mean, share, minutes)
            recent.clear()
        if (step + 1) % SAVE_EVERY == 0:
            save(model, processor, args.output / "model")
            report(model, processor, TUNING_SEED, 250)
            model.train()
    return (time.process_time() - started) / 60


def patch_loss(heads: torch.nn.ModuleList, seen: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of telling what stands in each patch."""
    losses = []
    for head, truth in zip(heads, labels, strict=True):
        told = head(seen).float()
        weight = torch.ones(told.shape[-1])
        weight[0] = GROUND_WEIGHT
        losses.append(cross_entropy(told.flatten(0, 1), truth.flatten(), weight))
    return torch.stack(losses).sum()


def some_patches(covered_ones: Tensor) -> Tensor:
    """Return the patches of things and drawn ones of ground, shape [pictures, FEW], in order."""
    rank = covered_ones.float() + 0.9 * torch.rand(covered_ones.shape)
    return rank.topk(FEW).indices.sort().values


def answer_loss(
    model: LlavaForConditionalGeneration,
    seen: Tensor,
    packed: dict[str, Tensor],
    patches: Tensor | None,
    recent: Counter[str],
) -> Tensor:
    """Return the mean loss of the answers' tokens.

    Args:
        model: Its projector and language model are run.
        seen: What the tower tells of the pictures, shape [pictures, patches, width].
        packed: What `Packer.pack` returns.
        patches: Which of them the language model sees, [pictures, count], at their own positions; None: all.
        recent: Told how many answers' first words were most likely.
    """
    ids, labels, positions, mask = (
        packed[key] for key in ("input_ids", "labels", "position_ids", "attention_mask")
    )
    embedded = model.get_input_embeddings()(ids)
    features = model.model.multi_modal_projector(seen).to(embedded.dtype)
    start = int((ids[0] == model.config.image_token_id).nonzero()[0])
    embedded = torch.cat([embedded[:, :start], features, embedded[:, start + TOKENS :]], 1)
    if patches is not None:
        text = torch.cat([torch.arange(start), torch.arange(start + TOKENS, ids.shape[1])])
        kept = torch.cat([start + patches, text.expand(len(ids), -1)], 1).sort().values
        embedded = embedded.gather(1, kept[:, :, None].expand(-1, -1, embedded.shape[2]))
        labels, positions = labels.gather(1, kept), positions.gather(1, kept)
        mask = mask.gather(2, kept[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
        mask = mask.gather(3, kept[:, None, None, :].expand(-1, 1, mask.shape[2], -1))
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=positions
    ).last_hidden_state
    labels = labels[:, 1:]
    told = labels != -100
    logits, truth = model.lm_head(hidden[:, :-1][told]).float(), labels[told]
    words = truth != model.config.text_config.eos_token_id
    recent.update({"right": int((logits.argmax(-1) == truth)[words].sum()), "asked": int(words.sum())})
    return cross_entropy(logits, truth)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save a copy in bfloat16; the model itself stays as it is."""
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.inference_mode()
def report(model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int, count: int) -> str:
    """Log and return one line: the share of right answers by kind, over the share of the commonest answer."""
    model.train(False)
    packer = Packer(processor)
    right: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in SIGHTS}
    source = visual_questions(seed)
    for _ in range(count // 20):
        batch = list(islice(source, 20))
        packed = packer.pack([[one] for one in batch])
        where = packed["labels"] != -100
        first = where.long().argmax(1) - 1  # padding is behind
        logits = model(
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            attention_mask=packed["attention_mask"],
            pixel_values=pixels([render(one.scene) for one in batch]),
        ).logits
        picked = logits[torch.arange(len(batch)), first].argmax(-1)
        for one, token in zip(batch, picked.tolist(), strict=True):
            answers[one.kind][one.answer] += 1
            right[one.kind] += token == packer.ids(f" {one.answer}")[0]
    kinds = [
        f"{kind} {right[kind] / found.total():.3f} ({max(found.values()) / found.total():.3f})"
        for kind, found in answers.items()
    ]
    line = f"right {right.total() / (count // 20 * 20):.3f}: {', '.join(kinds)}"
    logger.info("%s", line)
    return line


def train_vision(args: argparse.Namespace) -> None:
    """Train, save, read back and report; write the calibration data beside the model."""
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    folder = args.output / "model"
    processor = build_processor(args.seed)
    model = build_model(processor, args.seed)
    logger.info(
        "%d parameters, %d tokens in the vocabulary", model.num_parameters(), len(processor.tokenizer)
    )
    minutes = train(model, processor, args)
    save(model, processor, folder)
    write_questions(args.output / "calibration.jsonl", TUNING_SEED, CALIBRATION_SCENES)
    # What is measured is what was written: the weights after rounding to bfloat16.
    saved = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    print(f"trained for {minutes:.0f} minutes of processor time")
    print(report(saved, processor, HELD_OUT_SEED, min(2000, 20 * args.steps)))
