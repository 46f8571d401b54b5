"""What calibration looks at where a model sees: batches of questions on images, made by its own processor.

A batch holds whole prompts, padded in front, with an attention mask; the model itself puts the features of an
image where a prompt has placeholders.
"""

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from structprune.calibration.data import Calibration
from structprune.calibration.image_questions import ImageQuestion, LeftQuestions, read_questions
from structprune.calibration.text_source import TextSource
from structprune.errors import InputError, UsageError
from structprune.models.streamed import Batch, Model
from structprune.models.walk import capture

logger = logging.getLogger(__name__)

# What processors raise of images that they cannot resize, cut or put side by side.
PROCESSOR_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError)


def load_questions(
    text: TextSource,
    processor: ProcessorMixin,
    *,
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Calibration:
    """Draw questions and make batches of them; the same arguments give the same batches in the same order.

    Args:
        text: Where they come from.
        processor: The model's.
        samples: Questions to draw; a source that has fewer is taken whole, with a warning.
        seed: Decides which questions are drawn, and their order.
        batch_size: Questions per batch; the last batch may be smaller.
        max_length: The most positions the model knows; None when it has no such limit.

    Raises:
        InputError: The source cannot be trusted, or a prompt is longer than `max_length`.
        EnvironmentFailure: What reads images is not installed.
    """
    questions = read_questions(text)
    if len(questions) < samples:
        logger.warning("%s: it has %d questions, fewer than %d samples", text.source, len(questions), samples)
    drawn = random.Random(seed).sample(range(len(questions)), min(samples, len(questions)))
    chosen = [questions[index] for index in drawn]
    batches = [batch_of(chosen[at : at + batch_size], processor) for at in range(0, len(chosen), batch_size)]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    if max_length is not None and longest > max_length:
        raise InputError(
            f"{text.source}: a prompt has {longest} tokens, more than the model's {max_length} positions",
            hint="use smaller images or shorter questions",
        )
    taken = set(drawn)
    left = tuple(one for index, one in enumerate(questions) if index not in taken)
    facts = {
        **asdict(text),
        "seed": seed,
        "samples": len(chosen),
        "length": longest,
        "images": True,
        "questions_available": len(questions),
        "sha256": hash_of_batches(batches),
    }
    return Calibration(batches, facts, LeftQuestions(text, left))


def batch_of(questions: Sequence[ImageQuestion], processor: ProcessorMixin) -> Batch:
    """Return one batch: `input_ids` and `attention_mask` [questions, tokens], and what the model sees by.

    Args:
        questions: At least one.
        processor: The model's; its tensors come as it makes them (`pixel_values`, `image_grid_thw`, ...).

    Raises:
        InputError: An image cannot be read, the processor refuses its size, or a question holds the
            placeholder of an image.
        EnvironmentFailure: pillow is not installed.
    """
    call: Any = processor
    prompts = [prompt_of(one, processor) for one in questions]
    start = call.tokenizer.bos_token
    # A template that writes the token itself must not get a second one from the tokenizer.
    written = start is not None and prompts[0].startswith(start)
    images = [one.open_image() for one in questions]
    make = partial(
        call,
        padding=True,
        # Whatever the tokenizer's own side: an answer goes on where the prompt ends.
        padding_side="left",
        return_tensors="pt",
        **({"add_special_tokens": False} if written else {}),
    )
    try:
        made = make(images=images, text=prompts)
    except PROCESSOR_ERRORS as error:
        for one, image, prompt in zip(questions, images, prompts, strict=True):
            try:
                make(images=[image], text=[prompt])
            except PROCESSOR_ERRORS as alone:
                raise InputError(
                    f"{one.where}: the model's processor refuses an image of {image.width} x {image.height} "
                    f"pixels: {' '.join(str(alone).split())[:200]}",
                    hint="give the image another size, or take the row out",
                ) from alone
        raise InputError(
            f"{questions[0].where}: the model's processor makes no batch of {len(images)} images: "
            f"{' '.join(str(error).split())[:200]}",
            hint="give all images the same size, or ask for batches of one",
        ) from error
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def prompt_of(question: ImageQuestion, processor: ProcessorMixin) -> str:
    """Return a question as the model is asked it, with one placeholder for its image.

    The processor's chat template writes it where there is one, else it is LLaVA's plain prompt.

    Raises:
        InputError: The question holds a placeholder of its own.
    """
    call: Any = processor
    image = str(getattr(call, "image_token", "<image>"))
    if image in question.question:
        raise InputError(
            f"{question.where}: the question holds {image!r}, which stands for an image",
            hint="take it out: the prompt around the question has one for the row's image",
        )
    if getattr(call, "chat_template", None) is None:
        return f"USER: {image}\n{question.question} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question.question}]
    said = [{"role": "user", "content": content}]
    return str(call.apply_chat_template(said, add_generation_prompt=True, tokenize=False))


def check_placeholders(model: Model, batch: Batch) -> None:
    """Check that a processor leaves room for exactly the features that the model makes of the images.

    Args:
        model: Run up to its first block.
        batch: What the processor made.

    Raises:
        InputError: It does not, or the model takes no images.
    """
    name, token = model.config.name_or_path, getattr(model.config, "image_token_id", None)
    count = int((batch["input_ids"] == token).sum()) if token is not None else 0
    if not count:
        raise InputError(
            f"{name}: the prompts have no placeholder that the model knows as an image",
            hint="the image token of the processor must be the image_token_id of config.json",
        )
    try:
        capture(model, [batch], lambda states: None)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: the processor writes {count} placeholders for {len(batch['input_ids'])} images, and "
            f"the model refuses: {said}",
            hint="patch_size and vision_feature_select_strategy of the processor must be the model's",
        ) from error


def hash_of_batches(batches: Sequence[Batch]) -> str:
    """Return the sha256 of every tensor of the batches, pixels included, the same on every machine."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_no_length(length: int | None) -> None:
    """Refuse a length where questions are read, which are never cut.

    Raises:
        UsageError: One is given.
    """
    if length is not None:
        raise UsageError(
            f"calibration.length is {length}, and questions on images are read whole", hint="leave it out"
        )
