"""Several processes on the CPU: they give the same losses and weights as one process alone.

A run goes on with as many processes as before, or with another number. It ends when one dies.
"""
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, read_lines

import model as llama
import selfplay
from support import console, machine, runs

# Commands of several processes, one after the other. They are forked from one process that has
# imported everything, which saves the time to start each. Their environment tells them what
# torchrun would. argv: a JSON list of jobs [processes, folder, words]; [] means `updates`, below.
LAUNCH = """
import copy, json, os, sys, traceback
sys.path.insert(0, {root!r})
import matplotlib.figure
import torch
import torch.distributed as dist
import torch.distributed.device_mesh, torch.distributed.fsdp, torch.distributed.tensor
import model as llama, selfplay
from support import console, learning, machine
torch.set_num_threads(1)


def updates():
    # Two steps on given games, with two ways of adding up. Every process has all games, and scores
    # and trains its share. The first one writes losses and weights to a folder.
    crew, device = machine.join("cpu")
    args = selfplay.parse_args(["--model", {root!r} + "/tiny", "--queries", "8", "--answers", "4",
                                "--kl", "0.1", "--micro-batch", "96", "--device", "cpu"])
    real_play = selfplay.play
    for aggregate in ("sum", "token"):
        args.aggregate = aggregate
        model, tokenizer = llama.load(args.model)
        nothing = dict.fromkeys(selfplay.Game._fields)
        alone = selfplay.Game(**nothing | dict(
            model=model, tokenizer=tokenizer, crew=machine.Crew(),
            prompt=selfplay.challenger_prompt(tokenizer),
            generator=torch.Generator().manual_seed(5)))
        queries, answers, challenger, solver = real_play(alone, args)  # the same for all
        torch.manual_seed(0)
        reward, quality = torch.rand(8, 4), torch.rand(8, 4)
        reference = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(1.01)
        if crew.size > 1:  # both compute in float32, on the CPU
            machine.shard(model), machine.shard(reference)
        optimizer = learning.optimizer_for(model, torch.optim.SGD, lr=0.1)
        # The Challenger's queries as each process would have sampled its own: see selfplay.play.
        asked = challenger._replace(
            prompts=challenger.prompts * crew.size,
            completions=llama.groups(challenger.completions[0], 8 // crew.size))
        selfplay.play = lambda game, args: (queries, answers, asked, solver)
        game = alone._replace(
            model=model, reference=reference, optimizer=optimizer, crew=crew,
            referee=lambda q, a: crew.share(reward), judge=lambda q, a: crew.share(quality))
        for _ in range(2):
            step = selfplay.step(game, args)
        folder = f"{{crew.size}}-{{aggregate}}"
        llama.save(model, folder)
        if not crew.rank:
            assert torch.equal(step.reward, reward) and torch.equal(step.quality, quality)
            torch.save((step.losses, step.norm), folder + "/losses.pt")
    machine.leave(crew)


def child(rank, size, pipe, folder, words):
    port = os.read(pipe, 5).decode()
    if size > 1:
        os.environ |= {{"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}}
    os.chdir(folder)
    sys.argv = ["selfplay.py", *words]
    os._exit(console.run_command(lambda: selfplay.main(words) if words else updates()))


for size, folder, words in json.loads(sys.argv[1]):
    children, pipe = [], os.pipe()
    for rank in range(size):
        children.append(os.fork())
        if not children[-1]:
            try:
                child(rank, size, pipe[0], folder, words)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    # Only now: a store is a thread, and who is forked while it holds a lock may wait for ever.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(pipe[1], size * f"{{store.port:5}}".encode())
    if any([os.waitpid(pid, 0)[1] for pid in children]):
        sys.exit(f"{{size}} processes failed: {{words}}")
    del store
"""


def start(*words, cwd):
    """A Python command, started."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def launch(*jobs, cwd):
    """Jobs (processes, folder, words), started one after the other: see LAUNCH."""
    jobs = [(size, str(folder), [*map(str, words)]) for size, folder, words in jobs]
    return start("-c", LAUNCH.format(root=str(ROOT)), json.dumps(jobs), cwd=cwd)


def ended(process):
    """(exit code, stdout, stderr) of a started command."""
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


# A reward that fails in its third call, in the last process, as long as there is a file "fails".
REWARD = """
import os
calls = []
def mine(queries, answers):
    calls.append(1)
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    if len(calls) == 3 and last and os.path.exists("fails"):
        raise ValueError("out of luck")
    return [[len(a) / 10 for a in group] for group in answers]
"""
FLAGS = ("--model", str(ROOT / "tiny"), "--device", "cpu", "--game", "lsp-zero", "--queries", "4",
         "--answers", "2", "--steps", "4", "--save-every", "1", "--reward", "mine.py:mine")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A folder of runs, with what torchrun said and how long it took.

    runs/two: of two processes, of which one died in step 3. runs/one: of one process, broken off
    there, too. runs/whole: of two, undisturbed. Beside them, what `updates` wrote.
    """
    folder = tmp_path_factory.mktemp("crew")
    (folder / "mine.py").write_text(REWARD)
    shutil.copytree(folder, folder / "fine")
    (folder / "fails").touch()
    # Not beside the others: its threads would wait for theirs.
    one = command(selfplay, folder, *FLAGS, "--run", "one")
    assert one.returncode == 2 and "out of luck" in one.stderr
    began = time.time()
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--", ROOT / "selfplay.py")
    two = start(*torchrun, *FLAGS, "--run", "two", cwd=folder)
    rest = launch((2, folder / "fine", [*FLAGS, "--run", "whole"]), (1, folder, []),
                  (2, folder, []), (4, folder, []), cwd=folder)
    code, _, said = ended(two)
    seconds = time.time() - began
    assert code
    code, out, err = ended(rest)
    assert code == 0 and out.count("4 steps in") == 1, err  # the first process speaks for all
    (folder / "fine" / "runs" / "whole").rename(folder / "runs" / "whole")
    return folder, said, seconds


def test_the_same_updates_as_one_process(played):
    """The same games, two updates: losses, gradient norm and weights within 1e-5, by 2 and by 4."""
    folder, *_ = played
    before, _ = llama.load(ROOT / "tiny")
    for aggregate in ("sum", "token"):
        alone, _ = llama.load(folder / f"1-{aggregate}")
        losses, norm = torch.load(folder / f"1-{aggregate}" / "losses.pt")
        assert distance(alone, before) > 1e-3 and losses["solver"]["loss"] != 0
        for processes in (2, 4):
            model, _ = llama.load(folder / f"{processes}-{aggregate}")
            assert distance(alone, model) < 1e-5
            theirs, their_norm = torch.load(folder / f"{processes}-{aggregate}" / "losses.pt")
            assert their_norm == pytest.approx(norm, rel=1e-4)
            for name in losses:
                assert theirs[name] == pytest.approx(losses[name], rel=1e-4, abs=1e-6)


def distance(a, b):
    """The largest difference of two models' weights."""
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))


def test_one_that_dies_ends_the_run_with_its_reason(played):
    """torchrun does not wait for the others, and the last checkpoint stays."""
    folder, said, seconds = played
    assert "the reward mine failed: ValueError: out of luck (mine.py, line 8)" in said
    assert seconds < 90 and (folder / "runs" / "two" / runs.CHECKPOINT).is_file()


@pytest.fixture(scope="module")
def resumed(played, tmp_path_factory):
    """The runs that were broken off, each gone on with: {(processes before, after): folder}."""
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "mine.py").write_text(REWARD)
    copies = {("two", 2): "two", ("two", 1): "two-by-one", ("one", 2): "one"}
    for (first, _), name in copies.items():
        shutil.copytree(played[0] / "runs" / first, folder / "runs" / name)
    alone = command(selfplay, folder, "--resume", "runs/two-by-one")
    assert alone.returncode == 0 and "on from step 2" in alone.stdout, alone.stderr
    code, out, err = ended(launch((2, folder, ["--resume", "runs/two"]),
                                  (2, folder, ["--resume", "runs/one"]), cwd=folder))
    assert code == 0 and out.count("on from step 2") == out.count("2 steps in") == 2, err
    return {key: folder / "runs" / name for key, name in copies.items()}


@pytest.mark.parametrize("first, second", [("two", 2), ("two", 1), ("one", 2)])
def test_a_run_goes_on_with_any_number_of_processes(resumed, first, second):
    """One writer, and one line a step over all games."""
    folder = resumed[first, second]
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    games = read_lines(folder / "games.jsonl")
    assert len(games) == 4 and all(len(line["games"]) == 4 for line in games)
    texts = [[game["query"] for game in line["games"]] for line in games]
    assert all(queries[:2] != queries[2:] for queries in texts)  # no two play the same games
    llama.load(folder / "model")


def test_as_many_processes_as_before_go_on_to_the_same_bits(played, resumed):
    """Each of them goes on with its own generator."""
    for name in ("model/model.safetensors", "games.jsonl"):
        whole = (played[0] / "runs" / "whole" / name).read_bytes()
        assert (resumed["two", 2] / name).read_bytes() == whole


def test_queries_that_cannot_be_shared_out_are_refused(tmp_path, monkeypatch):
    """Before anything is written."""
    monkeypatch.setattr(machine, "join", lambda device: (machine.Crew(0, 2), device))
    for flags in (["--queries", "3"], ["--dry-run"]):
        done = command(selfplay, tmp_path, "--model", str(ROOT / "tiny"), *flags)
        assert done.returncode == 2 and "share --queries out evenly" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_one_of_several_ends_without_the_interpreters_own_end(monkeypatch, capsys):
    """There gloo's threads may abort it. A process alone returns its exit code."""
    def fails():
        raise console.UserError("no luck")
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.delenv("RANK", raising=False)
    assert console.run_command(fails) == 2 and not codes
    monkeypatch.setenv("RANK", "1")
    console.run_command(fails)
    assert codes == [2] and "no luck" in capsys.readouterr().err
