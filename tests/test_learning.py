"""Learning: float32 masters, one clipped step, and checkpoints that go on to the same bits."""
import copy
import json
import math
import random

import pytest
import torch
from safetensors.torch import save_file

from support import learning
from support.console import UserError
from support.data import Row
from support.learning import (
    fingerprint,
    load_state,
    optimizer_for,
    previous,
    read_state,
    save_state,
    take,
    weights_of,
)
from support.machine import Crew

# --------------------------------------------------------------------------------------------------
# Steps

def test_bfloat16_learns_in_float32(small):
    """Each of fifty steps is too small to change a bfloat16 weight.

    With float32 masters they add up. Each of the two optimizers takes its own steps only.
    """
    model = small.bfloat16()
    norm = 1e-4 * sum(p.numel() for p in model.parameters()) ** 0.5
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # a second optimizer must not find the first one's hooks
        optimizer = optimizer_for(model, torch.optim.SGD, lr=1.0)
        for _ in range(25):
            for _ in range(2):  # two micro-batches
                sum(p.sum() for p in model.parameters()).mul(0.5e-4).backward()
            assert all(p.grad is None for p in model.parameters())
            assert take(optimizer, 1e9) == pytest.approx(norm, rel=0.02)
    for p, old in zip(model.parameters(), before):
        assert torch.allclose(p.float(), old.float() - 50e-4, rtol=0.02, atol=1e-3)
        assert not torch.equal(p, old)


def test_a_second_optimizer_goes_on_with_the_float32_weights_of_the_first(small):
    """SPIN makes a new optimizer for each iteration. The steps were too small for bfloat16."""
    model = small.bfloat16()
    before = weights_of(optimizer_for(model, torch.optim.SGD, lr=1.0))[0].detach().clone()
    for _ in range(4):
        optimizer = optimizer_for(model, torch.optim.SGD, lr=1.0)
        for p in weights_of(optimizer):
            p.grad = torch.full_like(p, 1e-5)
        optimizer.step()
    after = weights_of(optimizer_for(model, torch.optim.SGD, lr=1.0))[0]
    assert torch.allclose(after, before - 4e-5, rtol=0, atol=2e-7)


def test_a_float32_model_is_its_own_master(small):
    optimizer = optimizer_for(small, torch.optim.SGD, lr=1.0)
    assert all(a is b for a, b in zip(weights_of(optimizer), small.parameters()))


def sgd(*gradient, lr=0.5):
    """(weights, optimizer): two weights 1, 2 with this gradient, and plain gradient descent."""
    weights = torch.tensor([1.0, 2.0], requires_grad=True)
    weights.grad = torch.tensor(gradient)
    return weights, torch.optim.SGD([weights], lr=lr)


def test_a_step_by_hand():
    """A gradient of norm 5 is scaled down to the largest norm. A smaller one is taken as it is."""
    for largest, step in ((1.0, (0.6, 0.8)), (2.5, (1.5, 2.0)), (5.0, (3.0, 4.0)),
                          (9.0, (3.0, 4.0))):
        weights, optimizer = sgd(3.0, 4.0)
        assert take(optimizer, largest) == pytest.approx(5.0)  # the norm before
        expected = [1 - 0.5 * step[0], 2 - 0.5 * step[1]]
        assert weights.tolist() == pytest.approx(expected, abs=1e-5)
        assert weights.grad is None
    weights, optimizer = sgd(3.0, 4.0)
    take(optimizer)
    assert weights.tolist() == pytest.approx([0.7, 1.6], abs=1e-5)  # CLIP is 1


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_not_taken(bad):
    weights, optimizer = sgd(3.0, bad)
    assert not math.isfinite(take(optimizer))
    assert weights.tolist() == [1.0, 2.0]
    assert weights.grad is None and not optimizer.state  # nothing of it is left for the next step


def test_the_rate_of_the_next_step():
    weights, optimizer = sgd(0.0, 0.5, lr=9.0)
    learning.set_rate(optimizer, 0.25)
    take(optimizer)
    assert weights.tolist() == [1.0, 1.875]


# --------------------------------------------------------------------------------------------------
# Checkpoints

class Killed(BaseException):
    """Like SIGKILL: nothing catches it."""


def three(model):
    """What a checkpoint restores: a copy of a model, an optimizer of its own, and a generator."""
    model = copy.deepcopy(model)
    optimizer = optimizer_for(model, torch.optim.AdamW, lr=0.01)
    return model, optimizer, torch.Generator().manual_seed(7)


def step(model, optimizer, generator):
    """A step whose gradient depends on the generator."""
    for p in model.parameters():
        (p.float() * torch.randn(p.shape, generator=generator)).sum().backward()
    take(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_on_from_a_checkpoint_ends_at_the_same_bits(small, tmp_path, dtype):
    """Weights, the optimizer's state and the generator come back, and what the game has saved."""
    path, small = tmp_path / "state", small.to(dtype)
    model, optimizer, generator = three(small)
    step(model, optimizer, generator)
    facts = {"step": 1, "said": {"a": "é"}, "rng": random.Random(0).getstate()}
    save_state(path, optimizer, generator, facts, extra=torch.arange(3))
    step(model, optimizer, generator)

    found, tensors = read_state(path)
    assert found == json.loads(json.dumps(facts))
    assert tensors["extra"].tolist() == [0, 1, 2]
    again = three(small)
    again[2].manual_seed(99)
    load_state(*again, tensors)
    # The model computes with the checkpoint's weights at once, not only after its next step.
    for p, w in zip(again[0].parameters(), weights_of(again[1])):
        assert torch.equal(p, w.to(dtype))
    step(*again)
    for a, b in zip(again[0].parameters(), model.parameters()):
        assert torch.equal(a, b)
    for a, b in zip(weights_of(again[1]), weights_of(optimizer)):
        assert torch.equal(a, b)
    assert torch.equal(again[2].get_state(), generator.get_state())


@pytest.fixture
def saved(small, tmp_path):
    """The path of a checkpoint of step 2, with that of step 1 before it."""
    model, optimizer, generator = three(small)
    for number in (1, 2):
        save_state(tmp_path / "state", optimizer, generator, {"step": number})
    return tmp_path / "state"


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_facts(path):
    """A checkpoint whose facts were edited: the checksum is of them, too."""
    facts, tensors = read_state(path)
    checksum = str(learning.checksum(tensors, json.dumps(facts)))
    save_file(tensors, path, {"facts": json.dumps(facts | {"step": 9}), "checksum": checksum})


@pytest.mark.parametrize("damage, says", [
    (cut_short, "cut short, or not a checkpoint"),
    (lambda path: path.write_bytes(b""), "cut short, or not a checkpoint"),
    (lambda path: save_file({"a": torch.ones(1)}, path), "cut short, or not a checkpoint"),
    (flip_a_bit, "damaged, its checksum does not fit"),
    (other_facts, "damaged, its checksum does not fit"),
    (lambda path: path.unlink(), "no checkpoint"),
])
def test_a_damaged_checkpoint_offers_the_one_before(saved, damage, says):
    assert read_state(saved)[0] == {"step": 2}
    damage(saved)
    with pytest.raises(UserError, match=says) as error:
        read_state(saved)
    assert str(error.value).endswith(f"; the one before it is here: --resume {previous(saved)}")
    assert "\n" not in str(error.value)
    assert read_state(previous(saved))[0] == {"step": 1}
    previous(saved).unlink()
    with pytest.raises(UserError) as error:
        read_state(saved)
    assert "--resume" not in str(error.value)


@pytest.mark.parametrize("at, newest", [("save", 2), ("first rename", 2), ("second rename", 2)])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(saved, small, monkeypatch, at, newest):
    """The newest whole one is at its place, or is the one before it."""
    path_type, replace = type(saved), type(saved).replace

    def killed(*_):
        raise Killed

    def mortal(self, target):
        if (at == "first rename") == (self == saved):
            raise Killed
        return replace(self, target)
    if at == "save":
        monkeypatch.setattr(learning, "save_file", killed)
    else:
        monkeypatch.setattr(path_type, "replace", mortal)
    model, optimizer, generator = three(small)
    with pytest.raises(Killed):
        save_state(saved, optimizer, generator, {"step": 3})
    monkeypatch.undo()
    assert saved.exists() == (at != "second rename")
    path = saved if saved.exists() else previous(saved)
    assert read_state(path)[0] == {"step": newest}


def test_a_full_disk_leaves_what_was_there(saved, small, monkeypatch):
    def no_room(tensors, path, metadata):
        path.write_bytes(b"the beginning")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(learning, "save_file", no_room)
    model, optimizer, generator = three(small)
    with pytest.raises(UserError, match="cannot be written .*No space.* saved before is whole"):
        save_state(saved, optimizer, generator, {"step": 3})
    assert read_state(saved)[0] == {"step": 2}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["state", "state.previous"]


def test_a_checkpoint_of_another_model_is_refused(saved, small):
    model, optimizer, generator = three(small)
    tensors = read_state(saved)[1]
    del tensors["weight.0"]
    with pytest.raises(UserError, match="the checkpoint is of another model"):
        load_state(model, optimizer, generator, tensors)
    tensors["weight.0"] = torch.ones(3, 3)
    with pytest.raises(UserError, match="the checkpoint is of another model"):
        load_state(model, optimizer, generator, tensors)


class Played(Crew):
    """A Crew of which the other processes are played: each has a generator of its own."""

    def all(self, mine):
        return [mine if rank == self.rank else torch.Generator().manual_seed(rank).get_state()
                for rank in range(self.size)]


class CarefulGenerator:
    """A torch.Generator whose set_state refuses a view into a larger tensor.

    PyTorch 2.13 reads such a view from the beginning of its memory, and may crash the interpreter.
    """

    def __init__(self):
        self.real = torch.Generator()
        self.manual_seed = self.real.manual_seed

    def set_state(self, state):
        assert state.storage_offset() == 0
        self.real.set_state(state)


def test_every_process_goes_on_with_its_own_generator(small, tmp_path):
    """The first process writes. A run of another size gives each process a new generator."""
    path, (model, optimizer, generator) = tmp_path / "state", three(small)
    save_state(path, optimizer, generator, {}, Played(1, 2))
    assert not path.exists()
    save_state(path, optimizer, generator, {}, Played(0, 2))
    tensors = read_state(path)[1]
    assert len(tensors["generator"]) == 2

    def restored(rank, size):
        generator = CarefulGenerator()
        load_state(model, optimizer, generator, tensors, Crew(rank, size))
        return torch.rand(4, generator=generator.real).tolist()
    assert restored(0, 2) == torch.rand(4, generator=torch.Generator().manual_seed(7)).tolist()
    assert restored(1, 2) == torch.rand(4, generator=torch.Generator().manual_seed(1)).tolist()
    three_of_them = [restored(rank, 3) for rank in range(3)]
    assert three_of_them == [restored(rank, 3) for rank in range(3)]
    different = {tuple(x) for x in [*three_of_them, restored(0, 2), restored(1, 2)]}
    assert len(different) == 5


def test_a_checksum_tells_names_values_and_text():
    a = torch.tensor([1.0, 2.0])
    checks = [learning.checksum({"a": a, "b": a + 1}, "text"),
              learning.checksum({"a": a + 1, "b": a}, "text"),
              learning.checksum({"a": a, "c": a + 1}, "text"),
              learning.checksum({"a": a, "b": a + 1}, "other")]
    assert len({*checks}) == 4
    assert learning.checksum({"b": a + 1, "a": a}, "text") == checks[0]  # in any order


def test_a_fingerprint_tells_weights_and_data(small):
    before = fingerprint(small), fingerprint(small, [Row(["a"], "b", 1)])
    assert len({*before}) == 2
    assert fingerprint(small, [Row(["a"], "c", 1)]) not in before
    assert fingerprint(small, [Row(["a"], "b", 7)]) == before[1]  # the same row, elsewhere
    assert fingerprint(copy.deepcopy(small).bfloat16()) == before[0]  # the same in any dtype
    with torch.no_grad():
        small.norm[0] += 1
    assert fingerprint(small) not in before
