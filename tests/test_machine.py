"""The machine: devices, the processes of a crew, models that visit their device, memory."""
from typing import NamedTuple

import pytest
import torch

from model import config_from_json
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


# --------------------------------------------------------------------------------------------------
# Memory

def test_memory_plan_by_hand(small, monkeypatch):
    """Weights, gradients and AdamW's two numbers take four bytes each. bfloat16 adds masters.

    What cannot fit into memory is refused in one line.
    """
    P = sum(p.numel() for p in small.parameters())

    def planned(dtype, **more):
        return machine.memory_plan(small.config, dtype, P, 2, 8, 20, 512, **more)
    plan = planned(torch.float32, frozen=[P])
    assert (plan["weights"], plan["gradients"]) == (4 * P, 4 * P)
    assert (plan["optimizer"], plan["frozen models"], plan["float32 masters"]) == (8 * P, 4 * P, 0)
    # k and v, layers, rows, positions, kv heads, head size, bytes, and twice because of the copy
    assert plan["cache"] == 2 * 2 * 8 * 20 * 2 * 8 * 4 * 2
    half = planned(torch.bfloat16)
    assert (half["weights"], half["float32 masters"], half["frozen models"]) == (2 * P, 4 * P, 0)
    assert planned(torch.float32, recompute=True)["activations"] < plan["activations"]
    two = planned(torch.float32, frozen=[P, P - 1])
    assert two["frozen models"] == 4 * (2 * P - 1)
    two = planned(torch.float32, frozen=[P, P - 1], offloaded=True)
    assert two["frozen models"] == 4 * P  # only one at a time
    # There are no gradients while answers are sampled, and no cache while they are trained on.
    stays = plan["weights"] + plan["optimizer"] + plan["frozen models"]
    training = plan["gradients"] + plan["activations"] + plan["logits"]
    assert machine.most_memory(plan) == stays + max(plan["cache"], training)
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match="try --dtype bfloat16"):
        machine.check_memory(plan, "cpu")
    monkeypatch.setattr(machine, "free_memory", lambda device: None)
    machine.check_memory(plan, "cpu")


def test_the_plan_of_several_processes_by_hand(small, monkeypatch):
    """Each holds its share of the float32 weights, gradients and optimizer, and one whole model."""
    P = 8000
    plan = machine.memory_plan(small.config, torch.bfloat16, P, 2, 8, 20, 512, frozen=[P, 300],
                               processes=4)
    assert [plan[use] for use in ("weights", "float32 masters", "gradients", "optimizer")] == [
        2 * P, P, P, 2 * P]
    assert plan["frozen models"] == P + 2 * 300  # the reference's share; the reward model is whole
    alone = machine.memory_plan(small.config, torch.bfloat16, P, 2, 8, 20, 512)
    assert plan["cache"] == alone["cache"] // 4
    # On the CPU, the plans of all must fit.
    most = machine.most_memory(plan)
    monkeypatch.setattr(machine, "free_memory", lambda device: 3.9 * most)
    machine.check_memory(plan, "cpu", processes=3)
    with pytest.raises(UserError, match="this needs about"):
        machine.check_memory(plan, "cpu", processes=4)
    # On GPUs, each first holds the model whole in CPU memory: six bytes a weight.
    free = {"cuda:0": 10 * most, "cpu": 6 * 4 * P - 1}
    monkeypatch.setattr(machine, "free_memory", free.get)
    with pytest.raises(UserError, match="4 processes first load the model whole"):
        machine.check_memory(plan, "cuda:0", processes=4)
    machine.check_memory(plan, "cuda:0", processes=1)


def test_activations_of_the_plan_are_those_that_pytorch_keeps(small):
    """What a forward pass of 4 x 32 tokens keeps for the backward pass, within a tenth."""
    kept, weights = {}, {p.data_ptr() for p in small.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = small(torch.ones(4, 32, dtype=torch.long))
    assert hidden.requires_grad
    plan = machine.memory_plan(small.config, torch.float32, 0, 2, 1, 1, tokens=128)
    assert sum(kept.values()) == pytest.approx(plan["activations"], rel=0.1)


def test_the_plan_is_shown_and_a_real_models_weights_are_not_needed(monkeypatch, capsys):
    config = config_from_json({
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 131072})
    P = 8_030_261_248  # as Llama 3.1 8B has
    plan = machine.memory_plan(config, torch.bfloat16, P, 2, 64, 512, 4096, True, frozen=[P])
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**40)
    machine.check_memory(plan, "cpu", show=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[2].strip() for line in lines] == [*plan, "at the most"]
    assert "float32 masters       29.92 GiB" in lines[1]
    assert lines[-1].endswith("GiB of 1024.00 GiB free on cpu")
    machine.check_memory(plan, "cpu")
    assert capsys.readouterr().out == ""


def test_free_memory_of_this_machine():
    free = machine.free_memory("cpu")
    assert free is None or 2**20 < free < 2**50
