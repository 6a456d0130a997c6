"""Memory: the plan by hand and by PyTorch's tracker, and what is said where it is too much."""
import json

import pytest
import torch
import track_memory
from conftest import command, random_llama

import model as llama
import selfplay
import spin
from support import memory
from support.console import UserError


def plan_of(model, dtype=torch.float32, positions=8 * 20, **more):
    """8 rows of 20 positions are sampled; a micro-batch has 512."""
    P = sum(p.numel() for p in model.parameters())
    return memory.plan(model.config, dtype, P, 2, positions, 512, **more), P


def test_the_plan_by_hand(small):
    """Weights, gradients and AdamW's two numbers take four bytes each. bfloat16 adds masters."""
    P = sum(p.numel() for p in small.parameters())
    plan, _ = plan_of(small, frozen=[P], sampled=8)
    assert (plan["weights"], plan["gradients"]) == (4 * P, 4 * P)
    assert (plan["optimizer"], plan["frozen models"], plan["float32 masters"]) == (8 * P, 4 * P, 0)
    # k, v and a copy of one of them; layers, rows, positions, kv heads, head size, bytes; and two
    # numbers for each word of each row
    assert plan["sampling"] == 3 * 2 * 8 * 20 * 2 * 8 * 4 + 2 * 4 * 8 * 50
    half, _ = plan_of(small, torch.bfloat16)
    assert (half["weights"], half["float32 masters"], half["frozen models"]) == (2 * P, 4 * P, 0)
    assert plan_of(small, recompute=True)[0]["activations"] < plan["activations"]
    assert plan_of(small, frozen=[P, P - 1])[0]["frozen models"] == 4 * (2 * P - 1)
    one, _ = plan_of(small, frozen=[P, P - 1], offloaded=True)
    assert (one["frozen models"], one["visiting model"]) == (0, 4 * P)  # one at a time
    # Such a model visits while answers are sampled, or between two players' training.
    assert memory.most(one) == one["weights"] + one["optimizer"] + max(
        4 * P + one["sampling"],
        one["gradients"] + one["at work"] + max(4 * P, one["activations"]))
    # There are no gradients while answers are sampled, and no cache while they are trained on.
    stays = plan["weights"] + plan["optimizer"] + plan["frozen models"]
    training = plan["gradients"] + plan["activations"] + plan["at work"]
    assert memory.most(plan) == stays + max(plan["sampling"], training)


def test_the_plan_with_lora_by_hand(small):
    """Only the adapters have masters, gradients and an optimizer. No process shares them out."""
    for processes in (1, 4):
        plan, P = plan_of(small, torch.bfloat16, adapters=100, frozen=[7], processes=processes)
        found = [plan[use] for use in ("weights", "float32 masters", "gradients", "optimizer",
                                       "frozen models")]
        assert found == [2 * (P + 100), 400, 400, 800, 14]


def test_a_game_with_lora_plans_no_reference():
    """It is the frozen model itself. A reward model still counts."""
    full, lora = (selfplay.plan(selfplay.parse_args(list(flags)))
                  for flags in ((), ("--lora", "2")))
    assert full["frozen models"] == full["weights"] and lora["frozen models"] == 0


def test_the_plan_of_several_processes_by_hand(small):
    """Each holds its share of the float32 weights, gradients and optimizer, and one whole model."""
    P = sum(p.numel() for p in small.parameters())
    plan, _ = plan_of(small, torch.bfloat16, frozen=[P, 300], processes=4)
    assert [plan[use] for use in ("weights", "float32 masters", "gradients", "optimizer")] == [
        2 * P, P, P, 2 * P]
    assert plan["frozen models"] == P + 2 * 300  # the reference's share; the reward model is whole
    assert plan["visiting model"] == 2 * P  # for the last scores the reference is gathered, too
    assert plan["sampling"] == plan_of(small, torch.bfloat16)[0]["sampling"] // 4
    lora, _ = plan_of(small, torch.bfloat16, adapters=1, frozen=[7], offloaded=True, processes=4)
    assert (lora["frozen models"], lora["visiting model"]) == (14, 0)  # one process alone offloads


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_the_plan_are_those_that_pytorch_keeps(small, dtype, fused, monkeypatch):
    """What a forward pass of 4 x 32 tokens keeps for the backward pass: on the CPU, as on a GPU."""
    if fused:
        monkeypatch.setattr(llama, "attend", llama.attend_fused)
        monkeypatch.setattr(torch.nn.functional, "rms_norm", track_memory.fused_norm)
    kept, weights = {}, {p.data_ptr() for p in small.to(dtype).parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = small(torch.ones(4, 32, dtype=torch.long))
    assert hidden.requires_grad
    plan = memory.plan(small.config, dtype, 0, 2, 1, tokens=128, fused=fused)
    mask = (1 + dtype.itemsize) * 128**2  # not in this pass
    assert sum(kept.values()) == pytest.approx(plan["activations"] - mask, rel=0.1)


@pytest.mark.filterwarnings("ignore:Expected a tensor")
@pytest.mark.parametrize("name", track_memory.SIZES)
@pytest.mark.parametrize("game, lora, recompute", [
    ("lsp", None, False), ("lsp", 16, True), ("spin", None, True), ("spin", 16, False)])
def test_the_plan_is_what_pytorchs_tracker_sees(name, game, lora, recompute):
    """Within 5 %, for models of 1 to 7 billion weights: of two of their layers, to be fast.

    `python tests/track_memory.py` does it for all layers and all cases.
    """
    config = llama.config_from_json(track_memory.SIZES[name] | {"num_hidden_layers": 2})
    words = (config, game, torch.bfloat16, lora, recompute)
    assert track_memory.planned(*words) == pytest.approx(track_memory.tracked(*words), rel=0.05)


@pytest.mark.filterwarnings("ignore:Expected a tensor")
@pytest.mark.parametrize("prompts, group, length, new, sizes, lora", [
    (4, 4, 16, 16, {"vocab_size": 8192}, None),  # most are logits and probabilities
    (8, 8, 32, 32, {}, None),  # the cache
    (16, 1, 256, 16, {"intermediate_size": 1024}, None),  # the prompts' way through a layer
    (16, 1, 256, 16, {"intermediate_size": 1024}, 4)])
def test_the_plan_of_sampling_is_what_pytorchs_tracker_sees(prompts, group, length, new, sizes,
                                                            lora):
    """Within 10 %, besides the weights. All prompts have one length, so there is no mask."""
    model = random_llama(hidden_size=64, head_dim=16, num_hidden_layers=4,
                         max_position_embeddings=512, **sizes)
    if lora:
        llama.adapt(model, lora)
    model.requires_grad_(False)
    ids = [[i + 3] * length for i in range(prompts)]
    games = prompts * group
    plan, _ = plan_of(model, positions=games * (length + new), sampled=games,
                      read=prompts * length, adapters=lora)
    peak = track_memory.tracked_sampling(model, ids, group, new)
    assert plan["sampling"] == pytest.approx(peak, rel=0.1)


def test_rmsprop_takes_no_copy_of_its_whole_state(small):
    """PyTorch's default on a GPU does (on a CPU it does not, so the tracker cannot see it)."""
    assert spin.rmsprop(small).defaults["foreach"] is False


def test_a_micro_batch_holds_the_longest_text(folder, tmp_path):
    """However small --micro-batch is: a text is never split, and in spin.py no pair is."""
    words = ("--model", str(folder), "--answer-tokens", "30", "--micro-batch")
    ask = ("--query-tokens", "20")
    for game, words, longest in ((selfplay, (*ask, *words), 20 + 64 + 30), (spin, words, 60)):
        small, fitting = (game.plan(game.parse_args([*words, n])) for n in ("1", str(longest)))
        assert small == fitting
        assert small["activations"] < game.plan(game.parse_args([*words, "256"]))["activations"]


def refused(plans, free, changes=(), device="cpu", processes=1, **on):
    """The line with which a plan is refused. plans: GiB of a plan as a function of settings."""
    def planned(other, processes):
        return {"weights": plans(other) * memory.GIB, "float32 masters": 0, "gradients": 0,
                "optimizer": 0, "visiting model": 0, "sampling": 0, "activations": 0, "at work": 0}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(memory, "free", lambda device: free.get(device) and free[device] * memory.GIB)
        memory.check(planned, device, processes=processes, changes=changes)
    return str(error.value)


CHANGES = [("--a", {"a": 1}), ("--b", {"b": 1}), ("--c", {"c": 1})]


def test_what_cannot_fit_is_refused_with_what_would_fit():
    """The fewest changes first, and then in the order of their cost; each with its GiB."""
    saved = {"a": 2, "b": 5, "c": 6}

    def plans(other):
        return 10 - sum(saved[name] for name in other)
    said = refused(plans, {"cpu": 5}, CHANGES)
    assert said == ("this needs about 10.0 GiB, and 5.0 GiB are free on cpu: it would fit with --b "
                    "(5.0), or --c (4.0)")
    assert "with --a --b (3.0), or --a --c (2.0), or --b --c (-1.0)" in refused(
        plans, {"cpu": 3.5}, CHANGES)
    assert "try fewer games or a smaller model (with --a --b --c it still needs -3.0)" in refused(
        plans, {"cpu": -4}, CHANGES)
    assert "try fewer games or a smaller model" in refused(plans, {"cpu": 3})
    assert "this needs about 30.0" in refused(plans, {"cpu": 29}, processes=3)
    assert "2 processes first load the model whole, about 20.0" in refused(
        plans, {"cuda": 50, "cpu": 19}, device="cuda", processes=2)
    with pytest.MonkeyPatch.context() as patch:  # a machine that cannot tell
        patch.setattr(memory, "free", lambda device: None)
        memory.check(lambda other, processes: plan_of(llama_of_one_layer())[0], "cpu")


def llama_of_one_layer():
    """Something small with a Config."""
    return random_llama(num_hidden_layers=1)


@pytest.mark.parametrize("game, flags", [(selfplay, ("--reward", "majority")),
                                         (spin, ("--data", "chats.jsonl"))])
def test_a_dry_run_needs_nothing_but_config_json(tmp_path, game, flags, monkeypatch):
    """The plan of one process, and of several; what cannot fit is refused before weights are read.

    The advice is what the plan says of these very flags.
    """
    (tmp_path / "big").mkdir()
    raw = json.dumps(track_memory.SIZES["Llama-3.2-1B"])
    (tmp_path / "big" / "config.json").write_text(raw)
    monkeypatch.setattr(memory, "free", lambda device: 12 * memory.GIB)
    words = ("--model", "big", *flags, "--micro-batch", "1024", "--device", "cpu", "--dry-run")
    done = command(game, tmp_path, *words)
    assert done.returncode == 2 and "it would fit with" in done.stderr
    assert "float32 masters" in done.stdout and "each process, GiB:" in done.stdout
    said = done.stderr.split("it would fit with ")[1].partition(";")[0]
    advice = said.split(", or ")
    assert 1 <= len(advice) <= 3
    for one in advice:
        changes, size = one.strip().rsplit(" (", 1)
        args = game.parse_args([w if w != "big" else str(tmp_path / "big") for w in words]
                               + changes.split())
        most = memory.most(game.plan(args)) / memory.GIB
        assert f"{most:.1f})" == size and most <= 12
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_it_could_not_do(tmp_path, monkeypatch):
    """The plan stands there, of every game, although there is no tokenizer and no weight."""
    (tmp_path / "big").mkdir()
    raw = json.dumps(track_memory.SIZES["Llama-3.2-1B"])
    (tmp_path / "big" / "config.json").write_text(raw)
    (tmp_path / "asks.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    monkeypatch.setattr(memory, "free", lambda device: 80 * memory.GIB)
    for flags, lacks in ((("--reward", "majority"), "model.safetensors"),
                         (("--game", "grpo", "--reward", "math", "--data", "asks.jsonl"),
                          "tokenizer_config.json")):
        done = command(selfplay, tmp_path, "--model", "big", *flags, "--device", "cpu", "--dry-run")
        assert done.returncode == 2 and "at the most" in done.stdout
        assert f"{lacks} is missing; so no step was timed" in done.stderr


def test_the_plan_is_shown(small, monkeypatch, capsys):
    """Each use, the peak, and the peak of each of several processes."""
    monkeypatch.setattr(memory, "free", lambda device: 2**40)
    memory.check(lambda other, n: plan_of(small, processes=n)[0], "cpu", show=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[2].strip() for line in lines[:-1]] == [*plan_of(small)[0],
                                                                    "at the most"]
    assert lines[-2].endswith("GiB of 1024.00 GiB free on cpu")
    assert lines[-1] == "    each process, GiB: 0.00 of 2, 0.00 of 4, 0.00 of 8"
    memory.check(lambda other, n: plan_of(small)[0], "cpu")
    assert capsys.readouterr().out == ""


def test_free_memory_of_this_machine():
    """It is told on Linux."""
    free = memory.free("cpu")
    assert free is None or 2**20 < free < 2**50
