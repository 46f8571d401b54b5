"""Weights stored as products: from the command to the folder that others open; and what is refused."""

import importlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import structprune
from structprune.calibration.collect import collect_inputs
from structprune.calibration.statistics import InputSums, Parts
from structprune.checkpoint.export import export
from structprune.checkpoint.manifest import write_manifest
from structprune.checkpoint.plans import plans_of
from structprune.errors import EnvironmentFailure, InputError, UsageError
from structprune.models.arch import all_linears, blocks
from structprune.models.modules import FactoredLinear
from structprune.models.opening import Opening
from structprune.models.outputs import logits
from structprune.models.streamed import open_model
from structprune.models.walk import Walk
from structprune.progress import silent
from structprune.proof import fresh_process as fresh
from structprune.proof.verify import verify
from structprune.pruners.weight.armor import Armor
from structprune.pruners.weight.sparsegpt import Sparsegpt
from structprune.pruners.weight.wanda import Wanda
from structprune.storage.reader import CheckpointReader
from tests.methods import QUICK, short_runs
from tests.tiny import save_tiny, tiny, tokens

PLAIN = ("llama", "qwen2", "qwen3")  # qwen2 has biases; in qwen3 a head is wider than its share
VISION = ("llava", "qwen2_5_vl")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    with short_runs():
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, dict[str, Any]]]:
    """Return source, pruned folder and report of each family."""
    root, made = tmp_path_factory.mktemp("armor"), {}
    for family in PLAIN:
        source = save_tiny(family, root / family)
        report = structprune.prune(source, root / f"{family}-out", Armor(rounds=2), **QUICK)
        made[family] = source, root / f"{family}-out", report
    return made


@pytest.fixture(scope="module")
def reloaded(written: dict[str, tuple[Path, Path, dict[str, Any]]]) -> dict[str, tuple[Any, Tensor]]:
    """Return what plain transformers made of each folder in a fresh process, and our own logits."""
    jobs, ours = [], []
    for _, folder, _ in written.values():
        model, _ = structprune.load(folder)
        ids = fresh.probe(model.config)
        jobs.append(fresh.ReloadJob(folder, ids, Opening(dtype="float32", trust_remote_code=True)))
        ours.append(logits(model, {"input_ids": ids}))
    return dict(zip(written, zip(fresh.reload(jobs), ours, strict=True), strict=True))


def edit(folder: Path, name: str, change: Any) -> None:
    """Change one tensor of a folder's only weight file, and sign the folder again."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})


def data(model: Any, count: int = 2, length: int = 32) -> list[dict[str, Tensor]]:
    return [tokens(model, batch=2, length=length, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("family", PLAIN)
class TestAFolder:
    def test_opens_with_structprune_in_memory_and_streamed(
        self, family: str, written: dict[str, tuple[Path, Path, dict[str, Any]]]
    ) -> None:
        source, folder, report = written[family]
        assert report["verification"]["ok"] and report["sparsity"] == 0.5 and report["pattern"] == "2:4"
        resident, _ = structprune.load(folder)
        streamed, _ = structprune.load(folder, Opening(stream=True))
        factored = [one for one in resident.modules() if isinstance(one, FactoredLinear)]
        assert len(factored) == 14
        probe = {"input_ids": fresh.probe(resident.config)}
        assert torch.equal(logits(resident, probe), logits(streamed, probe))
        # and it is what calibrating and applying in memory gives
        assert not torch.equal(logits(resident, probe), logits(open_model(source), probe))
        assert all((one.core.weight == 0).view(-1, 4).sum(dim=1).eq(2).all() for one in factored)

    def test_opens_with_plain_transformers_in_a_fresh_process(
        self,
        family: str,
        written: dict[str, tuple[Path, Path, dict[str, Any]]],
        reloaded: dict[str, tuple[Any, Tensor]],
    ) -> None:
        child, ours = reloaded[family]
        assert child.error == "" and child.missing == () and child.same_with_cache is not False
        assert child.loader.startswith("transformers")
        assert torch.equal(child.logits, ours)

    def test_passes_verify_against_its_source(
        self, family: str, written: dict[str, tuple[Path, Path, dict[str, Any]]]
    ) -> None:
        source, folder, _ = written[family]
        found = verify(folder, source, reload=False)
        assert found.ok, found.failed
        assert found.sparsity == 0.5 and found.pattern == "2:4"

    def test_the_overhead_is_the_formulas(
        self, family: str, written: dict[str, tuple[Path, Path, dict[str, Any]]]
    ) -> None:
        source, folder, report = written[family]
        model, _ = structprune.load(folder)
        more = sum(
            one.out_features * one.left.shape[1] + one.in_features * one.right.shape[1]
            for one in model.modules()
            if isinstance(one, FactoredLinear)
        )
        dense, ours = (
            sum(tensor.nbytes for tensor in load_file(where / "model.safetensors").values())
            for where in (source, folder)
        )
        assert ours - dense == 4 * more  # float32
        assert report["parameters"]["dense"] == sum(one.numel() for one in open_model(source).parameters())


class TestTrust:
    def test_verify_runs_our_own_file_in_a_fresh_process_and_says_what_it_loads_in(
        self, written: dict[str, tuple[Path, Path, dict[str, Any]]]
    ) -> None:
        source, folder, _ = written["llama"]
        found = verify(folder, source)
        assert found.ok, found.failed
        assert any("AutoModelForCausalLM" in loader for loader in found.loads_in)

    def test_transformers_refuses_it_without_trust(
        self, written: dict[str, tuple[Path, Path, dict[str, Any]]]
    ) -> None:
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModelForCausalLM.from_pretrained(written["llama"][1], trust_remote_code=False)

    def test_structprune_never_runs_the_file_in_the_folder(
        self, written: dict[str, tuple[Path, Path, dict[str, Any]]], tmp_path: Path
    ) -> None:
        source, good, _ = written["llama"]
        folder, sentinel = shutil.copytree(good, tmp_path / "out"), tmp_path / "executed"
        (code,) = folder.glob("*.py")
        code.write_text(f"open({str(sentinel)!r}, 'w')\nraise SystemExit(3)\n")
        with pytest.raises(InputError, match=code.name):
            structprune.load(folder)
        _sign(folder)
        modules = set(sys.modules)
        probe = {"input_ids": fresh.probe(open_model(source).config)}
        expected = logits(structprune.load(good)[0], probe)
        for stream in (False, True):
            model, _ = structprune.load(folder, Opening(stream=stream))
            assert torch.equal(logits(model, probe), expected)
        for stream in (False, True):
            found = verify(folder, source, opening=Opening(stream=stream))
            # The fresh process runs a file that we generate, and finds the right logits with it.
            assert [check.name for check in found.failed] == ["modelling file"]
            assert any(check.name == "reload" and check.ok for check in found.checks)
        structprune.inspect(str(folder))
        assert not sentinel.exists()
        assert not any(code.stem in name for name in set(sys.modules) - modules)

    @pytest.mark.parametrize("former", [False, True], ids=["text", "names"])
    def test_what_an_earlier_version_wrote_is_told_and_every_run_renews_it(
        self, former: bool, written: dict[str, tuple[Path, Path, dict[str, Any]]], tmp_path: Path
    ) -> None:
        source, good, _ = written["llama"]
        folder, out = shutil.copytree(good, tmp_path / "old"), tmp_path / "new"
        (code,) = folder.glob("*.py")
        text, config = code.read_text(), (folder / "config.json").read_text()
        code.write_text(f"# of an earlier version\n{text}")
        if former:  # what folders of products were called before blocks could be cut
            code = code.rename(folder / "modeling_factored.py")
            config = config.replace("modeling_pruned.Pruned", "modeling_factored.Factored")
            (folder / "config.json").write_text(config.replace('"pruned_llama"', '"factored_llama"'))
        _sign(folder)
        found = verify(folder, source)
        (failed,) = found.failed if not former else [row for row in found.failed if row.name != "side files"]
        assert failed.name == "modelling file"
        assert failed.detail.startswith(f"{code.name}: is not the file")
        assert f"`structprune apply DENSE NEW --plan {folder}`" in failed.detail
        assert any(check.name == "reload" and check.ok for check in found.checks)

        out.mkdir()
        export(CheckpointReader(folder), out, silent)
        assert (out / "modeling_pruned.py").read_text() == text
        assert json.loads((out / "config.json").read_text()) == json.loads((good / "config.json").read_text())
        if not former:
            assert (out / "config.json").read_bytes() == (good / "config.json").read_bytes()

    def test_the_file_is_ours_to_the_letter(
        self, written: dict[str, tuple[Path, Path, dict[str, Any]]]
    ) -> None:
        (code,) = written["llama"][1].glob("*.py")
        text = code.read_text()
        assert text.startswith(
            Path(importlib.import_module("structprune.models.modules").__file__).read_text()
        )
        assert "structprune" not in {
            line.split()[1].partition(".")[0]
            for line in text.splitlines()
            if line.startswith(("import ", "from "))
        }
        compile(text, code.name, "exec")
        config = json.loads((written["llama"][1] / "config.json").read_text())
        assert config["factored_linears"][Q] == [64, 64]


class TestDamage:
    @pytest.mark.parametrize("part", ["left", "right", "core.weight"])
    def test_a_changed_part_is_found(
        self, part: str, written: dict[str, tuple[Path, Path, dict[str, Any]]], tmp_path: Path
    ) -> None:
        source, good, _ = written["llama"]
        folder = shutil.copytree(good, tmp_path / "out")
        edit(folder, f"{Q}.{part}", lambda value: value * 1.5)
        assert "manifest" in {check.name for check in verify(folder, source, reload=False).failed}
        # also where somebody signed the folder again
        _sign(folder)
        failed = verify(folder, source, reload=False).failed
        assert [check.name for check in failed] == ["values"]
        assert f"{Q}.{part}" in failed[0].detail

    def test_a_zero_of_the_core_that_came_back_is_found(
        self, written: dict[str, tuple[Path, Path, dict[str, Any]]], tmp_path: Path
    ) -> None:
        source, good, _ = written["llama"]
        folder = shutil.copytree(good, tmp_path / "out")
        edit(folder, f"{Q}.core.weight", lambda value: value.masked_fill(value == 0, 0.5))
        _sign(folder)
        assert {check.name for check in verify(folder, source, reload=False).failed} >= {"masks", "count"}

    def test_a_part_that_is_missing_is_found(
        self, written: dict[str, tuple[Path, Path, dict[str, Any]]], tmp_path: Path
    ) -> None:
        source, good, _ = written["llama"]
        folder = shutil.copytree(good, tmp_path / "out")
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"{Q}.left"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        found = verify(folder, source, reload=False, written={})
        assert not found.ok and f"{Q}.left" in found.failed[0].detail


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_it_is_an_ordinary_model_without_zeros(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    report = structprune.prune(source, tmp_path / "out", Armor(rounds=2, fold=True), **QUICK)
    assert report["verification"]["ok"]
    assert report["sparsity"] == report["stages"][0]["reachable"] == 0
    assert not list((tmp_path / "out").glob("*.py"))
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours, _ = structprune.load(tmp_path / "out")
    probe = {"input_ids": fresh.probe(ours.config)}
    assert torch.equal(logits(plain, probe), logits(ours, probe))
    assert not any(int((one.weight == 0).sum()) for block in all_linears(ours) for one in block)


@pytest.mark.parametrize("family", VISION)
def test_a_vision_language_model_is_refused_by_name_and_folded_it_works(family: str) -> None:
    model = tiny(family)
    with pytest.raises(UsageError, match=r"^model\.language_model\..*a vision-language model's .*--fold"):
        Armor(rounds=1).calibrate(model, data(model))
    pruner = Armor(rounds=1, fold=True)
    plan = pruner.calibrate(model, data(model))
    assert any(key.kind == "value" for key in plan)


def test_folded_and_stored_as_products_it_is_the_same_function() -> None:
    probe = tokens(tiny("qwen2"), seed=5)
    results = []
    for fold in (False, True):
        model = tiny("qwen2")
        pruner = Armor(rounds=2, fold=fold)
        results.append(logits(pruner.apply(model, pruner.calibrate(model, data(model))), probe))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


class TestSizes:
    def test_a_wrapper_that_does_not_divide_is_refused_by_the_linears_name(self) -> None:
        model = tiny("llama")
        with pytest.raises(UsageError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*48") as raised:
            Armor(wrapper_size=48).calibrate(model, data(model))
        assert "indivisible=dense" in raised.value.hint

    def test_a_pattern_that_does_not_divide_is_refused_by_the_linears_name(self) -> None:
        model = tiny("llama")
        for pruner in (Armor(sparsity="3:5"), Wanda(sparsity="3:5")):
            with pytest.raises(UsageError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*5"):
                pruner.calibrate(model, data(model))

    def test_indivisible_linears_are_left_dense_and_told_when_asked(self, tmp_path: Path) -> None:
        source = save_tiny("llama", tmp_path / "dense")
        # 32 divides 64 and 96, but 64 divides neither the 96 of the feed-forward nor the 32 of k and v
        pruner = Armor(rounds=1, wrapper_size=64, indivisible="dense")
        report = structprune.prune(source, tmp_path / "out", pruner, **QUICK)
        assert report["verification"]["ok"]
        (plan,) = plans_of(tmp_path / "out")
        left = {label.rpartition(".")[2] for label in plan.facts["left_dense"]}
        assert left == {"k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
        assert all("64" in reason for reason in plan.facts["left_dense"].values())
        saved, before = (load_file(tmp_path / where / "model.safetensors") for where in ("out", "dense"))
        assert torch.equal(
            saved["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
        )
        assert f"{Q}.core.weight" in saved

    def test_a_fraction_is_refused(self) -> None:
        with pytest.raises(ValueError, match="this method needs a pattern"):
            Armor(sparsity=0.5)


class TestScarceData:
    def test_experts_that_few_tokens_reached_are_reported(self) -> None:
        model = tiny("mixtral")
        plan = Sparsegpt(skip="1").calibrate(model, [tokens(model, batch=1, length=16)])
        scarce = plan.blocks[0].facts["scarce"]
        assert all("experts" in label for label in scarce)
        assert sum(count for label, count in scarce.items() if "gate_up" in label) == 32
        fewer = {label: tokens for label, tokens in scarce.items() if tokens < 64}
        assert fewer == scarce

    @pytest.mark.parametrize("repair", ["obs", "least_squares"])
    def test_a_gram_matrix_of_a_few_tokens_is_enough_and_its_damping_is_told(self, repair: str) -> None:
        model = tiny("llama")
        few = [tokens(model, batch=1, length=4)]
        plan = Wanda.model_validate({"repair": repair}).calibrate(model, few)
        for block in plan.blocks:
            for facts in block.facts["matrices"].values():
                told = "damping" in facts if repair == "obs" else facts["error"] < facts["error_before"]
                assert told, facts
        pruned = Wanda().apply(model, plan)
        assert all(bool(one.isfinite().all()) for one in pruned.parameters())

    @pytest.mark.parametrize("method", [Sparsegpt, Armor])
    def test_one_sample_of_few_tokens_is_enough(self, method: type[Any]) -> None:
        model = tiny("llama")
        more = {"proxy": "gram", "rounds": 1} if method is Armor else {"damping": 1e-9}
        plan = method(**more).calibrate(model, [tokens(model, batch=1, length=3)])
        pruned = method(**more).apply(model, plan)
        assert all(bool(one.isfinite().all()) for one in pruned.parameters())

    def test_a_matrix_that_needs_more_damping_says_how_often_it_was_raised(self) -> None:
        model = tiny("llama")
        plan = Sparsegpt(damping=1e-9).calibrate(model, [tokens(model, batch=1, length=3)])
        facts = [one for block in plan.blocks for one in block.facts["matrices"].values()]
        assert any(one.get("damping", 0) > 1e-9 for one in facts), facts[0]


class TestMemory:
    @pytest.mark.parametrize(
        "failure",
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ],
    )
    def test_a_statistic_that_does_not_fit_names_the_linear_and_its_size(
        self, failure: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny("llama")
        before = {name: value.clone() for name, value in model.named_parameters()}

        def fail(self: InputSums, *_: object, **__: object) -> None:
            raise failure

        monkeypatch.setattr(InputSums, "__init__", fail)
        with pytest.raises(
            EnvironmentFailure, match=rf"^{Q}: .*64 inputs.*64 x 64 takes 0\.00 GiB"
        ) as raised:
            Sparsegpt().calibrate(model, data(model))
        assert "--stream" in raised.value.hint
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_any_other_error_stays_what_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: InputSums, *_: object, **__: object) -> None:
            raise RuntimeError("something else")

        monkeypatch.setattr(InputSums, "__init__", fail)
        model = tiny("llama")
        with pytest.raises(RuntimeError, match="something else"):
            Sparsegpt().calibrate(model, data(model))


class TestFloat16:
    def test_huge_activations_give_finite_statistics(self) -> None:
        inputs = torch.full((8, 4), 60000.0, dtype=torch.float16)
        stat = InputSums(frozenset({"norm", "moments", "gram"}), 4, torch.device("cpu"))
        stat.add(inputs)
        for part in (stat.norm, stat.mean, stat.variance, stat.gram):
            assert bool(part.isfinite().all())
        assert stat.gram[0, 1] == pytest.approx(8 * 60000.0**2)

    def test_a_float16_model_with_large_activations_is_pruned_to_finite_weights(self) -> None:
        model = tiny("llama", dtype=torch.float16)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight.mul_(
                3000
            )  # inputs far beyond what squares in float16
        block = next(iter(Walk(model, data(model))))
        parts: Parts = frozenset({"norm", "gram"})
        found = collect_inputs(block, block.linears, parts, advance=False).inputs[Q]
        assert float(found.norm.max()) ** 2 > 65504 and bool(found.gram.isfinite().all())
        for pruner in (Wanda(skip="1"), Sparsegpt(skip="1"), Armor(skip="1", rounds=1)):
            plan = pruner.calibrate(model, data(model))
            assert all(bool(plan[key].isfinite().all()) for key in plan if key.edit != "mask")


def test_the_blocks_of_a_model_count_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """A factored model is still one of its family: its blocks and linears are found without a warning."""
    model = tiny("llama")
    pruner = Armor(rounds=1)
    with caplog.at_level(logging.WARNING):
        pruned = pruner.apply(model, pruner.calibrate(model, data(model)))
        assert len(blocks(pruned)) == 2 and len(all_linears(pruned)[0]) == 7
    assert not caplog.records


def _sign(folder: Path) -> None:
    head = json.loads((folder / "structprune.json").read_text())
    write_manifest(
        folder,
        {},
        version=head.get("version", "0"),
        stages=[plan.name for plan in (folder / "structprune/plans").iterdir()],
    )
