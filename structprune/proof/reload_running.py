"""Opens model folders with what works while a model runs, in a process of its own, and counts tokens.

Run as `python -m structprune.proof.reload_running JOBS.json`. One line of JSON per folder on stdout.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from structprune.checkpoint.running import carry_on
from structprune.models.opening import Opening
from structprune.models.streamed import open_model
from structprune.runtime.attach import engine_of
from structprune.storage.tensor_file import read_tensors, save_tensors
from structprune.version import __version__


def main(jobs_file: str) -> None:
    """Open every folder of a job list, leave its logits beside it, and print what was counted."""
    for job in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
        torch.set_num_threads(job["threads"])
        with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
            opening = Opening(
                dtype=job["dtype"], stream=False, device="cpu", allow_external_symlinks=job["links"]
            )
            # Not by `load`: before a folder is published it has no manifest yet.
            folder = Path(job["folder"])
            model = carry_on(open_model(folder, opening), folder)
            assert isinstance(model, PreTrainedModel)
            asked = read_tensors(Path(job["probe"]))
            found = {"logits": model(input_ids=asked.pop("input_ids"), use_cache=False).logits.contiguous()}
            engine, watched = engine_of(model), {}
            if asked and engine is not None:
                image = {name.removeprefix("image."): value for name, value in asked.items()}
                with engine.watching() as watched:
                    found["image_logits"] = model(**image).logits.contiguous()
            save_tensors(Path(job["logits"]), found)
        line = {
            "folder": job["folder"],
            "loader": f"structprune {__version__}",
            "computed": [[int(one.sum()) for one in watched[index]] for index in sorted(watched)],
        }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
