"""A search for the values of a rule: those with which a model says most nearly what it says with all tokens.

Source: Yang et al. 2025, https://arxiv.org/abs/2508.05211 (Bayesian optimisation of the last token's state)
Parzen estimators propose the values here, one trial after another; every trial draws by a seed of its own, so
that a run that goes on proposes what one that was never interrupted proposes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from structprune.calibration.notebook import Look, Notebook
from structprune.errors import EnvironmentFailure, InputError
from structprune.models.streamed import Batch
from structprune.runtime.images import placeholder

Ranges = Mapping[str, tuple[float, float]]
# Trials whose values are drawn by chance, before any is proposed.
DRAWN = 10


def search(
    ranges: Ranges, agreement: Callable[[dict[str, float]], float], trials: int, seed: int, look: Look
) -> None:
    """Try values; what was tried is noted trial by trial, and not tried again.

    Args:
        ranges: Name of a value -> the least and the largest it can be.
        agreement: Told values, returns how good they are; higher is better.
        trials: How many are tried.
        seed: Draws them.
        look: Its notes are numbered by trials.

    Raises:
        EnvironmentFailure: optuna is not installed.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: optuna.distributions.FloatDistribution(*ends) for name, ends in ranges.items()}
    study = optuna.create_study(direction="maximize")
    for number in range(trials):
        look.told(number, trials)
        if not look.notes.has(number):
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=DRAWN, seed=seed + number)
            values = study.ask(space).params
            tried = [*(values[name] for name in ranges), agreement(values)]
            look.notes.write(number, {"tried": torch.tensor(tried, dtype=torch.float64)})
            # Told below, as of a trial that was noted before: both leave the same.
            study = _without_running(optuna, study)
        *found, value = look.notes.read(number)["tried"].tolist()
        params = dict(zip(ranges, found, strict=True))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    look.told(trials, trials)


def best(notes: Notebook, ranges: Ranges, trials: int) -> dict[str, float]:
    """Return the values of the best trial, of equal ones the first."""
    tried = [notes.read(number)["tried"].tolist() for number in range(trials)]
    found: Sequence[float] = max(tried, key=lambda one: one[-1])
    return dict(zip(ranges, found[:-1], strict=True))


def last_states(model: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
    """Return the last state of the last token of every prompt, float32 [prompts, hidden].

    Raises:
        InputError: There are no images.
    """
    image = placeholder(model.config)
    if not any(bool((batch["input_ids"] == image).any()) for batch in batches):
        raise InputError(
            "the calibration data hold no images",
            hint="--calibration FILE.jsonl with rows of image and question",
        )
    found = []
    with torch.no_grad():
        for batch in batches:
            states = model.base_model(**batch, use_cache=False).last_hidden_state
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            places = torch.arange(real.shape[1], device=real.device)
            last = (real * places).argmax(1).to(states.device)
            found.append(states[torch.arange(len(states)), last].float())
    return torch.cat(found)


def agreement_of(states: Tensor, dense: Tensor) -> float:
    """Return the mean cosine of states with those of the model with all tokens."""
    return float(cosine_similarity(states, dense, dim=-1).mean())


def _without_running(optuna: Any, study: Any) -> Any:
    """Return a study with the finished trials of another alone."""
    found = optuna.create_study(direction="maximize")
    found.add_trials([one for one in study.trials if one.state.is_finished()])
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise EnvironmentFailure("a search needs optuna", hint="pip install 'structprune[search]'") from None
    return optuna
