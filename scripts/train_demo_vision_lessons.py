"""What the vision demo's model learns from: pictures, and several questions on each in one row of tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from train_demo_vision_model import TOKENS
from transformers import LlavaProcessor

from structprune.demo.dice import Dice
from structprune.demo.scenes import COLOURS, PLACES, SHAPES, Scene, covered, imagine, render
from structprune.demo.sights import SIGHTS, VisualQuestion, ask, prompt_of

THREADS = 2  # each takes its part of a step
PICTURES, QUESTIONS = 8, 12  # in a step; of a picture
FEW = 32  # patches of a picture, of which five things cover at most twenty


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
        """Return a batch whose attention_mask is [rows, 1, tokens, tokens], all else [rows, tokens].

        `labels` are the answers' tokens where they stand; `early` is their first token at every token of the
        question from the one on that decides it.

        Args:
            asked: The questions of each picture.
        """
        rows, positions, labels, parts, early = [], [], [], [], []
        for questions in asked:
            row, at = list(self.prefix), list(range(len(self.prefix)))
            label, part, soon = [-100] * len(row), [0] * len(row), [-100] * len(row)
            for number, one in enumerate(questions, start=1):
                answer = [*self.ids(f" {one.answer}"), self.tokenizer.eos_token_id]
                ids = self.ids(one.question + self.rest) + answer
                row += ids
                at += range(len(self.prefix), len(self.prefix) + len(ids))
                label += [-100] * (len(ids) - len(answer)) + answer
                part += [number] * len(ids)
                # "red thing", "circle": the last words, before what stands behind every question.
                known = len(self.ids(one.question[-1] + self.rest)) + 1 + one.question.endswith("thing?")
                soon += [-100] * (len(ids) - len(answer) - known) + answer[:1] * known + [-100] * len(answer)
            rows.append(torch.tensor(row))
            positions.append(torch.tensor(at))
            labels.append(torch.tensor(label))
            parts.append(torch.tensor(part))
            early.append(torch.tensor(soon))
        part = pad_sequence(parts, batch_first=True, padding_value=-1)
        sees = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
        sees &= torch.ones_like(sees).tril()
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "position_ids": pad_sequence(positions, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "early": pad_sequence(early, batch_first=True, padding_value=-100),
            "attention_mask": torch.zeros(sees.shape).masked_fill(~sees, -1e4)[:, None],
        }


@dataclass
class Lesson:
    """Pictures and what is asked of them.

    Attributes:
        pixels: What the processor makes of the pictures, shape [pictures, 3, SIDE, SIDE].
        labels: What stands in their patches, as `patch_labels` tells.
        kinds: Of the questions, picture by picture.
        packed: What `Packer.pack` returns; None while tower and projector learn alone.
        patches: Which patches the language model sees, shape [pictures, FEW]; None for all.
    """

    pixels: Tensor
    labels: Tensor
    kinds: list[str]
    packed: dict[str, Tensor] | None = None
    patches: Tensor | None = None


def lessons(seed: int, packer: Packer, stage: Callable[[], str]) -> Iterator[list[Lesson]]:
    """Yield the parts of a step, one for each thread.

    Args:
        seed: Of everything that is drawn.
        packer: Writes the questions.
        stage: Tells what is learned now: "patches", "few" or "all" of them.
    """
    dice, chance = Dice(seed), torch.Generator().manual_seed(seed)
    while True:
        parts = []
        for _ in range(THREADS):
            scenes = [imagine(dice) for _ in range(PICTURES // THREADS)]
            asked = [[ask(dice.pick(SIGHTS), scene, dice) for _ in range(QUESTIONS)] for scene in scenes]
            part = Lesson(
                pixels=pixels([render(scene) for scene in scenes]),
                labels=patch_labels(scenes),
                kinds=[one.kind for questions in asked for one in questions],
            )
            if stage() != "patches":
                part.packed = packer.pack(asked)
            if stage() == "few":
                part.patches = some_patches(part.labels[0] > 0, chance)
            parts.append(part)
        yield parts


def some_patches(covered_ones: Tensor, chance: torch.Generator) -> Tensor:
    """Return the patches of things and drawn ones of ground, shape [pictures, FEW], in order."""
    rank = covered_ones.float() + 0.9 * torch.rand(covered_ones.shape, generator=chance)
    return rank.topk(FEW).indices.sort().values
