"""A training that was interrupted goes on after its last check, and ends as if nothing had happened."""

import copy
import json
import signal
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import structprune.recovery.state as state_module
from structprune.errors import InputError, Interrupted, QualityError
from structprune.progress import Progress
from structprune.recovery.state import TrainingState
from structprune.recovery.windows import Order
from structprune.storage.header import Header, TensorInfo
from tests.recovering import prune, pruned, recover, trained
from tests.tiny import tiny


def stop_at(step: int) -> Progress:
    """Stop the training in a step, before its check."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "recover" and done == step:
            raise Interrupted(signal.SIGTERM)

    return stop


def interrupt(folder: Path, step: int, **changes: object) -> None:
    with pytest.raises(Interrupted):
        recover(*pruned(trained()), state=TrainingState(folder), progress=stop_at(step), **changes)


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize("stopped_at", [[9], [10], [11], [21, 28], [30]], ids=str)
def test_an_interrupted_training_ends_with_the_weights_of_a_whole_one(
    stopped_at: list[int], tmp_path: Path
) -> None:
    whole, masks = pruned(trained())
    expected = recover(whole, masks)
    for step in stopped_at:
        interrupt(tmp_path, step)
    model, masks = pruned(trained())
    found = recover(model, masks, state=TrainingState(tmp_path))
    assert found.steps_resumed == (stopped_at[-1] - 1) // 10 * 10
    assert (found.history, found.best_step, found.best_loss, found.start_loss) == (
        expected.history,
        expected.best_step,
        expected.best_loss,
        expected.start_loss,
    )
    for name, factors in expected.factors.items():
        assert torch.equal(factors.left, found.factors[name].left), name
        assert torch.equal(factors.right, found.factors[name].right), name
    assert_same(whole, model)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_transposed_weights_and_experts_resume_too(family: str, tmp_path: Path) -> None:
    changes = {"steps": 6, "check_every": 2, "learning_rate": 1e-2}
    models = [tiny(family, dtype=torch.bfloat16) for _ in range(3)]
    masks = [prune(model, 0.5) for model in models]
    recover(models[0], masks[0], **changes)
    with pytest.raises(Interrupted):
        recover(models[1], masks[1], state=TrainingState(tmp_path), progress=stop_at(5), **changes)
    assert recover(models[2], masks[2], state=TrainingState(tmp_path), **changes).steps_resumed == 4
    assert_same(models[0], models[2])


def test_a_teacher_is_imitated_on_both_sides_of_an_interruption(tmp_path: Path) -> None:
    changes = {"teacher": copy.deepcopy(trained()), "teacher_weight": 0.5}
    whole, masks = pruned(trained())
    recover(whole, masks, **changes)
    interrupt(tmp_path, 15, **changes)
    model, masks = pruned(trained())
    assert recover(model, masks, state=TrainingState(tmp_path), **changes).steps_resumed == 10
    assert_same(whole, model)


def test_a_training_that_had_ended_takes_no_step_again(tmp_path: Path) -> None:
    whole, masks = pruned(trained())
    recover(whole, masks, state=TrainingState(tmp_path))
    model, masks = pruned(trained())
    steps: list[int] = []
    recover(
        model, masks, state=TrainingState(tmp_path), progress=lambda stage, done, total: steps.append(done)
    )
    assert steps == []
    assert_same(whole, model)


def test_a_training_that_gained_nothing_says_the_same_again(tmp_path: Path) -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(QualityError, match="no check beat") as failed:
            recover(*pruned(trained()), state=TrainingState(tmp_path), learning_rate=1e-30)
        messages.append(str(failed.value))
    assert messages[0] == messages[1]


def test_only_the_newest_state_and_the_best_factors_are_kept(tmp_path: Path) -> None:
    interrupt(tmp_path, 25)
    best = json.loads((tmp_path / "state.json").read_text())["best_step"]
    names = {"state.json", "state-00000020.safetensors", f"best-{best:08d}.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_file_without_a_state_that_names_it_is_only_left_over(tmp_path: Path) -> None:
    (tmp_path / "state-00000010.safetensors").write_bytes(b"written last, never named")
    model, masks = pruned(trained())
    assert recover(model, masks, state=TrainingState(tmp_path), steps=2).steps_resumed == 0


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a training that was stopped after its second check left."""
    folder = tmp_path_factory.mktemp("left")
    interrupt(folder, 25)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


DAMAGE = [(kind, how) for kind in ("state-", "best-", "state.json") for how in ("flipped", "cut", "gone")]
DAMAGE.remove(("state.json", "gone"))  # then there is no state


@pytest.mark.parametrize(("kind", "damage"), DAMAGE)
def test_a_damaged_state_is_refused_and_says_how_to_begin_anew(
    kind: str, damage: str, left: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in left.items():
        (tmp_path / name).write_bytes(content)
    (path,) = tmp_path.glob(f"{kind}*")
    if damage == "flipped":
        middle = path.stat().st_size // 2
        content = bytearray(path.read_bytes())
        content[middle] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.unlink()
    with pytest.raises(InputError, match=path.name) as refused:
        recover(*pruned(trained()), state=TrainingState(tmp_path))
    assert "--restart" in refused.value.hint


def test_a_number_changed_in_the_state_is_found(left: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in left.items():
        (tmp_path / name).write_bytes(content)
    facts = json.loads(left["state.json"])
    facts["best_loss"] -= 0.5
    (tmp_path / "state.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"state\.json: its content"):
        recover(*pruned(trained()), state=TrainingState(tmp_path))


def test_the_state_of_another_training_is_named_by_its_tensors(tmp_path: Path) -> None:
    interrupt(tmp_path, 25)
    with pytest.raises(InputError, match=r"best-.*: tensor .* is .* \[8, \d+\], expected .* \[4, \d+\]"):
        recover(*pruned(trained()), state=TrainingState(tmp_path), rank=4)


def test_a_state_is_read_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path, 25)
    alive: list[weakref.ref[Tensor]] = []
    read = state_module.read_tensor

    def watched(path: Path, info: TensorInfo, header: Header) -> Tensor:
        assert not any(one() is not None for one in alive), "the tensor before is still in memory"
        tensor = read(path, info, header)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(state_module, "read_tensor", watched)
    recover(*pruned(trained()), state=TrainingState(tmp_path))
    assert len(alive) > 100


def test_the_order_is_every_window_once_an_epoch_and_is_known_from_any_place() -> None:
    order = Order(5, seed=3)
    epochs = [order.slice(5 * epoch, 5) for epoch in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert Order(5, seed=3).slice(8, 7) == [*epochs[1][3:], *epochs[2]]
    assert Order(5, seed=4).slice(0, 20) != [window for epoch in epochs for window in epoch]
