"""A folder of ours that no longer holds what was written: every command refuses it and names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import structprune
from structprune.checkpoint.manifest import MANIFEST, read_manifest
from structprune.checkpoint.writing import Writing
from structprune.errors import InputError
from structprune.proof.verify import verify
from structprune.storage.header import read_header
from structprune.storage.reader import CheckpointReader
from tests.conftest import Command
from tests.methods import TEXT
from tests.tiny import save_tiny

EVALUATION = {"text": TEXT, "windows": 1, "length": 32, "generations": False}
TENSOR = "model.layers.1.mlp.down_proj.weight"
PLAN = "structprune/plans/01-magnitude"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dense model, what a run made of it, and an adapter kept beside that."""
    root = tmp_path_factory.mktemp("made")
    save_tiny("llama", root / "dense", dtype=torch.bfloat16, shards=2)
    options = {"keep_scores": True, "sparsity": "2:4", "evaluate": EVALUATION}
    structprune.prune(root / "dense", root / "out", "magnitude", writing=Writing(reload=False), **options)
    structprune.recover(
        str(root / "out"),
        root / "adapter",
        structprune.RecoverOptions(
            data=TEXT, steps=4, length=32, rank=2, learning_rate=1e-2, keep_adapter=True
        ),
        evaluate=structprune.EvaluateOptions.model_validate(EVALUATION),
    )
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """Return a copy of it, to be damaged; the adapter's base is the copy."""
    shutil.copytree(made, tmp_path / "made")
    config = tmp_path / "made" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(made), str(tmp_path / "made")))
    forget(tmp_path / "made" / "adapter", "adapter_config.json")
    return tmp_path / "made"


def forget(folder: Path, name: str) -> None:
    """Take a file's entry out of the manifest, as a user does who changed the file on purpose."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["files"][name]
    (folder / MANIFEST).write_text(json.dumps(content))


def flip(path: Path, place: int) -> None:
    """Change the lowest bit of a byte."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def flip_weight(folder: Path) -> None:
    info = CheckpointReader(folder).tensors[TENSOR]
    flip(folder / info.file, info.start)


def flip_dtype(folder: Path) -> None:
    file = folder / CheckpointReader(folder).tensors[TENSOR].file
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F16" '))


def cut_weights(folder: Path) -> None:
    file = folder / CheckpointReader(folder).tensors[TENSOR].file
    file.write_bytes(file.read_bytes()[:-2])


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:200])


# What happens to a folder, and what the refusal then says of it.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped weight": (flip_weight, f"tensor '{TENSOR}' was changed after it was written"),
    "another dtype": (flip_dtype, "dtype"),
    "weights cut off": (cut_weights, "were written"),
    "config": (
        change("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        "config.json was changed",
    ),
    "tokenizer": (change("tokenizer.json", '"<s>"', '"<t>"'), "tokenizer.json was changed"),
    "template": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        "tokenizer_config.json is missing",
    ),
    "plan": (change(f"{PLAN}/plan.json", '"facts": {', '"facts": { '), "plan.json has"),
    "manifest cut off": (cut_manifest, "not valid JSON"),
    "manifest lost": (lambda folder: (folder / MANIFEST).unlink(), "incomplete"),
    "facts": (change(MANIFEST, '"method": "magnitude"', '"method": "magnituda"'), "does not match its seal"),
    "hash": (change(MANIFEST, '"weights": "', '"weights": "0'), "does not match its seal"),
    "adapter added": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "was added"),
    "weights added": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / "more.safetensors"),
        "was added",
    ),
}

FILE = ("--length", 32)
COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "inspect": lambda root: ("inspect", root / "out"),
    "evaluate": lambda root: ("evaluate", root / "out", "--text", TEXT, "--windows", 1, *FILE),
    "compare": lambda root: (
        *("evaluate", root / "dense", "--compare", root / "out"),
        *("--text", TEXT, "--windows", 1, *FILE),
    ),
    "evaluate adapter": lambda root: ("evaluate", root / "adapter", "--text", TEXT, "--windows", 1, *FILE),
    "prune": lambda root: ("prune", root / "out", root / "new", "--method", "magnitude", "--sparsity", 0.6),
    "dry run": lambda root: (
        *("prune", root / "out", root / "new", "--method", "magnitude", "--sparsity", 0.6),
        "--dry-run",
    ),
    "scores": lambda root: (
        *("prune", root / "dense", root / "new", "--method", "magnitude", "--sparsity", 0.6),
        *("--scores", root / "out"),
    ),
    "apply": lambda root: ("apply", root / "out", root / "new", "--plan", root / "out" / PLAN),
    "plan": lambda root: ("apply", root / "dense", root / "new", "--plan", root / "out"),
    "recover": lambda root: ("recover", root / "out", root / "new", "--data", TEXT, *FILE),
    "teacher": lambda root: (
        *("recover", root / "dense", root / "new", "--teacher", root / "out"),
        *("--data", TEXT, *FILE),
    ),
    "export": lambda root: ("export", root / "out", root / "new", "--to", "bitmask"),
}

# These take decisions from the folder, and look at none of its weights.
WEIGHTLESS = {"scores", "plan"}
ONLY_WEIGHTS = {"a flipped weight", "another dtype"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_command_refuses_a_damaged_folder_by_the_name_of_the_file(
    root: Path, command: Command, damage: str
) -> None:
    harm, said = DAMAGES[damage]
    harm(root / "out")
    for name, words in COMMANDS.items():
        if damage in ONLY_WEIGHTS and name in WEIGHTLESS:
            continue
        done = command(*words(root), "--json")
        assert done.code == 3, (name, done.err)
        assert said in done.json["error"]["message"], name
        assert done.json["error"]["hint"], name
        assert not (root / "new").exists(), name


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_proof_says_which_file_and_which_tensor(root: Path, damage: str) -> None:
    DAMAGES[damage][0](root / "out")
    failed = {check.name: check.detail for check in verify(root / "out", reload=False).failed}
    assert "manifest" in failed
    if damage == "a flipped weight":
        file = CheckpointReader(root / "out").tensors[TENSOR].file
        assert failed["manifest"].startswith(f"{file} was changed")
        assert failed["written"] == f"{file}: tensor '{TENSOR}' was changed after it was written"


def test_what_shapes_nothing_may_be_edited_and_what_a_user_adds_is_no_problem(
    root: Path, command: Command
) -> None:
    for name in ("README.md", "structprune/recipe.yaml", "structprune/report.json", "notes.txt"):
        (root / "out" / name).write_text("mine")
    assert command(*COMMANDS["inspect"](root)).code == 0
    assert command(*COMMANDS["evaluate"](root)).code == 0


def test_a_change_on_purpose_is_accepted_once_its_entry_is_gone(root: Path, command: Command) -> None:
    DAMAGES["config"][0](root / "out")
    hint = command(*COMMANDS["inspect"](root), "--json").json["error"]["hint"]
    assert f'delete its entry under "files" in {root / "out" / MANIFEST}' in hint
    forget(root / "out", "config.json")
    assert command(*COMMANDS["inspect"](root)).code == 0


def test_a_kept_adapter_is_evaluated_as_the_model_that_it_was_trained_to_be(
    root: Path, command: Command
) -> None:
    here = command(*COMMANDS["evaluate adapter"](root), "--json").json["perplexity"]
    model, _ = structprune.load(root / "adapter")
    model.save_pretrained(root / "merged")  # type: ignore[union-attr]
    for path in (root / "out").glob("tokenizer*"):
        shutil.copy(path, root / "merged")
    words = ("--text", TEXT, "--windows", 1, *FILE, "--json")
    merged = command("evaluate", root / "merged", *words).json["perplexity"]
    assert here == merged
    assert here != command("evaluate", root / "out", *words).json["perplexity"]
    compared = command("evaluate", root / "out", "--compare", root / "adapter", *words).json["perplexity"]
    ((_, one),), ((_, other),) = compared.items(), here.items()
    assert one["dense"] == other["model"]


class TestLoad:
    def test_checks_small_files_and_sizes_and_hashes_the_weights_when_asked(self, root: Path) -> None:
        structprune.load(root / "out", check=True)
        flip_weight(root / "out")
        structprune.load(root / "out")
        with pytest.raises(InputError, match=f"{TENSOR}' was changed"):
            structprune.load(root / "out", check=True)
        cut_weights(root / "out")
        with pytest.raises(InputError, match="were written"):
            structprune.load(root / "out")

    def test_refuses_a_changed_tokenizer_and_a_changed_base(self, root: Path) -> None:
        flip_weight(root / "out")
        with pytest.raises(InputError, match="was changed after it was written"):
            structprune.load(root / "adapter")
        DAMAGES["tokenizer"][0](root / "out")
        with pytest.raises(InputError, match=r"tokenizer\.json was changed"):
            structprune.load(root / "out")

    def test_says_that_there_is_nothing_to_check_a_plain_folder_with(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        structprune.load(root / "dense", check=True)
        assert f"no {MANIFEST} says what its weights were" in caplog.text


class TestTheManifest:
    def test_holds_the_hash_of_a_scan_and_of_every_tensor(self, made: Path) -> None:
        manifest = read_manifest(made / "out")
        scan = CheckpointReader(made / "out").scan()
        assert manifest is not None
        assert (manifest.weights, manifest.tensors) == (scan.weights, scan.hashes)

    def test_of_format_1_is_read_and_what_it_knows_is_checked(self, root: Path, command: Command) -> None:
        path = root / "out" / MANIFEST
        content = json.loads(path.read_text()) | {"format": 1}
        for key in ("weights", "tensors", "seal"):
            del content[key]
        path.write_text(json.dumps(content))
        flip_weight(root / "out")
        assert command(*COMMANDS["inspect"](root)).code == 0
        cut_weights(root / "out")
        assert command(*COMMANDS["inspect"](root)).code == 3


def test_the_proof_fails_where_a_tensor_was_changed_before_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = structprune.pipeline.prune  # type: ignore[attr-defined]
    write = module.write

    def tampered(source, work, plans, progress):  # type: ignore[no-untyped-def]
        write(source, work, plans, progress)
        path = work.folder / "model-00001-of-00003.safetensors"
        # A tensor that no plan names, and a value that the source does not have either.
        info = read_header(path).tensors["model.embed_tokens.weight"]
        flip(path, info.start)

    monkeypatch.setattr(module, "write", tampered)
    with pytest.raises(structprune.VerificationError, match=r"embed_tokens\.weight' was changed after"):
        structprune.prune(
            made / "dense",
            tmp_path / "out",
            "magnitude",
            sparsity=0.5,
            evaluate=EVALUATION,
            writing=Writing(reload=False),
        )
    assert not (tmp_path / "out").exists()


class TestPacked:
    @pytest.fixture(params=["2:4", "bitmask"])
    def packed(self, request: pytest.FixtureRequest, root: Path) -> Path:
        structprune.export(str(root / "out"), root / "packed", request.param)
        return root / "packed"

    def test_is_proved_by_the_same_promises_as_the_dense_folder(
        self, packed: Path, root: Path, command: Command
    ) -> None:
        done = command("verify", packed, "--against", root / "dense", "--json")
        assert done.code == 0, done.out
        dense = verify(root / "out", root / "dense", reload=False).as_json()
        for key in ("sparsity", "pattern", "parameters", "nonzero", "blocks", "stages"):
            assert done.json[key] == dense[key], key
        assert done.json["bytes"] < dense["bytes"]
        names = [check["name"] for check in done.json["checks"]]
        assert {"unpacked", "written", "masks", "count", "source"} <= set(names)
        assert "export" in done.json["checks"][-1]["detail"]

    def test_that_was_changed_is_refused_by_file_and_tensor(self, packed: Path, command: Command) -> None:
        (file,) = [
            path
            for path in packed.glob("packed-*")
            if any(name.startswith(f"{TENSOR}.") for name in read_header(path).tensors)
        ]
        flip(file, read_header(file).tensors[f"{TENSOR}.values"].start)
        done = command("verify", packed, "--json")
        assert done.code == 6
        failed = {check["name"]: check["detail"] for check in done.json["checks"] if not check["ok"]}
        assert failed["unpacked"].startswith(f"{file.name}: unpacks to other bytes")
        assert failed["written"] == f"{file.name}: tensor '{TENSOR}' was changed after it was written"
        assert command("export", packed, packed.parent / "back", "--to", "dense").code == 3

    def test_gives_back_a_folder_whose_tensors_are_known(self, packed: Path, root: Path) -> None:
        structprune.export(str(packed), root / "back", "dense")
        assert read_manifest(root / "back").weights == read_manifest(root / "out").weights  # type: ignore[union-attr]


class TestAnAdapter:
    def test_is_proved_by_its_files_its_base_and_what_merging_leaves(
        self, root: Path, command: Command
    ) -> None:
        done = command("verify", root / "adapter", "--json")
        assert done.code == 0, done.out
        base = verify(root / "out", reload=False).as_json()
        for key in ("sparsity", "pattern", "parameters", "nonzero"):
            assert done.json[key] == base[key], key
        assert [check["name"] for check in done.json["checks"]] == [
            *("manifest", "adapter", "base", "masks", "finite"),
        ]

    def test_with_a_changed_base_or_a_changed_factor_is_not_proved(
        self, root: Path, command: Command
    ) -> None:
        flip(root / "adapter" / "adapter_model.safetensors", -1)
        failed = [
            check for check in command("verify", root / "adapter", "--json").json["checks"] if not check["ok"]
        ]
        assert [check["name"] for check in failed] == ["manifest", "base"]
        assert command(*COMMANDS["evaluate adapter"](root)).code == 3
        shutil.rmtree(root / "out")
        assert command("verify", root / "adapter").code == 6

    @pytest.mark.parametrize(
        "words",
        [
            ("inspect", "adapter"),
            ("prune", "adapter", "new", "--method", "magnitude"),
            ("apply", "adapter", "new", "--plan", "out"),
            ("recover", "adapter", "new", "--data", TEXT),
            ("recover", "out", "new", "--data", TEXT, "--teacher", "adapter"),
            ("export", "adapter", "new", "--to", "bitmask"),
        ],
    )
    @pytest.mark.parametrize("kind", ["ours", "PEFT"])
    def test_is_refused_where_a_model_is_needed_and_the_hint_says_what_to_do(
        self, root: Path, command: Command, words: tuple[str, ...], kind: str
    ) -> None:
        if kind == "PEFT":
            shutil.rmtree(root / "adapter")
            (root / "adapter").mkdir()
            (root / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
            save_file({"x.lora_A.weight": torch.ones(1)}, root / "adapter" / "adapter_model.safetensors")
        places = ("adapter", "new", "out")
        done = command(*(root / word if word in places else word for word in words), "--json")
        assert done.code == 3, done.out
        assert "this is an adapter" in done.json["error"]["message"]
        assert "structprune recover" in done.json["error"]["hint"]


def test_ignored_keys_are_not_handed_on_and_all_else_stays_as_it_is(
    made: Path, tmp_path: Path, command: Command
) -> None:
    source = tmp_path / "dense"
    shutil.copytree(made / "dense", source)
    before = (source / "config.json").read_text()
    content = json.loads(before)
    content = {"_attn_implementation_internal": "evil/repo", **content, "trust_remote_code": True}
    content["inner_config"] = {"_attn_implementation_internal": "evil/repo", "kept": 1e-06}
    (source / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    done = command("prune", source, tmp_path / "out", "--method", "magnitude", "--sparsity", 0.5)
    assert done.code == 0, done.err
    expected = {**json.loads(before), "inner_config": {"kept": 1e-06}}
    assert (tmp_path / "out" / "config.json").read_text() == json.dumps(expected, indent=2) + "\n"
    assert done.err.count("'_attn_implementation_internal' is ignored") == 1
    assert verify(tmp_path / "out", source, reload=False).ok
    # Without such keys the file is the source's, byte for byte, however it is spelled.
    (source / "config.json").write_text(before.replace("  ", "\t"))
    structprune.prune(
        source,
        tmp_path / "own",
        "magnitude",
        sparsity=0.5,
        evaluate=EVALUATION,
        writing=Writing(reload=False),
    )
    assert (tmp_path / "own" / "config.json").read_bytes() == (source / "config.json").read_bytes()
