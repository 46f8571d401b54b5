"""The fresh process: a child that shares nothing with this one opens folders; its logits against ours."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from structprune.errors import EnvironmentFailure
from structprune.machine import is_launchers
from structprune.models.opening import Opening
from structprune.models.streamed import Batch
from structprune.storage.durable import blame
from structprune.storage.scratch import HINT, scratch_folder
from structprune.storage.tensor_file import read_tensors, save_tensors

SEQUENCES = 2
LENGTH = 32
# What two processes may differ by when the same numbers lie at differently aligned addresses.
TOLERANCE = 1e-5
PLAIN = Path(__file__).with_name("reload.py")
OURS = {"streamed": "structprune.proof.reload_streamed", "running": "structprune.proof.reload_running"}
How = Literal["plain", "streamed", "running"]


@dataclass(frozen=True)
class ReloadJob:
    """A folder to open.

    Args:
        folder: The folder.
        ids: Token ids to run through it, shape [batch, tokens].
        opening: The dtype to compute in, which is not "auto", and what is allowed; it runs on the CPU.
        image: A prompt with an image to run through it too; None for none.
    """

    folder: Path
    ids: Tensor
    opening: Opening
    image: Batch | None = None


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process found.

    Args:
        error: Why the folder could not be opened; "" when it was.
        loader: What opened it, with its version.
        logits: Shape [batch, tokens, vocabulary]; None when there was an error.
        image_logits: Those of the prompt with an image; None where there was none.
        missing: Tensors that the loader did not find, or found in another shape.
        same_with_cache: Whether greedy tokens are the same with and without a cache; None where not tried.
        computed: Of every block how many visual tokens its attention and its feed-forward computed, where the
            child ran what works while a model runs.
    """

    error: str
    loader: str = ""
    logits: Tensor | None = None
    missing: tuple[str, ...] = ()
    same_with_cache: bool | None = None
    image_logits: Tensor | None = None
    computed: list[tuple[int, int]] = field(default_factory=list)


def probe(config: PreTrainedConfig) -> Tensor:
    """Return the token ids that every reload of a model computes, shape [2, at most 32].

    They are spread over the vocabulary; tokens with a meaning of their own (padding, images) are left out.
    """
    text, ordinary = config.get_text_config(), ordinary_tokens(config)
    length = min(LENGTH, getattr(text, "max_position_embeddings", None) or LENGTH)
    count = SEQUENCES * length
    # A step that shares no divisor with the count visits every place once, in an order that is not sorted.
    places = [(place * 37) % count for place in range(count)]
    return torch.tensor([ordinary[place * len(ordinary) // count] for place in places]).view(
        SEQUENCES, length
    )


def ordinary_tokens(config: PreTrainedConfig) -> list[int]:
    """Return the tokens of a model that have no meaning of their own, as padding and images have."""
    special = {int(value) for value in _special(config.to_dict()) if isinstance(value, int)}
    count = int(config.get_text_config().vocab_size)
    return [token for token in range(count) if token not in special] or [0]


def reload(jobs: Sequence[ReloadJob], *, how: How = "plain") -> list[Reloaded]:
    """Open folders in a child process, several in one, and return what it found, in order.

    A "plain" child is plain transformers and never imports structprune; a "streamed" one opens block by
    block; a "running" one carries out what works while a model runs. A folder that ends the child is
    reported, and the folders after it get another child.
    """
    with scratch_folder("reload") as scratch:
        written = [_write(job, Path(scratch), index) for index, job in enumerate(jobs)]
        results: list[Reloaded] = []
        while len(results) < len(jobs):
            results += _run(written[len(results) :], Path(scratch), how)
        return results


def difference(found: Tensor, expected: Tensor) -> tuple[bool, str]:
    """Tell whether logits are those expected, and by how much they differ."""
    if found.shape != expected.shape:
        return False, f"logits of shape {list(found.shape)}, expected {list(expected.shape)}"
    rows = list(zip(found.flatten(0, -2), expected.flatten(0, -2), strict=True))
    # One token at a time: with a large vocabulary whole copies in float64 would outweigh the model.
    if broken := sum(int((~mine.isfinite()).sum()) for mine, _ in rows):
        return False, f"{broken} logits are not finite"
    apart = max(float((mine.double() - theirs.double()).abs().max()) for mine, theirs in rows)
    scale = max(float(theirs.double().abs().max()) for _, theirs in rows)
    if apart == 0:
        return True, "the same logits to the last bit"
    return apart <= TOLERANCE * scale, f"logits differ by {apart:.3g}, the largest is {scale:.3g}"


def _special(value: object, key: str = "") -> list[object]:
    """Return every value in a config whose key says that it is a token."""
    if isinstance(value, dict):
        return [found for name, part in value.items() for found in _special(part, str(name))]
    if not key.endswith(("token_id", "token_index", "token_ids")):
        return []
    return list(value) if isinstance(value, list) else [value]


def _write(job: ReloadJob, scratch: Path, index: int) -> dict[str, Any]:
    asked = scratch / f"probe-{index}.safetensors"
    image = {f"image.{name}": value.cpu().contiguous() for name, value in (job.image or {}).items()}
    save_tensors(asked, {"input_ids": job.ids.cpu().contiguous(), **image})
    return {
        "folder": str(job.folder.resolve()),
        "probe": str(asked),
        "logits": str(scratch / f"logits-{index}.safetensors"),
        "dtype": job.opening.dtype,
        "trusted": job.opening.trust_remote_code,
        "links": job.opening.allow_external_symlinks,
        "strict": job.opening.strict,
        "threads": torch.get_num_threads(),
    }


def _run(jobs: Sequence[dict[str, Any]], scratch: Path, how: How) -> list[Reloaded]:
    """Run one child; return a result per folder that it opened, and one more for the folder that ended it."""
    listed = scratch / "jobs.json"
    with blame(listed):
        listed.write_text(json.dumps(jobs), encoding="utf-8")
    # -P keeps the script's and the user's folder off the module path, where a load.py or h2.py hides others.
    program = [str(PLAIN)] if how == "plain" else ["-m", OURS[how]]
    child = subprocess.run(
        [sys.executable, "-P", *program, str(listed)],
        env=child_environment(ours=how != "plain"),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    results = [_result(job, line) for job, line in zip(jobs, lines, strict=False)]
    if len(results) < len(jobs):
        full = os.strerror(errno.ENOSPC)
        if full in child.stderr:  # the machine's fault, which proves nothing of the folder
            raise EnvironmentFailure(f"{scratch}: {full}, in the fresh process", hint=HINT)
        results.append(Reloaded(error=reason_of_end(child)))
    return results


def child_environment(*, ours: bool) -> dict[str, str]:
    """Return the environment variables of a child; with `ours` it is one that finds structprune."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONWARNINGS" and not is_launchers(name)
    }
    # Sums are split by thread: another number of threads would round them differently.
    threads = str(torch.get_num_threads())
    found |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    found["TRANSFORMERS_VERBOSITY"] = "error"
    if ours:
        root = str(Path(__file__).parents[2])
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, found.get("PYTHONPATH"))))
    return found


def _result(job: dict[str, Any], line: dict[str, Any]) -> Reloaded:
    if line.get("alone") is False:
        return Reloaded(
            error="the child had structprune imported, so it proves nothing about plain transformers"
        )
    said = read_tensors(Path(job["logits"]))
    return Reloaded(
        error="",
        loader=line["loader"],
        logits=said["logits"],
        image_logits=said.get("image_logits"),
        missing=(*line.get("missing", ()), *line.get("mismatched", ())),
        same_with_cache=line.get("same_with_cache"),
        computed=[tuple(pair) for pair in line.get("computed", ())],
    )


def reason_of_end(child: "subprocess.CompletedProcess[str]") -> str:
    """Return how a child ended that did not do what it was started for."""
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return f"the process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    said = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    return f"the process ended with {child.returncode}: {said[-1] if said else 'and said nothing'}"
