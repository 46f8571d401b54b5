"""The command line: a line of words in, one result out, an exit code; commands: `writers`, `readers`."""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Annotated, Any

import typer

from structprune.cli import readers, writers
from structprune.cli.flags import Job
from structprune.cli.outlet import lasting_streams
from structprune.cli.spellings import ours_for
from structprune.cli.terminal import (
    Report,
    complain,
    error_json,
    logging_to_stderr,
    progress_on_stderr,
    say,
    say_json,
    stoppable,
    unstoppable,
)
from structprune.errors import (
    EnvironmentFailure,
    Interrupted,
    MethodError,
    StructpruneError,
    UsageError,
    VerificationError,
    nearest,
)
from structprune.machine import Launch, check_process, launch
from structprune.pruners.catalogue import place_of
from structprune.version import __version__

# What several processes of one launch do together; of all else each would do the same.
LAUNCHED = ("prune", "recover", "evaluate", "bench")
app = typer.Typer(
    epilog="In N processes: torchrun --nproc-per-node N -m structprune prune ...; so recover and evaluate.",
    help="Prune language and vision-language models: weights, structure, visual tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose boxes cut the names of flags on a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _start(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Stand in `--help` for what `_carry_out` answers without a command."""


# In this order in `--help`.
for _run in (
    writers.prune,
    writers.apply,
    writers.recover,
    writers.export,
    readers.inspect,
    readers.verify,
    readers.evaluate,
    readers.bench,
    readers.show,
    readers.report,
    readers.methods,
    readers.env,
):
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(_run)

# What every job stands on but those that only list something.
HEAVY = ("torch", "transformers")
MEMORY_HINT = "try --stream, --samples 32, --length 512 or --device cpu, or raise the limit (`ulimit -v`)"
TRAINING_HINT = "try --gradient-checkpointing, with which this run goes on; or --batch-size 2, --length 512"


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        words: The command line without the program's name; that of this process unless given.

    Raises:
        Exception: A bug of ours, whatever it is; Python then prints the traceback and exits with 1.
    """
    with lasting_streams() as out:
        line = [_dashed(word) for word in (sys.argv[1:] if words is None else words)] or ["--help"]
        code = _carry_out(line)
        out.flush()
        # A reader that had seen enough is no error; a full disk lost what somebody waits for.
        if code == 0 and out.lost is not None and out.lost.errno != errno.EPIPE:
            said = f"stdout: {os.strerror(out.lost.errno or errno.EIO)}: the result could not be printed"
            hint = "the work itself is done, its folder complete; send stdout to a disk that has room"
            return _fail(EnvironmentFailure(said, hint=hint), as_json=False)
        return code


def _carry_out(line: Sequence[str]) -> int:
    """Run the words of a command line and say what came of it."""
    as_json, place = "--json" in line, launch()
    speaks = place.rank == 0
    if line[0] == "--version":
        say(f"structprune {__version__}")
        return 0
    try:
        _refuse_empty(line)
        with stoppable() as check:
            job = app(line, prog_name="structprune", standalone_mode=False)
            if not isinstance(job, Job):  # --help has been printed
                return int(job or 0)
            if place.count > 1 and line[0] not in LAUNCHED:
                raise UsageError(f"{line[0]} is the work of one process", hint="leave the launcher out")
            # Libraries print as they like; stdout is for the result alone.
            with (
                logging_to_stderr(verbose=job.talk.verbose, silent=not speaks),
                progress_on_stderr(check, quiet=job.talk.quiet or not speaks) as progress,
                redirect_stdout(sys.stderr),
            ):
                if not job.light:
                    _load(progress)
                result = job.run(progress)
    except BaseException as error:
        known = _failure(error, line)
        failure = known or _bug(error)
        if "--debug" in line:
            say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
        if place.count > 1:
            spoken = _fail_beside_others(error, failure, place, as_json)
        else:
            spoken = True
            _fail(failure, as_json)
        if spoken and known is None:
            raise
        return failure.exit_code
    if not result or not speaks:  # another process of the same launch reports
        return 0
    if result.get("ok") is False:
        return _finish_unverified(result, job, as_json)
    if as_json:
        say_json({"status": "ok", "code": 0, **result})
    else:
        say(job.show(result))
    return 0


def _load(progress: Report) -> None:
    """Import what takes seconds before anything else is seen of a run."""
    missing = [name for name in HEAVY if name not in sys.modules]
    if missing:
        check_process()
        stage = f"load {' and '.join(missing)}"
        progress(stage, 0, 1)
        for name in missing:
            importlib.import_module(name)
        progress(stage, 1, 1)


def _dashed(word: str) -> str:
    """Return a flag with dashes for underscores: the papers' code and lm-eval write --sparsity_ratio."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def _refuse_empty(line: Sequence[str]) -> None:
    """Refuse an empty word: nearly always the variable of a shell that was never set.

    Raises:
        UsageError: There is one; names the flag that it stands behind.
    """
    for before, word in pairwise(("", *line)):
        name, equals, value = word.partition("=")
        flag = before if before.startswith("-") else ""
        if word.startswith("--") and equals:
            flag, word = name, value
        if not word.strip():
            raise UsageError(
                f"{flag or 'an argument'} is empty: found {word!r}",
                hint="is a variable of the shell not set? give a value, or leave it out",
            )


def _failure(error: BaseException, line: Sequence[str]) -> StructpruneError | None:
    """Return the error as one of ours, or None when it is a bug."""
    if isinstance(error, StructpruneError):
        return error
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Interrupted(2)
    if isinstance(error, typer.TyperException):
        return UsageError(error.format_message(), hint=_hint(error, line))
    if _lacks_memory(error):
        return EnvironmentFailure(
            "out of memory", hint=TRAINING_HINT if line[0] == "recover" else MEMORY_HINT
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return EnvironmentFailure(
            f"{where}{os.strerror(error.errno)}", hint="check the disk, the path and the rights"
        )
    return None


def _hint(error: typer.TyperException, line: Sequence[str]) -> str:
    """Return what to write instead of what typer refused."""
    commands = typer.main.get_group(app).commands
    if line[0] not in commands:
        return nearest(line[0], commands)
    flags = {flag for one in commands[line[0]].params for flag in (*one.opts, *one.secondary_opts)}
    refused = getattr(error, "option_name", None)
    if refused is not None and refused not in flags:
        return ours_for(refused, line[0], sorted(flag for flag in flags if flag.startswith("-")))
    return f"`structprune {line[0]} --help` lists what it takes"


def _lacks_memory(error: BaseException) -> bool:
    """Tell whether an error comes from a lack of memory, also one that a library made its own of."""
    said = ("can't allocate memory", "Cannot allocate memory", "failed to map segment", "start new thread")
    cause: BaseException | None = error
    while cause is not None:
        # Known by its name, because torch is not imported for a line that needs none of it; torch's CPU
        # allocator and a library that does not fit when it is imported have no exception of their own.
        short = isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"
        if short or any(text in str(cause) for text in said):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _fail(failure: StructpruneError, as_json: bool) -> int:
    if as_json:
        say_json(error_json(failure))
    complain(failure)
    return failure.exit_code


def _fail_beside_others(
    error: BaseException, failure: StructpruneError, place: Launch, as_json: bool
) -> bool:
    """Say which of several processes failed, if no other says it and no signal ended this one; tell if so.

    The first process owes whoever reads its stdout an answer all the same.
    """
    meeting = sys.modules.get("structprune.meeting")  # before torch is imported they cannot have met
    with unstoppable():  # the launcher ends those that are left, and this one may have a word to say
        # On one machine all have the same command line.
        alike = isinstance(failure, UsageError) and place.local_rank > 0
        silent = isinstance(failure, Interrupted) or (meeting is not None and meeting.is_told(error)) or alike
        number = place.rank if failure.rank is None else failure.rank
        failure.message = f"rank {number}: {failure.message}"
        if as_json and place.rank == 0:
            say_json(error_json(failure))
        if not silent:
            complain(failure)
    return not silent


def _finish_unverified(result: Mapping[str, Any], job: Job, as_json: bool) -> int:
    """Print the figures of a folder that does not hold what it should, and the error."""
    failed = next((check for check in result.get("checks", []) if not check["ok"]), None)
    said = f"{failed['name']}: {failed['detail']}" if failed else "verification failed"
    failure = VerificationError(said, hint="the folder was changed or is incomplete; write it again")
    if as_json:
        say_json(error_json(failure, result))
    else:
        say(job.show(result))
    complain(failure)
    return failure.exit_code


def _bug(error: BaseException) -> StructpruneError:
    said = f"{type(error).__name__}: {error}"
    if (place := place_of(error)) is not None:
        hint = (
            "mend the method; if structprune brought it, report it with the traceback and `structprune env`"
        )
        return MethodError(f"{place}: {said}", hint=hint)
    return StructpruneError(
        said, hint="a bug in structprune: report it with the traceback and `structprune env`"
    )
