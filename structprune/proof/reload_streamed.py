"""Opens model folders block by block, in a process of its own: for those too large to be opened whole.

Run as `python -m structprune.proof.reload_streamed JOBS.json`. One line of JSON per folder on stdout.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_skeleton
from structprune.storage.tensor_file import read_tensors, save_tensors
from structprune.version import __version__


def loader() -> str:
    """Return the name under which a report lists structprune itself as a loader."""
    return f"structprune {__version__}"


def main(jobs_file: str) -> None:
    """Open every folder of a job list, leave its logits beside it, and print what was found."""
    for job in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
        torch.set_num_threads(job["threads"])
        with contextlib.redirect_stdout(sys.stderr):
            opening = Opening(
                dtype=job["dtype"],
                trust_remote_code=job["trusted"],
                allow_external_symlinks=job["links"],
                strict=job["strict"],
            )
            model = open_skeleton(Path(job["folder"]), opening)
            asked = read_tensors(Path(job["probe"]))
            found = {"logits": logits(model, {"input_ids": asked.pop("input_ids")})}
            if asked:
                image = {name.removeprefix("image."): value for name, value in asked.items()}
                found["image_logits"] = logits(model, image)
            save_tensors(Path(job["logits"]), found)
        line = {"folder": job["folder"], "loader": f"{loader()} (streamed)"}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
