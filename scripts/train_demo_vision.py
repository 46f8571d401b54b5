"""Train the vision demo's model from nothing: `python scripts/train_demo.py --vision`.

A step reads pictures, each with several questions that all see the picture and never each other, so that
one picture pays for many answers; only answers are learned from. Left to that, a model of this size needs
hours to find that a word and a patch may mean the same. Three things spare it the search:

- First tower and projector learn alone, patch by patch, to write the words of what is there: its colour,
  shape and place are to be the likeliest words by the language model's own embeddings, as CLIP's tower is
  aligned with text before LLaVA is trained. Queries start equal to keys, so that like attends to like.
- Then the rest learns from the patches of things and a few of the ground, at half the cost.
- Meanwhile the answer is asked for from the word on that decides it, so that to find a thing and to carry
  what was found to the prompt's end are not learned both at once.

At last all learn together from whole pictures.
"""

import argparse
import logging
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_demo_vision_lessons import (
    THREADS,
    Lesson,
    Packer,
    lessons,
    pixels,
)
from train_demo_vision_model import TOKENS, build_model, build_processor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from structprune.demo.scenes import COLOURS, PLACES, SHAPES, render
from structprune.demo.sights import (
    CALIBRATION_SCENES,
    HELD_OUT_SEED,
    SIGHTS,
    TUNING_SEED,
    visual_questions,
    write_questions,
)

VISION_STEPS = 2400
PEAK_RATE, LAST_RATE = 1.5e-3, 2e-5  # learning rate: warm-up to the first, cosine to the second
WEIGHT_DECAY = 0.01
WARM_UP = 100  # steps
ALIGNED_BY = 500  # steps in which tower and projector learn alone, from what stands in the patches
WHOLE_FROM = 0.7  # of the steps; before, the language model sees FEW patches of a picture
GROUND_WEIGHT = 0.1  # of a patch of ground among those, which are nine in ten
REPORT_EVERY = 100  # steps
SAVE_EVERY = 400  # steps
logger = logging.getLogger("train_demo")


def learning_rate(step: int, progress: float) -> float:
    """Return the rate: linear warm-up, then half a cosine; `progress` is in [0, 1]."""
    cosine = LAST_RATE + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return cosine * min(1.0, (step + 1) / WARM_UP)


class PatchHeads(torch.nn.Module):
    """What tells the patches by in training and is thrown away.

    Args:
        hidden: Width of the language model.
        width: Width of the tower.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.ground = torch.nn.Parameter(torch.zeros(3, hidden))
        self.direct = torch.nn.ModuleList(
            torch.nn.Linear(width, 1 + len(names)) for names in (COLOURS, SHAPES, PLACES)
        )


def learn(
    model: LlavaForConditionalGeneration, packer: Packer, heads: PatchHeads, lesson: Lesson
) -> tuple[list[Tensor | None], Counter[str]]:
    """Return the gradient of the loss by every parameter, and what happened."""
    happened: Counter[str] = Counter()
    whole = lesson.packed is not None and lesson.patches is None
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(whole or lesson.packed is None):
            told = model.model.vision_tower(lesson.pixels, output_hidden_states=True)
            seen = told.hidden_states[-2][:, 1:]
        loss = torch.zeros(()) if whole else patch_loss(model, packer, heads, seen, lesson.labels)
        happened["patches"] += float(loss.detach())
        if lesson.packed is not None:
            loss = loss + answer_loss(model, seen, lesson, happened)
    happened["loss"] += float(loss.detach())
    parameters = [*model.parameters(), *heads.parameters()]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True)), happened


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> float:
    """Train in place and return the minutes of processor time that it took."""
    heads = PatchHeads(model.config.text_config.hidden_size, model.config.vision_config.hidden_size)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    packer, recent, stage = Packer(processor), Counter[str](), "patches"
    source = lessons(args.seed + args.first_step, packer, lambda: stage)
    aligned_by, whole_from = min(ALIGNED_BY, args.steps // 4), int(WHOLE_FROM * args.steps)
    started, step = time.process_time(), args.first_step
    minutes = 0.0
    model.train()
    model.set_attn_implementation("eager")  # on a CPU in bfloat16 the fused kernel's backward is the slower
    # Each thread takes a part of the pictures: to split such small products costs more waiting.
    torch.set_num_threads(1)
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while step < args.steps and minutes < args.minutes:
            stage = "patches" if step < aligned_by else "few" if step < whole_from else "all"
            for group in optimizer.param_groups:
                # The language model's own first steps are its warm-up.
                start = max(args.first_step, aligned_by if step >= aligned_by else 0)
                group["lr"] = learning_rate(step - start, step / args.steps)
            learned = list(pool.map(lambda part: learn(model, packer, heads, part), next(source)))
            for parameter, *shares in zip(parameters, *(part[0] for part in learned), strict=True):
                known = [share for share in shares if share is not None]
                parameter.grad = torch.stack(known).mean(0) if known else None
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for _, happened in learned:
                recent.update(happened)
            step += 1
            minutes = (time.process_time() - started) / 60
            if step % REPORT_EVERY == 0:
                shares = [f"{kind} {recent[f'{kind} right'] / max(1, recent[kind]):.2f}" for kind in SIGHTS]
                loss, patches = (recent[name] / REPORT_EVERY / THREADS for name in ("loss", "patches"))
                said = f"step {step}, loss {loss:.3f}, patches {patches:.3f}, {', '.join(shares)}"
                logger.info("%s, %.1f minutes", said, minutes)
                recent.clear()
            if step % SAVE_EVERY == 0:
                save(model, processor, args.output / "model")
    if step < args.steps:
        logger.warning("stopped by --minutes %g of processor time after %d steps", args.minutes, step)
    return minutes


def patch_loss(
    model: LlavaForConditionalGeneration, packer: "Packer", heads: PatchHeads, seen: Tensor, labels: Tensor
) -> Tensor:
    """Return the loss of telling what stands in each patch: from the tower, and by words from the projector.

    Args:
        model: Its projector writes, and its embeddings are what the words are known by.
        packer: Knows the words' ids.
        heads: Tell it from the tower; there nothing writes words, and what stands for them on the ground.
        seen: What the tower tells of the pictures, shape [pictures, patches, width].
        labels: What `patch_labels` returns.
    """
    written = model.model.multi_modal_projector(seen).float()
    loss = torch.zeros(())
    for index, names in enumerate((COLOURS, SHAPES, PLACES)):
        ids = torch.tensor([packer.ids(f" {name}") for name in names]).flatten()
        words = torch.cat([heads.ground[index][None], model.get_input_embeddings().weight[ids]])
        weight = torch.ones(len(words))
        weight[0] = GROUND_WEIGHT
        readings = [(written @ words.T).float()]
        if seen.requires_grad:
            readings.append(heads.direct[index](seen).float())
        for told in readings:
            loss = loss + cross_entropy(told.flatten(0, 1), labels[index].flatten(), weight)
    return loss


def answer_loss(
    model: LlavaForConditionalGeneration, seen: Tensor, lesson: Lesson, happened: Counter[str]
) -> Tensor:
    """Return the mean loss of the answers' tokens; with a choice of patches that of early answers is added.

    Args:
        model: Its projector and language model are run.
        seen: What the tower tells of the pictures, shape [pictures, patches, width].
        lesson: The questions.
        happened: Told how many questions of each kind were asked, and how many right words were likeliest.
    """
    packed, patches = lesson.packed, lesson.patches
    assert packed is not None
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
        early = packed["early"].gather(1, kept)
        mask = mask.gather(2, kept[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
        mask = mask.gather(3, kept[:, None, None, :].expand(-1, 1, mask.shape[2], -1))
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=positions
    ).last_hidden_state
    labels = labels[:, 1:]
    told = labels != -100
    logits, truth = model.lm_head(hidden[:, :-1][told]).float(), labels[told]
    words = truth != model.config.text_config.eos_token_id
    happened.update(lesson.kinds)
    right = (logits.argmax(-1) == truth)[words].tolist()
    happened.update(f"{kind} right" for kind, one in zip(lesson.kinds, right, strict=True) if one)
    loss = cross_entropy(logits, truth)
    if patches is None:
        return loss
    soon = early != -100
    return loss + cross_entropy(model.lm_head(hidden[soon]).float(), early[soon])


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
    folder = args.output / "model"
    processor = build_processor(args.seed)
    model = build_model(processor, args.seed)
    if args.start:
        model = LlavaForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
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
