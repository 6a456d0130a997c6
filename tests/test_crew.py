"""Several processes on the CPU: they give the same losses and weights as one process alone.

A run can go on with as many processes as before, or with another number of them. It ends when one
of them dies.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, read_lines

import model as llama
import selfplay
import spin
from support import console, learning, machine, runs

# Several crews, each in its folder. All of their processes are forked from this one, as it takes
# long to start each by itself. What torchrun would tell them is in the environment.
#   updates: two updates on given games, with two ways of adding up, and four on given pairs, in
#            both games of spin.py: by two processes, by four, and by one alone. Two blocks of the
#            model are enough. The losses and weights are written to a folder.
#   joined:  selfplay.py goes on with a run that one process alone began.
#   pairs:   see PAIRS.
CREWS = """
import copy, json, os, random, runpy, signal, sys, traceback
import torch, torch.distributed as dist, torch.distributed.fsdp
import model as llama, selfplay, spin
from support import learning, machine

torch.set_num_threads(1)
args = selfplay.parse_args([
    "--model", sys.argv[1], "--device", "cpu", "--queries", "8", "--answers", "4", "--kl", "0.1",
    "--micro-batch", "96"])
tiny, tokenizer = llama.load(args.model)
game = selfplay.Game(**dict.fromkeys(selfplay.Game._fields) | {
    "model": tiny, "tokenizer": tokenizer, "prompt": selfplay.challenger_prompt(tokenizer),
    "generator": torch.Generator().manual_seed(5), "crew": machine.Crew()})
rows, answers, challenger, solver = selfplay.play(game, args)  # all have the same games
tiny.blocks, tiny.config.num_hidden_layers = tiny.blocks[:2], 2
tiny.raw["num_hidden_layers"] = 2
torch.manual_seed(0)
reward, quality = torch.rand(8, 4), torch.rand(8, 4)


def updates(crew, aggregate):
    model, reference = copy.deepcopy(tiny), copy.deepcopy(tiny).requires_grad_(False)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.01)
    if aggregate == "lora":  # each process has all frozen weights
        llama.adapt(model, 4)
    elif crew.size > 1:  # both compute in float32, on the CPU
        machine.shard(model)
        machine.shard(reference)
    # As if each process had played its share of the queries: see selfplay.play.
    shares = llama.groups(challenger.completions[0], args.queries // crew.size)
    asked = challenger._replace(prompts=challenger.prompts * crew.size, completions=shares)
    selfplay.play = lambda game, args: (rows, answers, asked, solver)
    own = game._replace(
        model=model, reference=reference, crew=crew,
        optimizer=learning.optimizer_for(model, torch.optim.SGD, lr=0.1),
        referee=lambda q, a: crew.share(reward), judge=lambda q, a: crew.share(quality),
        pay=selfplay.PAY["minimax"])
    args.aggregate = "sum" if aggregate == "lora" else aggregate
    for _ in range(2):
        step = selfplay.step(own, args)
    folder = f"{crew.size}-{aggregate}"
    llama.save(model, folder)
    if not crew.rank:
        assert torch.equal(step.reward, reward) and torch.equal(step.quality, quality)
        figures = {f"{name} of {who}": value for who, terms in step.losses.items()
                   for name, value in terms.items()}
        torch.save(figures | {"norm": step.norm}, folder + "/figures.pt")


# In each epoch there is a batch of five pairs, and one of two. In some pairs both answers are
# equal, so a batch may have fewer different ones than there are processes.
data = spin.language_data(7)
known = [tokenizer.reply(row.messages, row.answer, tiny.end_ids) for row in data]
pairs = [spin.Pair(tokenizer.chat(row.messages), known[i], known[i - (i not in (1, 4, 5))])
         for i, row in enumerate(data)]


def pair_updates(crew, name):
    model, game = copy.deepcopy(tiny), "spin" if name == "spin with lora" else name
    if game != name:
        llama.adapt(model, 4)
    elif crew.size > 1:
        machine.shard(model)
    own = spin.Game(**dict.fromkeys(spin.Game._fields) | {
        "player": model, "tokenizer": tokenizer, "data": data, "rng": random.Random(0),
        "crew": crew})
    args = spin.parse_args(["--model", sys.argv[1], "--game", game, "--device", "cpu", "--batch",
                            "5", "--epochs", "2", "--lr", "0.1", "--micro-batch", "96"])
    with machine.resident(model):
        ref = spin.all_logprobs(model, pairs, args.micro_batch, crew)
    it = spin.Iteration(0, 0, None, range(7), pairs, ref)
    spin.show_pair(own, args, it)  # as at the end of the iteration before
    optimizer = learning.optimizer_for(model, torch.optim.SGD, lr=0.1)
    figures = list(spin.player_trains(own, args, it, optimizer))
    folder = f"{crew.size}-{name}"
    llama.save(model, folder)
    if not crew.rank:
        with open(folder + "/figures.json", "w") as file:
            json.dump([ref.tolist(), figures], file)


def updates_of_all_kinds(crew=None):
    several = crew is None
    if several:
        crew, _ = machine.join("cpu")
    for aggregate in ("sum", "token", "lora"):
        updates(crew, aggregate)
    for name in ("spin", "sft", "spin with lora"):
        pair_updates(crew, name)
    if several:
        machine.leave(crew)


def script(path, *words):
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


CREWS = [  # processes, folder, what they do
    (2, "updates", updates_of_all_kinds), (4, "updates", updates_of_all_kinds),
    (2, "joined", lambda: script(selfplay.__file__, "--resume", "runs/a")),
    (2, "pairs", lambda: script(
        "pairs.py", "--model", args.model, "--device", "cpu", "--iterations", "2", "--pairs", "13",
        "--batch", "5", "--epochs", "1", "--eval-items", "2", "--save-every", "2"))]


def one_of(size, rank, pipe, folder, play):
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": os.read(pipe, 5).decode(), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        play()
        os._exit(0)  # run_command ends one of several processes in this way, too
    except BaseException:
        traceback.print_exc()
        os._exit(1)


crew_of, pipes, stores, failed = {}, [], [], False
for size, folder, play in CREWS:
    pipes.append(os.pipe())
    for rank in range(size):
        child = os.fork()
        if not child:
            one_of(size, rank, pipes[-1][0], folder, play)
        crew_of[child] = pipes[-1]
# Only now: a store is a thread, and whoever is forked while it holds a lock would wait for ever.
for (size, _, _), (_, pipe) in zip(CREWS, pipes):
    stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    os.write(pipe, size * f"{stores[-1].port:5}".encode())
os.chdir("updates")
updates_of_all_kinds(machine.Crew())
while crew_of:
    child, code = os.wait()
    ended = crew_of.pop(child)
    for other, pipe in crew_of.items():
        if code and pipe == ended:  # the others would wait for it
            os.kill(other, signal.SIGKILL)
    failed |= code > 0
sys.exit(failed)
"""

# A user's reward. By the environment, one process dies in the fifth step, or the first process has
# torchrun stop the run in the third step that it plays.
MINE = """
import os, signal, time
from support import report
if "RANK" in os.environ:
    report.picture = lambda runs, path: False  # it would take longer than the few steps
steps = 0

def mine(queries, answers):
    global steps
    steps += 1
    luck, rank = os.environ.get("LUCK"), os.environ.get("RANK")
    if luck == "out" and rank == "1" and steps == 5:
        raise ValueError("out of luck")
    if luck == "stopped" and rank == "0" and steps == 3:
        arrived = []
        ask = signal.signal(signal.SIGTERM, lambda *which: arrived.append(which))
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun passes it on
        while not arrived:
            time.sleep(0.005)
        signal.signal(signal.SIGTERM, ask)
        ask(*arrived[0])
    return [[float(len(answer) % 3) for answer in group] for group in answers]
"""

# A run of spin.py, by several processes: whole; stopped while the opponent answers;
# gone on with, and stopped in the middle of an iteration; gone on with to its end. Each time one
# process alone gets the signal. The processes play all of that, as it takes long to start them.
PAIRS = """
import os, shutil, signal, sys
from collections import Counter
import torch.distributed as dist
import model as llama, spin
from support import learning, machine, report

report.picture = lambda runs, path: False
llama.ROOM = 90  # one or two prompts at a time: the processes do not come equally far
crew, _ = machine.join("cpu")
machine.leave = lambda crew: dist.barrier()
calls, answers, take, said = Counter(), spin.opponent_answers, learning.take, sys.stdout


def join(device):
    dist.barrier()
    return crew, device


def count(what):
    calls[what] += 1
    if due == (crew.rank, what, calls[what]):
        signal.raise_signal(signal.SIGTERM)


def counted_answers(*args):
    for batch in answers(*args):
        count("batch")
        yield batch
    seed = args[-1].initial_seed()
    print(f"process {crew.rank}: {calls['batch']} batches, seed {seed}", file=said, flush=True)


def counted_take(optimizer, crew):
    count("update")
    return take(optimizer, crew=crew)


machine.join, learning.take, spin.opponent_answers = join, counted_take, counted_answers
for due, words in ((None, [*sys.argv[1:], "--run", "whole"]),
                   ((1, "batch", 2), [*sys.argv[1:], "--run", "cut"]),
                   ((0, "update", 5), ["--resume", "runs/cut"]),
                   (None, ["--resume", "runs/cut"])):
    calls.clear()
    spin.main(words)
    if due and due[1] == "update" and not crew.rank:
        shutil.copytree("runs/cut", "runs/alone")
sys.stdout.flush()
os._exit(0)
"""

FLAGS = ("--model", str(ROOT / "tiny"), "--device", "cpu", "--queries", "4", "--answers", "2",
         "--save-every", "2", "--eval-items", "4", "--query-tokens", "24", "--answer-tokens", "12")


def start(folder, *words, **environment):
    """Start python with these words in a folder, as a process that can be stopped as a whole."""
    environment = os.environ | environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def two(folder, *flags, script=ROOT / "selfplay.py", **environment):
    """Start selfplay.py, or another script, with these flags, played by two processes."""
    return start(folder, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--", script, *flags,
                 **environment)


class Killed(BaseException):
    """Like SIGKILL: nothing catches it, and nothing is saved."""


def killed_in_step(number, folder, *flags):
    """Play a run in this process, alone, until it is killed before this step's update."""
    real, calls = learning.take, []

    def take(optimizer, crew=machine.Crew()):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return real(optimizer, crew=crew)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(learning, "take", take)
        command(selfplay, folder, *flags)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """{name: (folder, process)}: what some of the tests wait for, started at the same time."""
    found = {}

    def folder_of(name):
        return tmp_path_factory.mktemp(name)
    folder = folder_of("died")
    (folder / "mine.py").write_text(MINE)
    found["died"] = folder, two(folder, *FLAGS, "--reward", "mine.py:mine", "--steps", "8",
                                "--run", "a", LUCK="out")
    folder = folder_of("crews")
    for name in ("updates", "joined", "pairs"):
        (folder / name).mkdir()
    killed_in_step(3, folder / "joined", *FLAGS, "--steps", "4", "--run", "a")
    (folder / "pairs" / "pairs.py").write_text(PAIRS)
    (folder / "crews.py").write_text(CREWS)
    found["crews"] = folder, start(folder, "crews.py", ROOT / "tiny")
    yield found
    for _, process in found.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun then ends its own processes
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def crews(jobs):
    """The folder of the crews, once all of them have played."""
    folder, process = jobs["crews"]
    _, said = process.communicate(timeout=120)
    said += "".join(path.read_text() for path in folder.glob("*/err"))
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def died(jobs):
    """(the folder of a run of two processes, of which one died in step 5; what it said)."""
    folder, process = jobs["died"]
    began = time.time()
    _, said = process.communicate(timeout=100)
    assert process.returncode
    assert time.time() - began < 60
    return folder / "runs" / "a", said


def steps_of(run):
    """(metrics without their seconds, games) of a run of which each step has one line in each.

    No two processes played the same queries.
    """
    metrics, games = read_lines(run / "metrics.jsonl"), read_lines(run / "games.jsonl")
    numbers = list(range(1, len(metrics) + 1))
    assert [row["step"] for row in metrics] == [line["step"] for line in games] == numbers
    for row, line in zip(metrics, games):
        del row["seconds"]
        queries = [game["query"] for game in line["games"]]
        assert len(queries) == 4
        assert queries[:2] != queries[2:]
    return metrics, games


def test_one_that_dies_ends_the_run_with_its_reason(died):
    """The others do not wait for it. What was saved before is whole."""
    run, said = died
    line = MINE.splitlines().index('        raise ValueError("out of luck")') + 1
    assert f"the reward mine failed: ValueError: out of luck (mine.py, line {line})" in said
    for path, step in ((run / runs.CHECKPOINT, 4), (learning.previous(run / runs.CHECKPOINT), 2)):
        assert learning.read_state(path)[0]["step"] == step
    assert len(steps_of(run)[0]) == 4


def test_a_run_of_two_goes_on_with_two_and_then_alone(died, tmp_path):
    """Two processes go on to the same bits. SIGTERM to torchrun stops them: they save.

    One process alone then plays the run to its end.
    """
    before, _ = died
    run = shutil.copytree(before, tmp_path / "runs" / "a")
    shutil.copy(before.parent.parent / "mine.py", tmp_path)
    process = two(tmp_path, "--resume", f"runs/a/{runs.CHECKPOINT}.previous", LUCK="stopped")
    out, said = process.communicate(timeout=100)
    assert "on from step 2 of runs/a" in out and "stopped after step 5" in out, said
    (metrics, games), (old_metrics, old_games) = steps_of(run), steps_of(before)
    assert len(metrics) == 5
    assert metrics[:4] == old_metrics and games[:4] == old_games
    # After step 4: weights, the optimizer's state, and both generators.
    tensors = learning.read_state(learning.previous(run / runs.CHECKPOINT))[1]
    old_tensors = learning.read_state(before / runs.CHECKPOINT)[1]
    assert len(tensors["generator"]) == 2
    assert learning.checksum(tensors) == learning.checksum(old_tensors)
    facts, _ = learning.read_state(run / runs.CHECKPOINT)
    assert facts["step"] == 5
    llama.load(run / "model")  # something to look at

    done = command(selfplay, tmp_path, "--resume", "runs/a")
    assert done.returncode == 0, done.stderr
    assert "on from step 5 of runs/a" in done.stdout
    metrics, _ = steps_of(run)
    assert len(metrics) == 8
    assert metrics[:4] == old_metrics
    llama.load(run / "model")
    assert not list(run.glob("checkpoint*"))


def test_a_run_of_one_goes_on_with_two(crews):
    """One of them writes, and one speaks: there is one scoreboard."""
    out = (crews / "joined" / "out").read_text()
    assert out.count("on from step 2") == out.count("win rate against") == 1
    run = crews / "joined" / "runs" / "a"
    assert len(steps_of(run)[0]) == 4
    llama.load(run / "model")
    assert not list(run.glob("checkpoint*"))


def distance(model, other):
    """The largest difference between two weights."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.fixture(scope="module")
def two_blocks():
    """The model of the updates, before them."""
    model, _ = llama.load(ROOT / "tiny")
    model.blocks = model.blocks[:2]
    return model


def test_the_same_updates_as_one_process(crews, two_blocks):
    """Two updates on the same games, by one, by two and by four processes.

    Losses, KL, gradient norm and weights are the same within small tolerances.
    """
    folder = crews / "updates"
    for aggregate in ("sum", "token", "lora"):
        alone, _ = llama.load(folder / f"1-{aggregate}")
        figures = torch.load(folder / f"1-{aggregate}" / "figures.pt")
        norm = figures.pop("norm")
        assert len(figures) == 6 and figures["loss of solver"] != 0
        assert distance(alone, two_blocks) > 1e-3
        for processes in (2, 4):
            model, _ = llama.load(folder / f"{processes}-{aggregate}")
            assert distance(alone, model) < 1e-5
            theirs = torch.load(folder / f"{processes}-{aggregate}" / "figures.pt")
            assert theirs.pop("norm") == pytest.approx(norm, rel=1e-4)
            assert theirs == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_the_same_updates_on_pairs_as_one_process(crews, two_blocks):
    """Both games of spin.py, by one, by two and by four processes.

    No batch can be shared out evenly, and in some a process has no pair at all.
    """
    folder = crews / "updates"
    for name in ("spin", "sft", "spin with lora"):
        alone, _ = llama.load(folder / f"1-{name}")
        assert distance(alone, two_blocks) > 1e-3
        ref, figures = json.loads((folder / f"1-{name}" / "figures.json").read_text())
        assert len(figures) == 4 and figures[0]["loss"] != figures[2]["loss"]
        for processes in (2, 4):
            model, _ = llama.load(folder / f"{processes}-{name}")
            assert distance(alone, model) < 1e-5
            text = (folder / f"{processes}-{name}" / "figures.json").read_text()
            other_ref, others = json.loads(text)
            assert torch.allclose(torch.tensor(other_ref), torch.tensor(ref), atol=1e-5)
            for row, other in zip(figures, others, strict=True):
                del row["seconds"], other["seconds"]
                assert other == pytest.approx(row, rel=1e-5, abs=1e-5)
                row["seconds"] = 0


def test_spin_by_two_is_stopped_and_goes_on_to_the_same_bits(crews):
    """Stopped while the opponent answers, and in the middle of an iteration.

    Each time one of the processes gets the signal, and both stop. Or one alone plays it to the end.
    """
    folder = crews / "pairs"
    out = (folder / "out").read_text()
    assert "stopped in iteration 0, while the opponent answered: 5 of 13 answers are kept" in out
    assert "on from update 0 of runs/cut" in out and "on from update 5 of runs/cut" in out
    assert "stopped in iteration 1; the player as it is" in out
    first, second = (re.findall(rf"process {rank}: (\d+) batches, seed (\d+)", out)
                     for rank in (0, 1))
    assert first[0][1] == "0" != second[0][1]  # each has its own random numbers
    assert [batches for batches, _ in first] != [batches for batches, _ in second]

    def left(name, iterations=(0, 1)):
        run = folder / "runs" / name
        metrics = [{**row, "seconds": 0} for row in read_lines(run / "metrics.jsonl")]
        weights = [(run / f"iteration-{t}" / "model.safetensors").read_bytes() for t in iterations]
        return metrics, weights, (run / "games.jsonl").read_bytes()
    assert len(left("whole")[0]) == 3 + 6
    assert left("cut") == left("whole")
    assert not list((folder / "runs" / "cut").glob("checkpoint*"))
    _, tensors = learning.read_state(folder / "runs" / "alone" / runs.CHECKPOINT)
    assert len(tensors["generator"]) == 2
    done = command(spin, folder, "--resume", "runs/alone")
    assert done.returncode == 0, done.stderr
    metrics, _, games = left("alone")
    assert games == left("whole")[2] and metrics[:5] == left("whole")[0][:5]
    for row, other in zip(metrics, left("whole")[0], strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-3)


def test_a_runs_settings_do_not_say_who_played_it(died, crews):
    alone, several = (json.loads((run / "settings.json").read_text())
                      for run in (crews / "joined" / "runs" / "a", died[0]))
    changed = {"steps": 8, "reward": "mine.py:mine", "date": several["date"]}
    assert alone | changed == several


def test_queries_that_cannot_be_shared_out_are_refused(tmp_path, monkeypatch):
    """Before anything is written."""
    monkeypatch.setattr(machine, "join", lambda device: (machine.Crew(0, 2), device))
    for flags in (["--queries", "3"], ["--dry-run"]):
        done = command(selfplay, tmp_path, *FLAGS, *flags)
        assert done.returncode == 2 and "share --queries out evenly" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_one_of_several_ends_without_the_interpreters_own_end(monkeypatch, capsys):
    """One of several processes ends with os._exit, as gloo's threads may abort a normal exit.

    A process alone returns its exit code.
    """
    def fails():
        raise console.UserError("no luck")
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("RANK", raising=False)
    assert console.run_command(fails) == 2
    assert not ended
    monkeypatch.setenv("RANK", "1")
    console.run_command(fails)
    assert ended == [2]
    assert "no luck" in capsys.readouterr().err
