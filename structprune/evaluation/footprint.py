"""How much room a model takes: its files, and the peak of memory while it runs.

On a processor a fresh process holds one model alone. Its peak is what the process grows by from before the
model is there: weights, cache and activations, and a few megabytes of kernels' own; what passes while the
files are read does not count where the system can forget a peak (Linux). On CUDA it is what torch allocated.

Run as `python -m structprune.evaluation.footprint JOB.json`, it is that process: one line of JSON on stdout.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from structprune.checkpoint.adapter import is_adapter
from structprune.checkpoint.running import carry_on
from structprune.checkpoint.source import open_adapted
from structprune.errors import EnvironmentFailure, counted
from structprune.evaluation.speed import Workload, fitting, prompts, timed_pass
from structprune.machine import available_memory, give_back_memory, own_peak_rss, reset_peak_rss
from structprune.models.cost import count, weight_bytes
from structprune.models.opening import Opening
from structprune.models.streamed import build_model, open_reader, open_skeleton
from structprune.proof.fresh_process import child_environment, reason_of_end
from structprune.report.figures import bytes_text
from structprune.storage.scratch import scratch_folder

HOW = {
    "cpu": "growth of a fresh process that holds one model alone, from before the model was opened",
    "cuda": "torch.cuda.max_memory_allocated of a pass, with the model's weights and without the other model",
}


@dataclass(frozen=True)
class Subject:
    """A model folder whose files have been checked.

    Attributes:
        folder: The folder, or that of an adapter, which is merged into its base.
        opening: How it is opened: always in memory, on a device that is there.
    """

    folder: Path
    opening: Opening

    def open(self) -> PreTrainedModel:
        """Return the model in memory."""
        if is_adapter(self.folder):
            return open_adapted(str(self.folder), self.folder, self.opening).resident
        model = build_model(open_reader(self.folder, self.opening), self.opening)
        assert isinstance(model, PreTrainedModel)
        carry_on(model, self.folder)
        return model


@dataclass(frozen=True)
class _Job:
    """What a fresh process is told."""

    subject: Subject
    workload: Workload
    threads: int


def bytes_needed(models: Sequence[PreTrainedModel], workload: Workload) -> int:
    """Return the bytes of all weights at once and of the cache of the largest batch.

    Args:
        models: Their parameters may be on the meta device; their dtype is the one to compute in.
        workload: What they will be timed on.
    """
    weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    each = [count(model, length=workload.length).kv_bytes_per_token for model in models]
    return weights + round(workload.batches[-1] * max(one or 0 for one in each) * workload.length)


def check_room(models: Sequence[PreTrainedModel], workload: Workload, device: str) -> None:
    """Refuse what cannot fit.

    Args:
        models: As for `bytes_needed`.
        workload: What they will be timed on.
        device: Where.

    Raises:
        EnvironmentFailure: They need more memory than is free.
    """
    needed, free = bytes_needed(models, workload), free_bytes(device)
    if needed > free:
        held = f"{counted(len(models), 'model')} and the cache of {counted(workload.batches[-1], 'prompt')}"
        raise EnvironmentFailure(
            f"bench: {held} of {workload.length} tokens take {bytes_text(needed)} of memory, "
            f"{bytes_text(free)} are free on {device}",
            hint="a smaller --batch (bench.batch), a shorter --length, or --dtype bfloat16",
        )


def peak_memory(subject: Subject, model: PreTrainedModel | None, workload: Workload) -> list[int | None]:
    """Return the peak of memory for each batch of a workload, in bytes; None where nobody tells.

    Args:
        subject: The model's folder.
        model: The model where it is in memory already; needed on CUDA, where the process does not matter.
        workload: What it runs.

    Raises:
        EnvironmentFailure: The fresh process could not do it.
    """
    if subject.opening.device == "cpu":
        return list(in_fresh_process(subject, workload))
    if model is None or model.device.type != "cuda":
        return [None] * len(workload.batches)
    return [_on_cuda(model, workload, batch) for batch in workload.batches]


def file_bytes(folder: Path, base: Path) -> int:
    """Return the bytes of a model's weight files; an adapter's are those of its base, and its own."""
    return sum(weight_bytes(one) for one in {folder, base})


def free_bytes(device: str) -> int:
    """Return the bytes of memory that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else available_memory()


def _on_cuda(model: PreTrainedModel, workload: Workload, batch: int) -> int:
    # What else lies on the device, such as the model it is compared with, is there before and after.
    own = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    ids = prompts(model.config, workload, batch)
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    with fitting(batch, workload):
        timed_pass(model, ids, workload.new)
    return torch.cuda.max_memory_allocated(model.device) - before + own


def in_fresh_process(subject: Subject, workload: Workload) -> list[int]:
    """Return the peak of a process of its own for each batch of a workload, in bytes."""
    job = _Job(Subject(subject.folder.resolve(), subject.opening), workload, torch.get_num_threads())
    with scratch_folder("bench") as name:
        file = Path(name) / "job.json"
        file.write_bytes(TypeAdapter(_Job).dump_json(job))
        child = subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(file)],
            env=child_environment(ours=True),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    lines = [line for line in child.stdout.splitlines() if line.startswith("[")]
    if child.returncode or not lines:
        raise EnvironmentFailure(
            f"{subject.folder}: its memory could not be measured: {reason_of_end(child)}",
            hint="a smaller --batch, or a shorter --length",
        )
    peaks: list[int] = json.loads(lines[-1])
    return peaks


def main(file: str) -> None:
    """Open the model of a job, run each batch, and print by how much this process grew at its peak."""
    job = TypeAdapter(_Job).validate_json(Path(file).read_bytes())
    subject, workload = job.subject, job.workload
    torch.set_num_threads(job.threads)
    with contextlib.redirect_stdout(sys.stderr):
        if not is_adapter(subject.folder):
            open_skeleton(subject.folder, subject.opening)  # imports the code of its class
        give_back_memory()
        reset_peak_rss()
        before = own_peak_rss()
        model = subject.open()
        peaks = []
        for batch in workload.batches:
            give_back_memory()
            reset_peak_rss()
            timed_pass(model, prompts(model.config, workload, batch), workload.new)
            peaks.append(own_peak_rss() - before)
    sys.stdout.write(json.dumps(peaks) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
