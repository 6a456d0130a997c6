"""Several processes on the CPU: they give the same losses and weights as one process alone.

A run can go on with as many processes as before, or with another number of them. It ends when one
of them dies.
"""
import json
import os
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
from support import console, learning, machine, runs

# Two updates on given games, with two ways of adding up: by two processes, by four, and by one
# alone. All of them are forked from one process, as it takes long to start each by itself. What
# torchrun would tell them is in the environment. The losses and weights are written to a folder.
UPDATE = """
import copy, os, sys, traceback
import torch, torch.distributed as dist, torch.distributed.fsdp
import model as llama, selfplay
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
torch.manual_seed(0)
reward, quality = torch.rand(8, 4), torch.rand(8, 4)


def updates(crew, aggregate):
    model, reference = copy.deepcopy(tiny), copy.deepcopy(tiny).requires_grad_(False)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.01)
    if crew.size > 1:  # both compute in float32, on the CPU
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
    args.aggregate = aggregate
    for _ in range(2):
        step = selfplay.step(own, args)
    folder = f"{crew.size}-{aggregate}"
    llama.save(model, folder)
    if not crew.rank:
        assert torch.equal(step.reward, reward) and torch.equal(step.quality, quality)
        figures = {f"{name} of {who}": value for who, terms in step.losses.items()
                   for name, value in terms.items()}
        torch.save(figures | {"norm": step.norm}, folder + "/figures.pt")


def one_of(size, rank, pipe):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": os.read(pipe, 5).decode(), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        crew, _ = machine.join("cpu")
        for aggregate in ("sum", "token"):
            updates(crew, aggregate)
        machine.leave(crew)
        os._exit(0)  # run_command ends one of several processes in this way, too
    except BaseException:
        traceback.print_exc()
        os._exit(1)


children, pipes, stores = [], {2: os.pipe(), 4: os.pipe()}, []
for size, (pipe, _) in pipes.items():
    for rank in range(size):
        children.append(os.fork())
        if not children[-1]:
            one_of(size, rank, pipe)
# Only now: a store is a thread, and whoever is forked while it holds a lock would wait for ever.
for size, (_, pipe) in pipes.items():
    stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    os.write(pipe, size * f"{stores[-1].port:5}".encode())
for aggregate in ("sum", "token"):
    updates(machine.Crew(), aggregate)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
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

FLAGS = ("--model", str(ROOT / "tiny"), "--device", "cpu", "--queries", "4", "--answers", "2",
         "--save-every", "2", "--eval-items", "4", "--query-tokens", "24", "--answer-tokens", "12")


def start(folder, *words, **environment):
    """Start python with these words in a folder, as a process that can be stopped as a whole."""
    environment = os.environ | environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def two(folder, *flags, **environment):
    """Start selfplay.py with these flags, played by two processes."""
    return start(folder, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--",
                 ROOT / "selfplay.py", *flags, **environment)


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
    """{name: (folder, process)}: what three of the tests wait for, started at the same time."""
    found = {}

    def folder_of(name):
        return tmp_path_factory.mktemp(name)
    folder = folder_of("died")
    (folder / "mine.py").write_text(MINE)
    found["died"] = folder, two(folder, *FLAGS, "--reward", "mine.py:mine", "--steps", "8",
                                "--run", "a", LUCK="out")
    folder = folder_of("joined")
    killed_in_step(3, folder, *FLAGS, "--steps", "4", "--run", "a")
    found["joined"] = folder, two(folder, "--resume", "runs/a")
    folder = folder_of("updates")
    (folder / "update.py").write_text(UPDATE)
    found["updates"] = folder, start(folder, "update.py", ROOT / "tiny")
    yield found
    for _, process in found.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun then ends its own processes
            process.communicate(timeout=60)


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


def test_a_run_of_one_goes_on_with_two(jobs):
    """One of them writes, and one speaks: there is one scoreboard."""
    folder, process = jobs["joined"]
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert out.count("on from step 2") == out.count("win rate against") == 1, said
    run = folder / "runs" / "a"
    assert len(steps_of(run)[0]) == 4
    llama.load(run / "model")
    assert not list(run.glob("checkpoint*"))


def distance(model, other):
    """The largest difference between two weights."""
    pairs = zip(model.parameters(), other.parameters())
    return max((a - b).abs().max().item() for a, b in pairs)


def test_the_same_updates_as_one_process(jobs, tiny):
    """Two updates on the same games, by one, by two and by four processes.

    Losses, KL, gradient norm and weights are the same within small tolerances.
    """
    folder, process = jobs["updates"]
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    for aggregate in ("sum", "token"):
        alone, _ = llama.load(folder / f"1-{aggregate}")
        figures = torch.load(folder / f"1-{aggregate}" / "figures.pt")
        norm = figures.pop("norm")
        assert len(figures) == 6 and figures["loss of solver"] != 0
        assert distance(alone, tiny[0]) > 1e-3
        for processes in (2, 4):
            model, _ = llama.load(folder / f"{processes}-{aggregate}")
            assert distance(alone, model) < 1e-5
            theirs = torch.load(folder / f"{processes}-{aggregate}" / "figures.pt")
            assert theirs.pop("norm") == pytest.approx(norm, rel=1e-4)
            assert theirs == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_a_runs_settings_do_not_say_who_played_it(died, jobs):
    alone, several = (json.loads((run / "settings.json").read_text())
                      for run in (jobs["joined"][0] / "runs" / "a", died[0]))
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
