"""What a recovery would do and need, after every check that needs no computation."""

from dataclasses import replace
from typing import Any

from structprune.calibration.texts import check_text
from structprune.checkpoint.locate import resolve
from structprune.checkpoint.output import check_output
from structprune.checkpoint.plans import plans_of
from structprune.checkpoint.running import check_stored
from structprune.checkpoint.side_files import check_side_files
from structprune.checkpoint.source import open_outline
from structprune.checkpoint.writing import Writing
from structprune.models.cost import parameters_of, weight_bytes
from structprune.models.identity import skeleton
from structprune.models.opening import Opening
from structprune.models.tokenizer import check_vocabulary, open_tokenizer
from structprune.pipeline.estimate import estimate_training
from structprune.pipeline.inputs import inputs_of_recover_run
from structprune.pipeline.kept import may_stand
from structprune.pipeline.recover import check_shares, teacher_outline
from structprune.ranks import Ranks
from structprune.recipe.draft import RecoverRun
from structprune.recipe.options import RecoverOptions
from structprune.recovery.ranks import spell_out


def dry_recover(run: RecoverRun, *, opening: Opening, writing: Writing) -> dict[str, Any]:
    """Say what a recovery by one process would need; nothing is written, and no text is drawn.

    Args:
        run: The recovery.
        opening: How the models are opened.
        writing: How the output would be written.

    Returns:
        "output", "recipe", "plans" (the methods whose masks hold), "parameters", "recover" as
        `estimate_training` says it, and "disk_bytes".
    """
    options = run.recover or RecoverOptions()
    check_shares(options, Ranks())
    opening = replace(opening, dtype="auto", device=run.device, tokenizer=run.tokenizer)
    folder = resolve(run.model, revision=run.revision)
    needed = 0 if options.keep_adapter else weight_bytes(folder)
    inputs = inputs_of_recover_run(run, folder)
    check_output(inputs, run.output, overwrite=may_stand(run.output, writing), needed_bytes=needed)
    check_side_files(folder, opening)
    check_stored(folder)
    opened, _ = open_outline(folder, opening)
    plans = [plan.beside_weights() for plan in plans_of(folder)]
    options = spell_out(options, opened, plans)
    check_text(options.text_source)
    check_vocabulary(open_tokenizer(folder, opening), opened)
    teacher = teacher_outline(options, skeleton(opened), opening)
    device = opening.resolve(folder, opened.reader.nbytes).device
    training = estimate_training(options, opened, teacher, device)
    return {
        "output": str(run.output),
        "recipe": run.text(),
        "plans": [plan.method for plan in plans],
        "parameters": parameters_of(skeleton(opened)),
        "recover": training,
        "disk_bytes": needed + opened.reader.nbytes // 16 + training["state_bytes"],
    }
