"""Both games on a pretend GPU (tests/pretend.py): no mixture of devices, and few waits for it."""
import copy
import inspect
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import HALF, ROOT, command, random_llama, read_lines
from pretend import pretend

import evaluate
import model as llama
import selfplay
import spin
from rewards import QualityReward, RewardModel, WrittenQuality, last_states
from support import learning, machine, memory
from support.console import UserError
from tiny import language

QUERIES = language.evaluation_set(4)
COMMON = ("--model", str(HALF), "--eval-items", "4", "--micro-batch", "128",
          "--answer-tokens", "12")
GRPO = (*COMMON, "--queries", "4", "--answers", "4")
LSP = (*GRPO, "--query-tokens", "16")
SPIN = (*COMMON, "--pairs", "12", "--batch", "6", "--iterations", "1", "--epochs", "1")


@pytest.fixture
def gpu():
    with pretend("cuda") as gpu:
        yield gpu


# --------------------------------------------------------------------------------------------------
# The tool itself

@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_it_answers_like_a_gpu(kind):
    with pretend(kind):
        here = torch.device(kind, 0)
        x = torch.ones(2, 3, device=kind)
        with torch.device(kind):
            made = torch.zeros(2)
        found = [x, made, x.sum(), x[0], x.new_zeros(1), torch.zeros_like(x), copy.deepcopy(x),
                 x + torch.tensor(2.0), torch.ones(2).to(kind), torch.ones(2).to(x), x @ x.T,
                 torch.tensor([1], device=x.device), torch.nn.Linear(2, 2).to(kind).weight]
        assert [t.device for t in found] == [here] * len(found)
        assert x.is_cuda == (kind == "cuda") and x.is_mps == (kind == "mps") and not x.is_cpu
        back = [x.cpu(), x.to("cpu"), torch.ones(2), torch.zeros_like(x, device="cpu")]
        assert [t.device.type for t in back] == ["cpu"] * len(back)
        assert torch.Generator(kind).device == here and torch.Generator().device.type == "cpu"
        w = torch.ones(3, device=kind, requires_grad=True)
        (x @ w).sum().backward()
        assert w.grad.device == here and w.grad.tolist() == [2.0, 2.0, 2.0]
    assert torch.ones(1).device.type == "cpu"


@pytest.mark.parametrize("mix", [
    lambda x, i: x + torch.ones(3), lambda x, i: x @ torch.ones(3, 3), lambda x, i: x.add_(i),
    lambda x, i: torch.cat([x[0], torch.ones(3)]), lambda x, i: torch.ones(3)[i.to("cuda")],
    lambda x, i: x.index_select(0, i), lambda x, i: torch.ones(3).add_(x[0, 0]),
    lambda x, i: torch.stack([x[0, 0], torch.tensor(1.0)]), lambda x, i: x.gather(1, i[None]),
    lambda x, i: x.index_add(0, i, x[:2]), lambda x, i: x[0].numpy(), lambda x, i: x.pin_memory(),
    lambda x, i: torch.multinomial(x, 1, generator=torch.Generator()),
    lambda x, i: torch.nn.functional.embedding(i, x), lambda x, i: torch.ones(1, device="cuda:1"),
])
def test_a_mixture_of_devices_is_refused(mix, gpu):
    with pytest.raises((RuntimeError, TypeError), match="device|numpy|pinned"):
        mix(torch.ones(3, 3, device="cuda"), torch.tensor([0, 1]))


@pytest.mark.parametrize("why, work", [
    ("item", lambda x: x[0].item()), ("item", lambda x: bool(x.sum() > 0)),
    ("item", lambda x: 1 if x.any() else 0), ("tolist", lambda x: x.tolist()),
    ("download", lambda x: x.cpu()), ("equal", lambda x: torch.equal(x, x)),
    ("unique", lambda x: x.unique()), ("nonzero", lambda x: x.nonzero()),
    ("boolean index", lambda x: x[x > 1]), ("upload", lambda x: x[torch.tensor([0])]),
    ("upload", lambda x: torch.tensor([1], device="cuda")), ("upload", lambda x: x[[0, 1]]),
    (None, lambda x: torch.multinomial(x, 1)), (None, lambda x: x.masked_fill(x > 1, 0)),
    (None, lambda x: x[:1].cos() + 1), (None, lambda x: torch.isin(x, x[:1])),
    (None, lambda x: torch.ones(1).pin_memory().to("cuda", non_blocking=True)),
])
def test_a_wait_is_counted(why, work, gpu):
    x = torch.ones(3, device="cuda")
    work(x + 1)
    assert dict(gpu.forget()) == ({f"test_pretend.py <lambda>: {why}": 1} if why else {})


def test_an_upload_to_an_idle_gpu_waits_for_nothing(gpu):
    x = torch.tensor([1.0, 2.0], device="cuda")
    assert not gpu.waits
    x.cos()
    torch.tensor([1.0], device="cuda")
    assert gpu.waits.total() == 1


def test_apples_gpus_know_no_float64():
    with pretend("mps"):
        for work in (lambda: torch.ones(1, device="mps").double(),
                     lambda: torch.ones(1, dtype=torch.float64, device="mps"),
                     lambda: torch.ones(1, dtype=torch.float64).to("mps")):
            with pytest.raises(TypeError, match="float64"):
                work()


def spoiled(function, right, wrong):
    """A copy of a function with another piece of source."""
    module, source = inspect.getmodule(function), inspect.getsource(function)
    assert source.count(right) == 1
    names = dict(vars(module))
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), names)
    return names[function.__name__]


@pytest.mark.parametrize("where, function, right, wrong", [
    (llama, "states", ", device=packed.ids.device", ""),
    (llama, "generate", "for k in pad], device=device)", "for k in pad])"),
    (selfplay, "player_loss", ", device=lp.device", ""),
    (selfplay, "gradients", "(lengths)).to(device)", "(lengths))"),
    (learning, "take", ".item()", ".numpy()"),
])
def test_a_bug_in_a_copy_of_a_function_is_found(where, function, right, wrong, gpu, monkeypatch):
    args, game = set_up()
    monkeypatch.setattr(where, function, spoiled(getattr(where, function), right, wrong))
    if function == "generate":
        monkeypatch.setattr(selfplay, function, llama.generate)
    with pytest.raises((RuntimeError, TypeError), match="device"):
        selfplay.step(game, args)


def test_a_wait_that_is_new_is_found(gpu, monkeypatch):
    args, game = set_up()
    right = "M = len(advantage)"
    monkeypatch.setattr(selfplay, "player_loss", spoiled(
        selfplay.player_loss, right, "M, here = len(advantage), owner.unique()"))
    selfplay.step(game, args)
    assert gpu.waits["selfplay.py player_loss: unique"] > 1


# --------------------------------------------------------------------------------------------------
# LSP

def set_up(*flags, device="cuda"):
    """(settings, Game) of selfplay.py on the pretend device."""
    usual = GRPO if "grpo" in flags else LSP
    args = selfplay.parse_args([*usual, "--device", device, *flags])
    return args, selfplay.set_up(args, machine.check_device(device))


def state_of(optimizer):
    return [x for own in optimizer.state.values() for x in own.values()]


@pytest.mark.parametrize("device, flags", [
    ("cuda", ""), ("cuda", "--low-memory --dtype bfloat16"), ("cuda", "--low-memory --lora 2"),
    ("cuda", "--game grpo"), ("mps", ""), ("mps", "--low-memory --dtype bfloat16 --lora 2")])
def test_a_step_of_lsp_stays_on_its_device_and_hardly_waits(device, flags):
    """The waits that docs/reliability.md names: one for each sampled token, and seven a step.

    There are several micro-batches. None of them waits.
    """
    with pretend(device) as gpu:
        args, game = set_up(*flags.split(), device=device)
        assert len(llama.pack([[1] * 60] * 8, [[[1]]] * 8, args.micro_batch)) > 2
        gpu.forget()
        played = selfplay.step(game, args)
        players = [p for p in (played.challenger, played.solver) if p]
        tokens = sum(max(len(ids) for group in p.completions for ids in group) for p in players)
        expected = {"model.py generate: tolist": tokens, "learning.py take: item": 1,
                    "model.py generate: upload": 1,  # behind the last step's optimizer
                    "selfplay.py as_player: download": len(players),
                    "selfplay.py gradients: tolist": len(players)}
        # With LoRA the reference's weights are the player's: they stay where they are.
        offloaded = device == "cuda" and "--low-memory" in flags and "--lora" not in flags
        if game.judge:
            expected["rewards.py each_once: tolist"] = 1
        if offloaded:  # behind the upload of the judge
            expected["model.py padded: upload"] = 1
        assert gpu.forget() == expected
        trained = [*game.model.parameters(), *state_of(game.optimizer)]
        assert {t.device.type for t in trained} == {device}
        kept = {t.device.type for t in game.reference.parameters()}
        assert kept == {"cpu" if offloaded else device}
        assert not offloaded or all(p.is_pinned() for p in game.reference.parameters())
        assert played.reward.device.type == played.solver.logprobs.device.type == "cpu"
        with machine.resident(game.reference):
            rates = evaluate.rate(game.reference, game.tokenizer, QUERIES[:2], samples=2)
        assert all(R.device.type == "cpu" for R in rates.values())


def test_judges_and_reward_models_stay_on_their_device(tmp_path, gpu):
    judge, tokenizer = llama.load(ROOT / "tiny", "cuda")
    torch.manual_seed(0)
    readers = random_llama(architectures=["LlamaForSequenceClassification"], vocab_size=200,
                           max_position_embeddings=512)
    llama.save(readers, tmp_path / "reward")
    reader = RewardModel(tmp_path / "reward", "cuda")
    answers = [["a", "b b"]] * len(QUERIES)
    for frozen in (judge, reader.model):
        machine.offload(frozen)
    grade = QualityReward(judge, tokenizer)
    gpu.forget()
    assert grade(QUERIES, answers).device.type == "cpu"
    assert reader(QUERIES, answers).device.type == "cpu"
    # An upload stands behind that of the model, which comes for the length of a call.
    assert gpu.forget() == {"model.py padded: upload": 2, "rewards.py each_once: tolist": 2}
    written = WrittenQuality(judge, tokenizer, max_new_tokens=4)
    written.ids = lambda query, answer: tokenizer.chat([{"role": "user", "content": query}])
    assert written(QUERIES, answers).shape == (4, 2)
    assert gpu.forget() == {"model.py generate: upload": 1, "model.py generate: tolist": 4}
    with machine.resident(judge):
        wins = evaluate.PairJudge(judge, tokenizer)(QUERIES, ["a"] * 4, ["b b"] * 4)
        assert last_states(judge, [[1, 2], [1, 3]]).device.type == "cuda"
    assert wins.device.type == "cpu"
    assert {p.device.type for p in judge.parameters()} == {"cpu"}


def test_on_a_gpu_the_math_kernel_is_ruled_out(monkeypatch):
    """Where no fused kernel fits, attention raises there. The CPU's attention is left alone."""
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "enable_math_sdp", calls.append)
    machine.check_device("cpu")
    assert calls == []
    with pretend("cuda"):
        machine.check_device("cuda")
        assert calls == [False]


def interrupted(module, folder, flags, after):
    """Play a run, stop it by Ctrl-C in update `after`, and resume it. Returns its metrics."""
    take, calls = learning.take, []

    def one(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            signal.raise_signal(signal.SIGINT)
        return take(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "take", one)
        done = command(module, folder, *flags, "--run", "cut")
        assert done.returncode == 0 and len(calls) == after, done.stderr
    done = command(module, folder, "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    return read_lines(folder / "runs" / "cut" / "metrics.jsonl")


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("module, device, flags", [
    (selfplay, "cuda", (*LSP, "--steps", "2", "--eval-every", "2", "--low-memory")),
    (spin, "mps", (*SPIN, "--lora", "2"))], ids=["lsp", "spin"])
def test_a_run_is_stopped_and_resumed_on_a_gpu(module, flags, device, tmp_path):
    """It is the run of the CPU. To the bit on mps, which has the same attention and optimizer."""
    assert command(module, tmp_path, *flags, "--run", "whole", "--device", "cpu").returncode == 0
    whole = read_lines(tmp_path / "runs" / "whole" / "metrics.jsonl")
    with pretend(device):
        found = interrupted(module, tmp_path, (*flags, "--device", device), after=1)
    if device == "mps":
        assert without_seconds(found) == without_seconds(whole)
    else:
        losses = [[row.get("loss", row.get("loss_solver")) for row in rows]
                  for rows in (found, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# SPIN

@pytest.mark.parametrize("flags", ["", "--low-memory --dtype bfloat16", "--lora 2", "--game sft"])
def test_an_update_of_spin_hardly_waits(flags, gpu):
    """The waits that docs/reliability.md names: three an update, in several micro-batches."""
    args = spin.parse_args([*SPIN, "--device", "cuda", *flags.split()])
    game = spin.set_up(args)
    it = spin.new_iteration(game, args, 0, [], 0)
    gpu.forget()
    if args.game == "spin":
        it = spin.opponent_plays(game, args, it)
        tokens = max(len(pair.rival) for pair in it.pairs)
        assert gpu.forget() == {"model.py generate: upload": 1, "model.py generate: tolist": tokens,
                                "model.py padded: upload": 1, "spin.py all_logprobs: download": 1}
        assert it.ref.device.type == "cpu"
    optimizer = spin.rmsprop(game.player)
    updates = spin.player_trains(game, args, it, optimizer)
    next(updates)
    gpu.forget()
    next(updates)
    expected = {"learning.py take: item": 1}
    if args.game == "spin":
        expected |= {"spin.py spin_gradients: upload": 1, "spin.py spin_gradients: download": 1}
    else:
        expected |= {"model.py padded: upload": 1, "spin.py sft_gradients: tolist": 1}
    assert gpu.forget() == expected
    assert {t.device.type for t in game.player.parameters()} == {"cuda"}


# --------------------------------------------------------------------------------------------------
# Which device, and what it can compute

def without_mps(operations):
    """Those of PyTorch's operations that have no kernel for mps, by its own list of kernels."""
    torchgen = pytest.importorskip("torchgen", reason="a part of PyTorch's wheels")
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = re.split(r"^- func: ", path.read_text(encoding="utf-8"), flags=re.M)[1:]
    known = {entry.partition("(")[0]: entry for entry in entries}

    def has(name):
        delegate = re.search(r"structured_delegate: (\S+)", known[name])
        if delegate:
            return has(delegate[1])
        anywhere = re.search(r"^ .*\b(MPS|Composite\w+)\b.*:", known[name], flags=re.M)
        return "dispatch:" not in known[name] or anywhere
    return {name for name in operations if not has(name)}


def test_apples_gpus_have_all_operations_of_both_games():
    """By PyTorch's list. On mps attention is a kernel of its own, so the CPU's is left out."""
    with pretend("mps") as gpu:
        for flags in ((), ("--lora", "2", "--low-memory", "--dtype", "bfloat16")):
            args, game = set_up(*flags, device="mps")
            selfplay.step(game, args)
        args = spin.parse_args([*SPIN, "--device", "mps"])
        game = spin.set_up(args)
        it = spin.opponent_plays(game, args, spin.new_iteration(game, args, 0, [], 0))
        next(spin.player_trains(game, args, it, spin.rmsprop(game.player)))
    used = {name for name in gpu.operations if not name.endswith(("_for_cpu", "_for_cpu_backward"))}
    assert len(used) > 80 and without_mps(used) == set()
    assert without_mps({"_scaled_dot_product_flash_attention_for_cpu", "add.Tensor"}) == {
        "_scaled_dot_product_flash_attention_for_cpu"}

def test_the_default_device_is_the_best_there_is(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert machine.best_device() == best


@pytest.mark.parametrize("device, needs", [("cuda", "a newer GPU"), ("mps", "macOS 14")])
def test_a_device_without_bfloat16_says_so(device, needs):
    with pretend(device, bfloat16=False):
        machine.check_dtype(device, "float32")
        machine.check_dtype("cpu", "bfloat16")
        with pytest.raises(UserError, match=f"--dtype bfloat16 on {device} needs {needs}"):
            set_up("--dtype", "bfloat16", device=device)
        args = spin.parse_args([*SPIN, "--device", device, "--dtype", "bfloat16"])
        with pytest.raises(UserError, match="--dtype bfloat16"):
            spin.set_up(args)
    with pretend(device):
        machine.check_dtype(device, "bfloat16")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_what_does_not_fit_onto_a_gpu_is_refused(device):
    with pretend(device, memory=2**20):
        assert memory.free(device) == 2**20
        with pytest.raises(UserError, match=f"are free on {device}"):
            set_up(device=device)
