"""What a report says in sentences, for the card and the page; in Markdown of `code` and **bold** alone."""

from collections.abc import Iterator, Mapping
from typing import Any

from structprune.calibration.text_source import DEMO, SUFFIXES
from structprune.report.figures import bytes_text, fraction, number, percent, prunable

# What a method is composed of, beside how much it removes.
CHOICES = ("score", "budget", "repair")
NO_LOOK = "None: nothing is looked at before the model runs."
ONLY_WEIGHTS = "None: this method looks at the weights only."
CARRIED_OUT = "None in this run: it carried out a plan that was decided before."
ZEROS = (
    "The removed weights are stored as zeros in ordinary dense tensors. **This makes neither the files "
    "smaller nor dense kernels faster**: a program saves memory or time only when it uses the zeros. To get "
    "a smaller and faster model on every runtime, remove whole units (width, depth, experts)."
)
SMALLER = (
    "It has {fewer:,} parameters fewer than the {dense:,} of the dense model, {share} of all: the files are "
    "smaller, and every runtime that opens them has less to compute."
)
RUNNING = (
    "{method} lets structprune compute fewer visual tokens while it runs the model{left}. **The saving "
    "exists only under structprune**: nothing of it is in the weights, and any other program that opens the "
    "folder computes every token."
)
LEFT = (
    ": of the {visual_tokens} of an image {tokens} are left in the last block and {avg_tokens:.4g} in a "
    "block on average, which is {visual_flops:.2%} of the operations that they cost there{tower}; to choose "
    "them costs {selection_flops:.2%} ({counted})"
)
WITH_TOWER = ", and {image_flops:.2%} with the vision tower"
# Of weight files that no stage changed: what they are in this folder.
WAYS = {
    "copied": "a copy of those of `{base}`, byte for byte",
    "reflinked": "those of `{base}`, byte for byte; the file system keeps them once until either is edited",
    "linked": "hard links to those of `{base}`: **an edit of one is an edit of both**",
    "referred": "those of `{base}`, and not in this folder: it holds their place and their sha256. **Only "
    "structprune opens it**, as long as they are there and unchanged",
}
PATTERN = (
    " The {pattern} pattern holds in every pruned matrix; hardware with support for it can use it, after the "
    "weights were converted to its own format."
)


def about(report: Mapping[str, Any], base: str) -> Iterator[str]:
    """Yield what is to be known before anything else: what left, what it saves and what it does not.

    Args:
        report: The report of a run.
        base: What the source is called.
    """
    if before := _before(report):
        yield before
    pattern, sizes = report["pattern"], report["parameters"]
    if sizes["pruned"] < sizes["dense"]:
        fewer = sizes["dense"] - sizes["pruned"]
        yield SMALLER.format(fewer=fewer, dense=sizes["dense"], share=percent(fewer / sizes["dense"]))
    if report["sparsity"]:
        yield ZEROS + (PATTERN.format(pattern=pattern) if ":" in str(pattern) else "")
    for stage in _running(report):
        left = stage["while_running"]
        tower = WITH_TOWER.format(**left) if "image_flops" in left else ""
        told = LEFT.format(tower=tower, **left) if "tokens" in left else ""
        yield RUNNING.format(method=stage["method"], left=told)
    yield from _unchanged(report, base)
    yield from (f"Note: {stage['note']}." for stage in report.get("stages", ()) if "note" in stage)


def composition(report: Mapping[str, Any]) -> str:
    """Return the stages of a run by what they are composed of: "wanda (budget owl, repair least_squares)".

    Args:
        report: The report of the run.
    """
    methods, stages = str(report["method"]).split("+"), list(report.get("stages", ()))
    # A recovery is named behind the stages, and is none of them.
    stages += [{}] * (len(methods) - len(stages))
    said = []
    for method, stage in zip(methods, stages, strict=False):
        config = stage.get("config", {})
        chosen = {key: _name_of(config.get(key)) for key in CHOICES}
        words = ", ".join(f"{key} {name}" for key, name in chosen.items() if name)
        said.append(f"{method} ({words})" if words else method)
    return " + ".join(said)


def goals_header(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what stands above each column of `goals_rows`."""
    # What a running model computes is counted while it runs.
    measured = "measured" if _running(report) else "measured from the files"
    return ("stage", "removed", "asked", "reachable", measured)


def goals_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return of every stage what was asked, what whole units allow, and what was measured."""
    return [
        (
            stage["method"],
            prunable(stage["unit"]),
            *(fraction(stage.get(what)) for what in ("asked", "reachable", "measured")),
        )
        for stage in report.get("stages", ())
        if "unit" in stage
    ]


def protocol_sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per text: a perplexity without its protocol cannot be compared with any other."""
    protocol = (report["evaluation"] or {}).get("protocol", {})
    for name, stamp in protocol.get("texts", {}).items():
        stride = "without overlap" if stamp.get("stride") is None else f"every {stamp['stride']} tokens"
        yield (
            f"Perplexity on {name}: {stamp.get('windows')} windows of {stamp.get('length')} tokens {stride}, "
            f"{stamp.get('scored_tokens')} tokens scored, beginning-of-sequence rule `{stamp.get('bos')}`, "
            f"computed in {stamp.get('dtype')}; sha256 of the {_hash_of(stamp)}. "
            "Divergence is the mean KL(dense || pruned) per token, ± one standard error over windows."
        )
    for name, stamp in protocol.get("questions", {}).items():
        yield (
            f"Answers on {name}: {stamp.get('questions')} questions on images, decoding "
            f"{stamp.get('decoding')}, right with {stamp.get('right')}, computed in {stamp.get('dtype')}; "
            f"sha256 of prompts and pixels `{str(stamp.get('sha256'))[:16]}`. McNemar's test asks whether "
            "the questions that only one of the two models gets right could be either's by chance."
        )
    for flag in protocol.get("flags", ()):
        yield f"Note: {flag}."


def calibration_sentence(report: Mapping[str, Any]) -> str:
    """Return what was looked at before anything was decided, and what was trained on after it."""
    facts, training = report["calibration"], report.get("recovery")
    if not training:
        return _looked_at(facts) if facts else _no_look(report)
    # Of a recovered model without them nobody knows what its pruning looked at.
    return (
        f"{_looked_at(facts)} Then trained on {_text(training)}" if facts else f"Trained on {_text(training)}"
    )


def recovery_sentence(report: Mapping[str, Any]) -> str:
    """Return what training gained; "" where nothing was trained."""
    training = report.get("recovery")
    if not training:
        return ""
    return (
        f"Trained after pruning: the loss on held-out text went from {number(training['start_loss'])} to "
        f"{number(training['best_loss'])} nats per token, at its best after step {training['best_step']}."
    )


def seen_before(report: Mapping[str, Any], name: str) -> str:
    """Return which text of its own run a text is that was measured on, such as "training text"; or "".

    Args:
        report: The report of a run.
        name: What the text's figures are called.
    """
    stamp = (report.get("evaluation") or {}).get("protocol", {}).get("texts", {}).get(name, {})
    read = {
        "calibration": report.get("calibration") or {},
        "training": (report.get("recovery") or {}).get("data", {}),
    }
    which = [what for what, facts in read.items() if _same_text(stamp, facts)]
    part = "held-out part of the " if "held_out" in stamp else ""
    return f"{part}{' and '.join(which)} text" if which else ""


def made_sentence(report: Mapping[str, Any]) -> str:
    """Return how long the run took, where, and with which versions."""
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items() if value)
    machine = report["machine"]
    return (
        f"Made in {report['seconds']:.0f} seconds on {machine['processor']} ({machine['threads']} threads), "
        f"with {versions}."
    )


def _no_look(report: Mapping[str, Any]) -> str:
    """Return why no data were looked at."""
    if _running(report):
        return NO_LOOK
    return CARRIED_OUT if report.get("command") == "apply" else ONLY_WEIGHTS


def _looked_at(facts: Mapping[str, Any]) -> str:
    """Return what the stages looked at."""
    if facts.get("images"):
        return (
            f"{facts.get('samples')} questions on images, prompts of at most {facts.get('length')} tokens, "
            f"from `{facts.get('source')}` (seed {facts.get('seed')}; sha256 of prompts and pixels "
            f"`{str(facts.get('sha256'))[:16]}`). What these do not show may have suffered more than these "
            "figures say."
        )
    return (
        f"{facts.get('samples')} samples of {facts.get('length')} tokens from `{facts.get('source')}` "
        f"(seed {facts.get('seed')}; sha256 of the token ids `{str(facts.get('sha256'))[:16]}`). What these "
        "texts do not show, such as other languages or code, may have suffered more than these figures say."
    )


def _text(training: Mapping[str, Any]) -> str:
    """Return what a recovery trained on."""
    data = training.get("data", {})
    return (
        f"{data.get('windows')} windows of {data.get('length')} tokens from `{data.get('source')}` "
        f"(seed {data.get('seed')}; sha256 of the token ids `{str(data.get('sha256'))[:16]}`)."
    )


def _same_text(stamp: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Tell whether two stamps are of one text; of the built-in one an evaluation reads another part."""
    source = stamp.get("source")
    if source is None or source == DEMO or source != facts.get("source"):
        return False
    return str(source).endswith(SUFFIXES) or stamp.get("split") == facts.get("split")  # a file has no split


def _name_of(choice: object) -> str:
    """Return what a choice of a stage is called; "" where nothing was chosen."""
    name = choice.get("name") if isinstance(choice, Mapping) else choice
    return name if isinstance(name, str) else ""


def _running(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the stages whose saving exists only while structprune runs the model."""
    return [stage for stage in report.get("stages", ()) if "while_running" in stage]


def _before(report: Mapping[str, Any]) -> str:
    """Return what the model had lost before; "" of a dense one."""
    found = report.get("found") or {"pruned": False}
    if not found["pruned"]:
        return ""
    by = f", by structprune with {found['method']}" if found["method"] else ""
    return (
        f"It was pruned before: {fraction(found['sparsity'])} of the weights of its linears were zero, "
        f"pattern {found['pattern']}{by}. What was asked for and achieved counts these zeros."
    )


def _unchanged(report: Mapping[str, Any], base: str) -> Iterator[str]:
    """Yield one line per way in which weight files that nothing changed came into the folder."""
    weights = report.get("weights") or {}
    for way, said in WAYS.items():
        if way in weights:
            which = "Weight files" if "written" in weights else "The weight files"
            yield f"{which} of {bytes_text(weights[way])} are {said.format(base=base)}."


def _hash_of(stamp: Mapping[str, Any]) -> str:
    """Return what identifies a text: itself, or the tokens where only some of its windows were taken."""
    what, key = ("text", "sha256") if "sha256" in stamp else ("token ids", "tokens_sha256")
    return f"{what} `{str(stamp.get(key))[:16]}`"
