"""Opens model folders as everybody does, in a process of its own that has never heard of structprune.

Run by its path: `python -P reload.py JOBS.json`. It imports torch and transformers and nothing else, so that
what it reports is what a user without structprune will see. One line of JSON per folder goes to stdout.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

NEW_TOKENS = 4
# With and without a cache other kernels run; a wrong position or mask is off by far more.
SAME_STEP = 1e-4
ROUNDINGS = 16


def open_plainly(folder: str, dtype: str, *, trusted: bool) -> tuple[Any, str, dict[str, list[str]]]:
    """Return the model, what opened it, and the tensors that transformers missed or misfit."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trusted}
    config = AutoConfig.from_pretrained(folder, **options)
    vision = config.get_text_config() is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    factory: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model, found = factory.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, **options
    )
    keys = {kind: sorted(str(key) for key in found[f"{kind}_keys"]) for kind in ("missing", "mismatched")}
    loader = factory.__name__
    if hasattr(config, "auto_map") and trusted:
        loader += ", trust_remote_code=True"
    return model.eval(), loader, keys


@torch.no_grad()
def same_with_cache(model: Any, ids: Tensor) -> bool | None:
    """Tell whether greedy tokens are the same with and without a cache; None where it cannot generate.

    Args:
        model: The model.
        ids: Token ids, shape [batch, tokens]; the first half is the prompt.
    """
    prompt = ids[:, : ids.shape[1] // 2]
    new = min(NEW_TOKENS, ids.shape[1] - prompt.shape[1])
    if not model.can_generate() or prompt.shape[1] == 0:
        return None
    runs = [
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for use_cache in (True, False)
    ]
    chosen = [run.sequences[:, prompt.shape[1] :] for run in runs]
    tolerance = max(SAME_STEP, ROUNDINGS * torch.finfo(model.dtype).eps)
    for row in range(len(prompt)):
        differing = (chosen[0][row] != chosen[1][row]).nonzero()
        if len(differing):
            # Two tokens may tie; whether they did shows in the logits that they were chosen by.
            step = int(differing[0])
            one, other = (run.logits[step][row].float() for run in runs)
            if float((one - other).abs().max()) > tolerance * float(other.abs().max()):
                return False
    return True


def main(jobs_file: str) -> None:
    """Open every folder of a job list, leave its logits beside it, and print what was found."""
    for job in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
        torch.set_num_threads(job["threads"])
        with contextlib.redirect_stdout(sys.stderr):
            model, loader, keys = open_plainly(job["folder"], job["dtype"], trusted=job["trusted"])
            asked = load_file(job["probe"])
            ids = asked.pop("input_ids")
            image = {name.removeprefix("image."): value for name, value in asked.items()}
            with torch.no_grad():
                said = {"logits": model(input_ids=ids, use_cache=False).logits.contiguous()}
                if image:
                    said["image_logits"] = model(**image, use_cache=False).logits.contiguous()
            save_file(said, job["logits"])
            agrees = same_with_cache(model, ids)
            del model
        found = {"loader": f"transformers {transformers.__version__} ({loader})", "same_with_cache": agrees}
        alone = not any(name.partition(".")[0] == "structprune" for name in sys.modules)
        sys.stdout.write(json.dumps({"folder": job["folder"], "alone": alone, **keys, **found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
