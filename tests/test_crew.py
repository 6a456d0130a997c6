"""Several processes on the CPU: they give the same losses and weights as one process alone.

A run can go on with another number of processes, and it ends when one of them dies.
"""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, read_lines

import evaluate
import model as llama
import selfplay

# Two updates on given games, with two ways of adding up. Every process has all games and takes its
# share of them. The losses and the weights are written to a folder.
UPDATE = """
import copy, os, sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import model as llama, selfplay
from selfplay import Player

crew, device = llama.join("cpu")

def mine(player):
    finished = crew.share(player.finished)
    if len(player.prompts) == 1:
        return Player(player.prompts, [crew.share(player.completions[0])], finished)
    return Player(crew.share(player.prompts), crew.share(player.completions), finished)

for aggregate in ("sum", "token"):
    args = selfplay.parse_args([
        "--model", {root!r} + "/tiny", "--queries", "8", "--answers", "4", "--kl", "0.1",
        "--micro-batch", "96", "--aggregate", aggregate])
    model, tokenizer = llama.load(args.model)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.01)
    prompt, whole = selfplay.challenger_prompt(tokenizer), torch.Generator().manual_seed(5)
    # Every process plays with the same seed, so all have the same games.
    queries, answers, challenger, solver = selfplay.play(
        model, tokenizer, prompt, None, args, whole)
    torch.manual_seed(0)
    reward = torch.rand(8, 4)
    if crew.size > 1:  # both compute in float32, on the CPU
        llama.shard(model)
        llama.shard(reference)
    optimizer = llama.optimizer_for(model, torch.optim.SGD, lr=0.1)
    _, _, a_sol, a_ch = selfplay.score(
        crew.share(queries), crew.share(answers), lambda q, a: crew.share(reward), None, args, crew)
    players = selfplay.sides(mine(solver), mine(challenger), a_sol, a_ch, args)
    for _ in range(2):
        report, norm = selfplay.update(model, reference, optimizer, players, args, crew)
    folder = f"{{crew.size}}-{{aggregate}}"
    llama.save(model, folder)
    if not crew.rank:
        torch.save((report, norm), folder + "/report.pt")
llama.leave(crew)
os._exit(0)  # run_command ends one of several processes in this way, too
"""
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def torchrun(processes, *words, cwd, **more):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.Popen([*launch, "--", *map(str, words)], cwd=cwd, env=ONE_THREAD,
                            **PIPES, **more)


def distance(model, other):
    """The largest difference between two weights."""
    pairs = zip(model.parameters(), other.parameters())
    return max((a - b).abs().max().item() for a, b in pairs)


def test_the_same_updates_as_one_process(tmp_path):
    """Two updates on the same games, by one, by two and by four processes.

    Losses, KL, gradient norm and weights are the same within small tolerances.
    """
    (tmp_path / "update.py").write_text(UPDATE.format(root=str(ROOT)))
    one = subprocess.run([sys.executable, "update.py"], cwd=tmp_path, env=ONE_THREAD,
                         capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    before, _ = llama.load(ROOT / "tiny")
    for processes in (2, 4):
        many = torchrun(processes, "update.py", cwd=tmp_path)
        assert many.wait(120) == 0, many.stderr.read()
        for aggregate in ("sum", "token"):
            one_folder = tmp_path / f"1-{aggregate}"
            many_folder = tmp_path / f"{processes}-{aggregate}"
            alone, _ = llama.load(one_folder)
            report, norm = torch.load(one_folder / "report.pt")
            assert distance(alone, before) > 1e-3
            model, _ = llama.load(many_folder)
            assert distance(alone, model) < 1e-5
            theirs, their_norm = torch.load(many_folder / "report.pt")
            assert their_norm == pytest.approx(norm, rel=1e-4)
            for name in report:
                assert theirs[name] == pytest.approx(report[name], rel=1e-4, abs=1e-6)


FLAGS = ("--model", str(ROOT / "tiny"), "--device", "cpu", "--queries", "4", "--answers", "2",
         "--save-every", "2", "--eval-items", "4")


def test_a_run_of_two_goes_on_alone_and_the_other_way_round(tmp_path):
    """One process writes, and it writes one line a step about all games.

    Each run goes on with another number of processes.
    """
    for first, second in ((2, 1), (1, 2)):
        run, started = f"by-{first}", time.time()
        words = [ROOT / "selfplay.py", *FLAGS, "--steps", "100000", "--run", run]
        if first > 1:
            process = torchrun(first, *words, cwd=tmp_path)
        else:
            process = subprocess.Popen([sys.executable, *map(str, words)], cwd=tmp_path, **PIPES)
        folder = tmp_path / "runs" / run
        checkpoint = folder / evaluate.CHECKPOINT
        while not checkpoint.is_file() and process.poll() is None and time.time() - started < 100:
            time.sleep(0.1)
        # torchrun passes SIGTERM on to its processes: they save, and stop.
        os.kill(process.pid, signal.SIGKILL if first == 1 else signal.SIGTERM)
        process.communicate(timeout=60)
        facts, _ = llama.read_state(checkpoint)
        settings = json.loads((folder / "settings.json").read_text())
        done = facts["step"]
        assert done >= 2 and settings["steps"] == 100000
        for path, value in ((folder / "settings.json", settings), (checkpoint, facts)):
            shorten(path, value, done + 3)  # the run then has three steps more
        if second == 1:
            out = command(selfplay, tmp_path, "--resume", f"runs/{run}")
            assert out.returncode == 0, out.stderr
            assert f"on from step {done}" in out.stdout, out.stderr
        else:
            process = torchrun(second, ROOT / "selfplay.py", "--resume", f"runs/{run}",
                               cwd=tmp_path)
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert out.count("win rate against") == 1, err
        rows = read_lines(folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, done + 4))
        games = read_lines(folder / "games.jsonl")
        assert len(games) == done + 3
        for line in games:
            queries = [game["query"] for game in line["games"]]
            assert len(queries) == 4
            assert queries[:2] != queries[2:]  # no two processes play the same games
        llama.load(folder / "model")


def shorten(path, value, steps):
    """Change the number of steps of a run that was stopped."""
    if path.suffix == ".json":
        path.write_text(json.dumps(value | {"steps": steps}))
    else:
        _, tensors = llama.read_state(path)
        facts = json.dumps(value | {"settings": value["settings"] | {"steps": steps}})
        checksum = str(llama._checksum(tensors, facts))
        llama.save_file(tensors, path, metadata={"facts": facts, "checksum": checksum})


def test_one_that_dies_ends_the_run_with_its_reason(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def dies(queries, answers):\n"
        "    if os.environ['RANK'] == '1': raise ValueError('out of luck')\n"
        "    return [[0.0] * len(g) for g in answers]\n")
    began = time.time()
    process = torchrun(2, ROOT / "selfplay.py", *FLAGS, "--game", "lsp-zero", "--reward",
                       "mine.py:dies", "--steps", "3", "--run", "a", cwd=tmp_path)
    _, err = process.communicate(timeout=100)
    assert process.returncode
    assert "the reward dies failed: ValueError: out of luck (mine.py, line 3)" in err
    assert time.time() - began < 60


def test_queries_that_cannot_be_shared_out_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(selfplay, "join", lambda device: (llama.Crew(0, 2), device))
    done = command(selfplay, tmp_path, *FLAGS, "--queries", "3")
    assert done.returncode == 2 and "share --queries out evenly" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_one_of_several_ends_without_the_interpreters_own_end(monkeypatch, capsys):
    """One of several processes ends with os._exit, as gloo's threads may abort a normal exit.

    A process alone returns its exit code.
    """
    def fails():
        raise llama.UserError("no luck")
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("RANK", raising=False)
    assert llama.run_command(fails) == 2
    assert not ended
    monkeypatch.setenv("RANK", "1")
    llama.run_command(fails)
    assert ended == [2]
    assert "no luck" in capsys.readouterr().err
