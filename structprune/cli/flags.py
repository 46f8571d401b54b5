"""The flags that several commands share, and how a command takes whole groups of them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

import structprune
from structprune.cli.terminal import Report
from structprune.errors import UsageError
from structprune.recipe.options import Where, sparsity_of

if TYPE_CHECKING:
    from structprune.checkpoint.writing import Unchanged, Writing
    from structprune.models.opening import Opening


@dataclass(frozen=True)
class Talk:
    """How much a command says; `main` also finds two of them in a line that fails."""

    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say no progress, only warnings.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is done.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


@dataclass(frozen=True)
class Job:
    """What a command line asks for; it runs once all of the line has been understood.

    Attributes:
        run: Does it, telling its progress, and returns the JSON object.
        show: Returns that object as text for people.
        light: It needs neither torch nor transformers, which take seconds to be loaded.
        talk: How much is said meanwhile.
    """

    run: Callable[[Report], Mapping[str, Any]]
    show: Callable[[Mapping[str, Any]], str]
    light: bool = False
    talk: Talk = field(default_factory=Talk)


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a hub name, or 'demo' or 'demo-vision'.")
]
ModelOrRecipe = Annotated[
    str, typer.Argument(metavar="MODEL|RECIPE.yaml", help="A model, or a recipe of this command.")
]
Output = Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write.")]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="DIR", help="Its tokenizer, where MODEL has none or another is meant.")
]
Seed = Annotated[int | None, typer.Option(help="Decides what is drawn (default 0)")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps (default auto)")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16 (default auto)")]
Length = Annotated[
    int | None,
    typer.Option(
        "--length", "--seqlen", help="Tokens per sequence (default as many as the model takes, 2048 at most)"
    ),
]
Samples = Annotated[int | None, typer.Option("--samples", "--nsamples", help="Sequences (default 128)")]
Column = Annotated[str | None, typer.Option(help="Which column holds the text (default text)")]
Batch = Annotated[int | None, typer.Option(help="Sequences per forward (default 8)")]
MaxRatio = Annotated[float | None, typer.Option(help="Exit 5 above this multiple of dense perplexity.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
NoEvaluate = Annotated[
    bool,
    typer.Option(
        "--no-evaluate",
        help="Measure nothing; --set evaluate.generations=false only leaves out the texts that both "
        "models continue, which take long on a slow machine.",
    ),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of a recipe; repeatable.")
]
Config = Annotated[
    Path | None, typer.Option("--config", "-C", metavar="FILE", help="A recipe; flags win over it.")
]
Stream = Annotated[bool | None, typer.Option("--stream/--resident", help="One block in memory, or all.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]


@dataclass(frozen=True)
class OpeningFlags:
    """What is accepted of a model's files."""

    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False
    allow_external_symlinks: Annotated[
        bool, typer.Option("--allow-external-symlinks", help="Accept files that are links out of the folder.")
    ] = False

    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity in the weights.")
    ] = False
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse unknown tensors, as a command that writes always does.")
    ] = False

    def opening(
        self,
        *,
        stream: bool | None = None,
        where: Where | None = None,
        tokenizer: str | None = None,
        writes: bool = False,
        from_dense: bool = False,
    ) -> "Opening":
        """Return how a model is opened.

        Args:
            stream: One block in memory, or all.
            where: In which dtype and on which device.
            tokenizer: The folder of another tokenizer than the model's.
            writes: A model is written, for which unknown tensors are always refused.
            from_dense: A model that is pruned already is refused.
        """
        return structprune.Opening(
            where.dtype if where else "auto",
            where.device if where else "auto",
            stream,
            self.trust_remote_code,
            self.allow_external_symlinks,
            from_dense,
            writes or self.strict,
            self.allow_nonfinite,
            tokenizer,
        )


@dataclass(frozen=True)
class WritingFlags:
    """How the output is written."""

    out: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="The same as OUT.")] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT once the new result is complete.")
    ] = False
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")] = False
    link: Annotated[bool, typer.Option("--link", help="Hard links for weight files that do not change.")] = (
        False
    )
    refer: Annotated[
        bool, typer.Option("--refer", help="No weights, only where they are; structprune alone opens it.")
    ] = False

    def writing(self) -> "Writing":
        """Return how a result is written.

        Raises:
            UsageError: Two flags exclude each other.
        """
        if self.link and self.refer:
            raise UsageError("--link and --refer are two ways to leave weights out", hint="give one of them")
        unchanged: Unchanged = "link" if self.link else "refer" if self.refer else "copy"
        return structprune.Writing(overwrite=self.overwrite, restart=self.restart, unchanged=unchanged)

    def output(self, first: Path | None) -> Path | None:
        """Return OUT, which either stands behind MODEL or is given by its flag.

        Raises:
            UsageError: Both are given.
        """
        if first is not None and self.out is not None:
            raise UsageError(f"two outputs: {first} and --output {self.out}", hint="give one of them")
        return first or self.out

    def folder(self, first: Path | None) -> Path:
        """Return OUT.

        Raises:
            UsageError: None is given, or two.
        """
        output = self.output(first)
        if output is None:
            raise UsageError("OUT is missing", hint="give the folder to write after MODEL, or as -o OUT")
        return output


@dataclass(frozen=True)
class MethodFlags:
    """Which method prunes, and how much it removes."""

    method: Annotated[
        str | None,
        typer.Option("--method", "--prune-method", help="A method; `structprune methods` lists them."),
    ] = None
    sparsity: Annotated[
        str | None, typer.Option(help="Removed: 0.5 or 50%; or N of M kept: 2:4; several: 0.3,0.5.")
    ] = None
    sparsity_ratio: Annotated[float | None, typer.Option(help="The fraction, in Wanda's words.")] = None
    sparsity_type: Annotated[str | None, typer.Option(help="unstructured or N:M, in Wanda's words.")] = None
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUE", help="Visual tokens kept: keep_ratio=0.25; several: 0.1,0.25."),
    ] = None

    def keys(self) -> dict[str, object]:
        """Return the keys of a recipe that they are."""
        first = self.sparsity.split(",")[0] if self.sparsity else None
        share = sparsity_of(first, ratio=self.sparsity_ratio, kind=self.sparsity_type)
        name, values = self._kept()
        return {
            "prune.method": self.method,
            "prune.sparsity": share,
            "prune.target": {name: values[0]} if values else None,
        }

    def goals(self) -> list[float | str]:
        """Return the goals of which each gets a run of its own; none where there is only one."""
        several = self.sparsity.split(",") if self.sparsity else []
        found = [sparsity_of(text) or 0.0 for text in several] or self._kept()[1]
        return [] if len(found) < 2 else found

    def _kept(self) -> tuple[str, list[float | str]]:
        """Return of what how much is kept, once or several times.

        Raises:
            UsageError: It is not said as one name with values.
        """
        if self.target is None:
            return "", []
        name, _, values = self.target.partition("=")
        try:
            # A count is a whole number, and refused otherwise.
            return name.strip(), [
                int(one) if one.strip().isdecimal() else float(one) for one in values.split(",")
            ]
        except ValueError:
            raise UsageError(
                f"--target {self.target!r:.60}: expected a name and numbers",
                hint="such as --target keep_ratio=0.25, or --target tokens=16,64 for a run of each",
            ) from None


@dataclass(frozen=True)
class DetailFlags:
    """Which linears a method looks at, and how what it leaves is stored."""

    include: Annotated[list[str] | None, typer.Option(help="Prune only linears whose name matches.")] = None
    exclude: Annotated[list[str] | None, typer.Option(help="Leave linears dense whose name matches.")] = None
    fold: Annotated[bool, typer.Option("--fold", help="Write products as dense matrices.")] = False
    uniform: Annotated[
        bool, typer.Option("--uniform", help="All blocks equally wide: the family's own class opens it.")
    ] = False
    pad: Annotated[bool, typer.Option("--pad", help="So, too, with zeros up to the widest block.")] = False
    keep_scores: Annotated[bool, typer.Option("--keep-scores", help="Keep scores in the plan.")] = False

    def keys(self) -> dict[str, object]:
        """Return the keys of a recipe that they are.

        Raises:
            UsageError: Two exclude each other.
        """
        if self.uniform and self.pad:
            raise UsageError("--uniform and --pad are two ways to the same", hint="give one of them")
        return {
            "prune.fold": self.fold or None,
            "prune.native": "pad" if self.pad else "uniform" if self.uniform else None,
            "prune.keep_scores": self.keep_scores or None,
            "prune.include": self.include or None,
            "prune.exclude": self.exclude or None,
        }


def command(function: Callable[..., Job]) -> Callable[..., Job]:
    """Spell out the flags of a command.

    A parameter whose type is a dataclass stands for a group of flags, one for each field; every command has
    those of `Talk` as well.
    """
    groups: dict[str, Any] = {"talk": Talk}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if is_dataclass(hints[parameter.name]):
            groups[parameter.name] = hints[parameter.name]
            parameters += _flags_of(hints[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in [*parameters, *_flags_of(Talk)]]

    def run(**given: Any) -> Job:
        values = {
            name: group(**{one.name: given.pop(one.name) for one in fields(group)})
            for name, group in groups.items()
        }
        talk = values.pop("talk")
        return replace(function(**given, **values), talk=talk)

    run.__doc__, run.__name__ = function.__doc__, function.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _flags_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name]
        )
        for one in fields(group)
    ]
