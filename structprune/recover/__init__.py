"""Recovery after pruning: LoRA with PEFT that keeps every removed weight removed."""

from structprune.recover.masks import nonzero_masks
from structprune.recover.training import Check, Recovery, check_teacher, main_process, train
from structprune.recover.windows import Windows, draw

__all__ = ["Check", "Recovery", "Windows", "check_teacher", "draw", "main_process", "nonzero_masks", "train"]
