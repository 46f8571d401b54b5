"""The story of a run, top to bottom: read, inspect, calibrate, apply, measure, save, prove."""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structprune.calibration import data
from structprune.checkpoint.export import Progress, export
from structprune.checkpoint.source import resolve
from structprune.checkpoint.verify import Verification, verify
from structprune.errors import InputError, VerificationError
from structprune.evaluate import Evaluation, evaluate, gate
from structprune.machine import device_of, fits_in_memory, peak_rss_bytes, versions
from structprune.models.streamed import Batch, Model, StreamedModel, hashes_of, open_model, open_tokenizer
from structprune.plan import Plan, PlanWriter
from structprune.pruner import Pruner
from structprune.recipe import EvaluateOptions, Recipe
from structprune.report import write_card, write_report
from structprune.storage.output import Partial, check_output
from structprune.storage.reader import CheckpointReader
