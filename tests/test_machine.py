"""The machine: devices, the processes of a crew, and models that visit their device."""
from typing import NamedTuple

import pytest
import torch

from support import machine
from support.console import UserError
from support.machine import Crew, joined

# --------------------------------------------------------------------------------------------------
# Devices

def test_a_device_that_is_not_there_is_one_line():
    assert machine.check_device("cpu") == "cpu"
    for name in ("abacus", "cuda:99", ""):
        with pytest.raises(UserError, match=f"--device {name}: no such device here") as error:
            machine.check_device(name)
        assert "\n" not in str(error.value)


def test_one_process_plays_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert machine.join("cpu") == (Crew(0, 1), "cpu")
    machine.leave(Crew())  # nobody to wait for
    with pytest.raises(UserError, match="no such device"):
        machine.join("abacus")


# --------------------------------------------------------------------------------------------------
# Several processes

@pytest.fixture
def others(monkeypatch):
    """A stand-in for the other processes: others(..) is what all of them have, in order of rank."""
    def have(*parts):
        def all_gather_object(out, mine):
            assert len(out) == len(parts) and mine in parts
            out[:] = parts
        monkeypatch.setattr(machine.dist, "all_gather_object", all_gather_object)
    return have


class Pair(NamedTuple):
    """Two fields, as in a Player or a Rollout."""
    ids: list
    values: torch.Tensor


def test_parts_are_joined_by_their_kind():
    """Lists and tensors end to end, tuples field by field, None as None."""
    a, b = torch.tensor([1, 2]), torch.tensor([3, 4])
    assert joined([["a"], ["b", "c"], []]) == ["a", "b", "c"]
    assert joined([a, b]).tolist() == [1, 2, 3, 4]
    assert joined([a[None], b[None]]).tolist() == [[1, 2], [3, 4]]
    assert joined([None, None]) is None
    first, second, third = joined([(["a"], a, None), (["b"], b, None)])
    assert (first, second.tolist(), third) == (["a", "b"], [1, 2, 3, 4], None)
    pair = joined([Pair(["a"], a), Pair(["b"], b)])
    assert type(pair) is Pair and pair.ids == ["a", "b"] and pair.values.tolist() == [1, 2, 3, 4]
    nested = joined([(["q"], Pair([[1]], a)), (["r"], Pair([[2]], b))])
    assert nested[0] == ["q", "r"] and nested[1].ids == [[1], [2]]
    assert joined([Pair(["a"], a)]).values is not None  # one process alone


def test_shares_are_equal_in_order_and_merge_to_the_whole(others):
    items, tensor = [*"abcdef"], torch.arange(12).view(6, 2)
    shares = [Crew(rank, 3).share(items) for rank in range(3)]
    assert shares == [["a", "b"], ["c", "d"], ["e", "f"]]
    others(*shares)
    assert Crew(1, 3).merged(shares[1]) == items
    parts = [Crew(rank, 2).share(tensor) for rank in range(2)]
    assert [part.tolist() for part in parts] == [tensor[:3].tolist(), tensor[3:].tolist()]
    assert joined(parts).tolist() == tensor.tolist()
    uneven = [Crew(rank, 4).share([*"abcdef"]) for rank in range(4)]
    assert sorted(map(len, uneven)) == [1, 1, 2, 2] and joined(uneven) == items
    assert sorted(len(Crew(rank, 4).share(tensor[:2])) for rank in range(4)) == [0, 0, 1, 1]
    alone = Crew()
    assert alone.share(items) == items and alone.merged(items) == items
    assert alone.all("mine") == ["mine"]


def test_every_process_has_a_seed_of_its_own():
    """The first has the run's: one process alone samples as it always did."""
    seeds = [Crew(rank, 4).seed(5) for rank in range(4)]
    assert seeds[0] == 5 and len({*seeds, *(Crew(rank, 4).seed(6) for rank in range(4))}) == 8


def test_a_process_with_less_work_keeps_in_step(others):
    """The processes gather weights together, so all go through the model equally often."""
    work = [["a", "b", "c"], ["d"]]
    others(3, 1)
    steps = [list(Crew(rank, 2).in_step(items)) for rank, items in enumerate(work)]
    assert steps == [[("a", True), ("b", True), ("c", True)],
                     [("d", True), ("d", False), ("d", False)]]
    assert list(Crew().in_step(["a", "b"])) == [("a", True), ("b", True)]
    assert list(Crew().in_step([])) == []


def test_what_is_not_shared_out_is_whole():
    x = torch.ones(2, requires_grad=True)
    assert machine.whole(x) is x and machine.shared_as(x, x) is x
    found = machine.gathered({"x": x.view(1, 2).T}, rank=0)
    assert found["x"].is_contiguous() and not found["x"].requires_grad
    assert machine.gathered({"x": x}, rank=1) == {}  # it only helps the first


# --------------------------------------------------------------------------------------------------
# Models that are on their device only while they are asked

def test_an_offloaded_model_visits_its_device(small, monkeypatch):
    """Inside the `with` block the model has copies of its weights on the device.

    After the block it has its old weights again: the same tensors, in the same memory.
    """
    home = [p.data_ptr() for p in machine.offload(small).parameters()]
    before = small.logits(torch.tensor([[3, 4]]))
    # As with a GPU, the copy lies elsewhere.
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **_: self.clone())
    with machine.resident(small):
        assert not {p.data_ptr() for p in small.parameters()} & {*home}
        monkeypatch.undo()
        assert torch.equal(small.logits(torch.tensor([[3, 4]])), before)
    assert [p.data_ptr() for p in small.parameters()] == home
    with pytest.raises(ZeroDivisionError), machine.resident(small):
        1 / 0
    assert [p.data_ptr() for p in small.parameters()] == home


def test_a_model_that_is_at_home_stays_there(small):
    home = [p.data_ptr() for p in small.parameters()]
    with machine.resident(small) as model:
        assert model is small
        assert [p.data_ptr() for p in small.parameters()] == home


class Part:
    """A stand-in for a part of a model that FSDP2 has shared out. It notes what is asked of it."""

    def __init__(self, name, said, blocks=()):
        self.name, self.said, self.blocks = name, said, blocks

    def unshard(self):
        self.said.append(f"{self.name} whole")

    def reshard(self):
        self.said.append(f"{self.name} shared")

    def set_reshard_after_forward(self, after, recurse):
        assert not recurse
        self.said.append(f"{self.name} {'let go' if after else 'kept'}")


def test_a_model_that_is_shared_out_is_gathered_once():
    """Its parts stay whole from one forward pass to the next, and go back, whatever happens."""
    said = []
    model = Part("all", said, [Part("block", said)])
    with pytest.raises(ZeroDivisionError), machine.resident(model):
        assert said == ["block kept", "block whole", "all kept", "all whole"]
        said.clear()
        1 / 0
    # The root of a model stays whole after a forward pass by FSDP2's default.
    assert said == ["block shared", "block let go", "all shared", "all kept"]
