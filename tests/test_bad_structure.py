"""Units that cannot leave, asked for on the command line: exit 2, one error that names the key, a way out."""

from pathlib import Path

import pytest

from structprune.errors import UsageError
from structprune.pruners.catalogue import find
from tests.conftest import Command
from tests.methods import STRUCTURE_METHODS, TEXT, home, short_runs
from tests.specimens import Finished, no_fresh_process
from tests.tiny import save_tiny, tiny

BIASED = ("--set", "native=uniform", "--set", "repair=bias")
KV = ("--set", "units=kv_group")
TABLE = ("--set", "budget.name=table")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in {"llama", "mistral", "gpt2", "gemma2", *(home(one).family for one in STRUCTURE_METHODS)}:
        save_tiny(family, folder / family)
    return folder


def words(models: Path, family: str, method: str, *more: str) -> list[object]:
    found: list[object] = ["prune", models / family, "out", "--method", method, *more]
    return [*found, "--calibration", TEXT, "--samples", "2", "--length", "16", "--json"]


@pytest.mark.parametrize("method", STRUCTURE_METHODS)
@pytest.mark.parametrize(
    ("share", "said"),
    [
        ("-0.1", "-0.1 is not a sparsity"),
        ("1", "would remove everything"),
        ("1.5", "1.5 is not a sparsity"),
        ("nan", "nan is not a sparsity"),
        ("inf", "inf is not a sparsity"),
        ("50", "did you mean 0.5?"),
        ("2:4", "found '2:4', this method takes a fraction removed"),
        ("0.001", "sparsity: 0.001"),
        ("0.995", "sparsity: 0.995"),
    ],
)
def test_a_share_that_no_units_have(
    method: str, share: str, said: str, models: Path, command: Command, refused: None
) -> None:
    done = command(*words(models, home(method).family, method, f"--sparsity={share}"))
    check(done, said, "hint: ")


CASES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    # What rounds to nothing names what would not.
    "no group": (
        "llama",
        "wanda_sp",
        (*KV, "--sparsity=0.1"),
        ("rounds to nothing", "1 of 2 key-value groups"),
    ),
    "no block": (
        "llama",
        "block_drop",
        ("--sparsity=0.1",),
        ("0.1 of 2 blocks rounds to none", "0.5 or more"),
    ),
    "no attention": ("llama", "attention_skip", ("--sparsity=0.1",), ("rounds to none", "0.5 or more")),
    "no expert": (
        "mixtral",
        "expert_drop",
        ("--sparsity=0.1",),
        ("less than half an expert", "0.25 (3 stay)"),
    ),
    # All asked away.
    "all groups": ("llama", "flap", (*KV, "--sparsity=0.9"), ("more than may leave", "at most 0.5")),
    "all units": ("llama", "wanda_sp", ("--sparsity=0.99",), ("more than may leave", "at most 0.7937")),
    "all blocks": ("llama", "block_drop", ("--set", "count=2"), ("2 blocks are to leave", "one has to stay")),
    "these blocks": ("llama", "block_drop", ("--set", "drop=0-1"), ("at most 1 can", "one has to stay")),
    "nearly all blocks": ("llama", "block_drop", ("--sparsity=0.9",), ("one has to stay", "at most 0.5")),
    "all attentions": (
        "llama",
        "attention_skip",
        ("--set", "drop=0-1"),
        ("at most 1 can", "one has to stay"),
    ),
    "all experts": ("mixtral", "expert_drop", ("--sparsity=0.9",), ("a token is routed to 2", "at most 0.5")),
    # Budgets that are too tight.
    "parameters": ("llama", "flap", ("--set", "target_params=1"), ("cannot be reached", "54,208 to 102,976")),
    "too many": ("llama", "wanda_sp", ("--set", "target_params=10M"), ("cannot be reached", "53,952 to")),
    "bytes": ("llama", "wanda_sp", ("--set", "target_memory=1kB"), ("1,000 bytes left", "215,808 to")),
    "two goals": ("llama", "flap", ("--sparsity=0.3", "--set", "target_params=80k"), ("give one of them",)),
    "table": (
        "llama",
        "wanda_sp",
        (*TABLE, "--set", "budget.channels=97"),
        ("block 0, which has 96", "1 to 96"),
    ),
    "table of none": ("llama", "wanda_sp", (*TABLE, "--set", "budget.kv_groups=0"), ("from 1 on",)),
    "empty table": ("llama", "wanda_sp", ("--set", "budget=table"), ("needs kv_groups, channels or both",)),
    # Lists of blocks.
    "skip all": ("llama", "wanda_sp", ("--set", "skip=0-1"), ("no block that is not skipped", "skip fewer")),
    "skip all blocks": ("llama", "block_drop", ("--set", "skip=0-1"), ("no block may leave", "skip fewer")),
    "skip all mixtures": ("mixtral", "expert_drop", ("--set", "skip=0-1"), ("is skipped", "skip fewer")),
    "no such block": ("llama", "flap", ("--set", "skip=9"), ("no block 9, the model has 2", "0 to 1")),
    "no such blocks": ("llama", "block_drop", ("--set", "drop=5"), ("no block 5, the model has 2", "0 to 1")),
    "backwards": ("llama", "cfsp", ("--set", "skip=1-0"), ("block range '1-0'", "such as '0-3'")),
    "negative": ("llama", "llm_pruner", ("--set", "skip=-1"), ("block range '-1'", "such as '0-3'")),
    "dropped and skipped": (
        "llama",
        "block_drop",
        ("--set", "drop=1", "--set", "skip=1"),
        ("drop: block 1 has no", "skipped"),
    ),
    # Widths and kinds of unit.
    "multiple of 0": ("llama", "wanda_sp", ("--set", "multiple=0"), ("multiple: found 0", "equal to 1")),
    "too wide a multiple": (
        "llama",
        "wanda_sp",
        ("--set", "units=channel", "--set", "multiple=97"),
        ("no other number of 96 channels",),
    ),
    "groups of three": (
        "llama",
        "wanda_sp",
        (*KV, "--set", "kv_multiple=3"),
        ("no other number of 2 key-value",),
    ),
    "no kind": ("llama", "wanda_sp", ("--set", "units=layer"), ("found 'layer', expected 'kv_group'",)),
    "no kinds": ("llama", "block_drop", ("--set", "units=[]"), ("units: found nothing", "at least one")),
    "an empty key": ("llama", "flap", ("--set", "units="), ("units: found nothing", "at least one")),
    "no attentions": ("llama", "attention_skip", ("--set", "units=[]"), ("units: found nothing", "at least")),
    "only one may": (
        "llama",
        "block_drop",
        ("--set", "skip=1", "--sparsity=0.1"),
        ("0.1 of 1 blocks rounds to none", "hint: ask for count: 1\n"),
    ),
    "a kind twice": ("llama", "wanda_sp", ("--set", "units=kv_group,kv_group"), ("names one twice",)),
    "a block and its part": ("llama", "block_drop", ("--set", "units=block,mlp"), ("beside its own parts",)),
    "no room for a bias": ("mistral", "wanda_sp", BIASED, ("no place for the bias of", "least_squares")),
    "no room for heads": ("gpt2", "wanda_sp", ("--set", "native=uniform"), ("cannot say the heads", "pad")),
    "two ways": ("llama", "flap", ("--uniform", "--pad"), ("--uniform and --pad", "give one of them")),
    # Families that a method does not know.
    "no mixture": ("llama", "expert_drop", ("--sparsity=0.5",), ("'llama' has no mixture", "mixtral")),
    "no channels": ("mixtral", "cfsp", ("--sparsity=0.3",), ("no block that is not skipped has channel",)),
    "another family": ("gpt2", "attention_skip", ("--sparsity=0.5",), ("gpt2", "llama")),
}


def test_of_one_block_none_can_leave() -> None:
    model = tiny("llama", depth=1)
    with pytest.raises(UsageError, match="the model has 1 block left, and one has to stay") as said:
        find("block_drop")().forecast(model)
    assert "narrower" in str(said.value.hint)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_leave(case: str, models: Path, command: Command, refused: None) -> None:
    family, method, more, told = CASES[case]
    check(command(*words(models, family, method, *more)), *told)


def check(done: Finished, *told: str) -> None:
    """Check that a command was refused with one clear error, and left nothing behind."""
    assert done.code == 2, done.err
    assert done.json["error"]["hint"]
    lines = done.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], lines
    for part in told:
        assert part in done.err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("share", "method", "left"), [("0", "flap", 1.0), ("0", "block_drop", 1.0), ("50%", "block_drop", 0.5)]
)
def test_nothing_and_percents_are_no_mistakes(
    share: str, method: str, left: float, models: Path, command: Command, refused: None
) -> None:
    with short_runs(), no_fresh_process():
        done = command(*words(models, "llama", method, f"--sparsity={share}"))
    assert done.code == 0, done.err
    assert done.json["stages"][0]["measured"] == 1 - left


SHARED = [
    ("block_drop", "llama"),
    ("attention_skip", "llama"),
    ("llm_pruner", "llama"),
    ("expert_drop", "mixtral"),
]


@pytest.mark.parametrize(("method", "family"), SHARED)
@pytest.mark.parametrize("what", ["parameter", "module", "block"])
def test_what_two_blocks_share_cannot_leave(method: str, family: str, what: str) -> None:
    """Only a model in memory can say so: no family's configuration ties its blocks."""
    model = tiny(family, depth=4)
    first, second, *_ = model.model.layers
    if what == "parameter":
        second.self_attn.o_proj.weight = first.self_attn.o_proj.weight
    elif what == "module":
        second.mlp = first.mlp
    else:
        model.model.layers[1] = first
    with pytest.raises(UsageError, match=r"layers\.1\..*: is the same tensor as .*layers\.0\.") as caught:
        find(method)(sparsity=0.5).forecast(model)
    assert caught.value.hint and "skip" in caught.value.hint
    if what != "block":  # protected blocks may share what they like
        find(method)(sparsity=0.5, skip="0-1").forecast(model)
