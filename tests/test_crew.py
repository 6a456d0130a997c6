"""Several processes on the CPU: the same losses and weights as one alone; a run that goes on with another number of them; one that dies."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command

import evaluate
import model as llama
import selfplay

# Two updates on given games, by two ways of adding up: every process is handed all games and takes its share. It writes the losses and the weights.
UPDATE = """
import copy, os, sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import model as llama, selfplay
from selfplay import Player

crew, device = llama.join("cpu")
for aggregate in ("sum", "token"):
    args = selfplay.parse_args(["--model", {root!r} + "/tiny", "--queries", "8", "--answers", "4", "--kl", "0.1", "--micro-batch", "96", "--aggregate", aggregate])
    model, tokenizer = llama.load(args.model)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.01)
    prompt, whole = selfplay.challenger_prompt(tokenizer), torch.Generator().manual_seed(5)
    queries, answers, challenger, solver = selfplay.play(model, tokenizer, prompt, None, args, whole)  # by one process: all have the same games
    torch.manual_seed(0)
    reward = torch.rand(8, 4)
    if crew.size > 1:
        llama.shard(model), llama.shard(reference)  # computing in float32, on the CPU
    optimizer = llama.optimizer_for(model, torch.optim.SGD, lr=0.1)
    mine = lambda player, n: Player(player.prompts if len(player.prompts) == 1 else crew.share(player.prompts),
                                    crew.share(player.completions) if len(player.prompts) > 1 else [crew.share(player.completions[0])], crew.share(player.finished))
    _, _, a_sol, a_ch = selfplay.score(crew.share(queries), crew.share(answers), lambda q, a: crew.share(reward), None, args, crew)
    players = selfplay.sides(mine(solver, 4), mine(challenger, 1), a_sol, a_ch, args)
    for _ in range(2):
        report, norm = selfplay.update(model, reference, optimizer, players, args, crew)
    folder = f"{{crew.size}}-{{aggregate}}"
    llama.save(model, folder)
    if not crew.rank:
        torch.save((report, norm), folder + "/report.pt")
llama.leave(crew)
os._exit(0)  # as run_command ends one of several
"""


def torchrun(processes, *words, cwd, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--", *map(str, words)], cwd=cwd, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_the_same_updates_as_one_process(tmp_path):
    """The same games, two updates: losses, KL, gradient norm and weights within 1e-5, by two and by four processes."""
    (tmp_path / "update.py").write_text(UPDATE.format(root=str(ROOT)))
    one = subprocess.run([sys.executable, "update.py"], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert one.returncode == 0, one.stderr
    before, _ = llama.load(ROOT / "tiny")
    for processes in (2, 4):
        many = torchrun(processes, "update.py", cwd=tmp_path)
        assert many.wait(120) == 0, many.stderr.read()
        for aggregate in ("sum", "token"):
            alone, _ = llama.load(tmp_path / f"1-{aggregate}")
            report, norm = torch.load(tmp_path / f"1-{aggregate}" / "report.pt")
            assert any((a - b).abs().max() > 1e-3 for a, b in zip(alone.parameters(), before.parameters()))
            model, _ = llama.load(tmp_path / f"{processes}-{aggregate}")
            assert max((a - b).abs().max().item() for a, b in zip(alone.parameters(), model.parameters())) < 1e-5
            theirs, their_norm = torch.load(tmp_path / f"{processes}-{aggregate}" / "report.pt")
            assert their_norm == pytest.approx(norm, rel=1e-4)
            for name in report:
                assert theirs[name] == pytest.approx(report[name], rel=1e-4, abs=1e-6)


FLAGS = ("--model", str(ROOT / "tiny"), "--device", "cpu", "--queries", "4", "--answers", "2", "--save-every", "2", "--eval-items", "4")


def test_a_run_of_two_goes_on_alone_and_the_other_way_round(tmp_path):
    """One writer, one line a step over all games; resumed with another number of processes."""
    for first, second in ((2, 1), (1, 2)):
        run, started = f"by-{first}", time.time()
        words = [ROOT / "selfplay.py", *FLAGS, "--steps", "100000", "--run", run]
        process = torchrun(first, *words, cwd=tmp_path) if first > 1 else subprocess.Popen([sys.executable, *map(str, words)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        folder = tmp_path / "runs" / run
        while not (folder / evaluate.CHECKPOINT).is_file() and process.poll() is None and time.time() - started < 100:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL if first == 1 else signal.SIGTERM)  # torchrun hands SIGTERM on: its processes save, and stop
        process.communicate(timeout=60)
        facts, _ = llama.read_state(folder / evaluate.CHECKPOINT)
        settings = json.loads((folder / "settings.json").read_text())
        done = facts["step"]
        assert done >= 2 and settings["steps"] == 100000
        for path, value in ((folder / "settings.json", settings), (folder / evaluate.CHECKPOINT, facts)):  # a run of three steps more
            shorten(path, value, done + 3)
        if second == 1:
            out = command(selfplay, tmp_path, "--resume", f"runs/{run}")
            assert out.returncode == 0 and f"on from step {done}" in out.stdout, out.stderr
        else:
            process = torchrun(second, ROOT / "selfplay.py", "--resume", f"runs/{run}", cwd=tmp_path)
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0 and out.count("win rate against") == 1, err
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, done + 4))
        games = [json.loads(line) for line in (folder / "games.jsonl").read_text().splitlines()]
        assert all(len(line["games"]) == 4 for line in games) and len(games) == done + 3
        texts = [[game["query"] for game in line["games"]] for line in games]
        assert all(queries[:2] != queries[2:] for queries in texts)  # no two processes play the same games
        llama.load(folder / "model")


def shorten(path, value, steps):
    """Give a run that was stopped another end."""
    if path.suffix == ".json":
        path.write_text(json.dumps(value | {"steps": steps}))
    else:
        _, tensors = llama.read_state(path)
        facts = json.dumps(value | {"settings": value["settings"] | {"steps": steps}})
        llama.save_file(tensors, path, metadata={"facts": facts, "checksum": str(llama._checksum(tensors, facts))})


def test_one_that_dies_ends_the_run_with_its_reason(tmp_path):
    (tmp_path / "mine.py").write_text("import os\ndef dies(queries, answers):\n    if os.environ['RANK'] == '1': raise ValueError('out of luck')\n    return [[0.0] * len(g) for g in answers]\n")
    began = time.time()
    process = torchrun(2, ROOT / "selfplay.py", *FLAGS, "--game", "lsp-zero", "--reward", "mine.py:dies", "--steps", "3", "--run", "a", cwd=tmp_path)
    _, err = process.communicate(timeout=100)
    assert process.returncode and "the reward dies failed: ValueError: out of luck (mine.py, line 3)" in err and time.time() - began < 60


def test_queries_that_cannot_be_shared_out_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(selfplay, "join", lambda device: (llama.Crew(0, 2), device))
    done = command(selfplay, tmp_path, *FLAGS, "--queries", "3")
    assert done.returncode == 2 and "share --queries out evenly" in done.stderr and not (tmp_path / "runs").exists()


def test_one_of_several_ends_without_the_interpreters_own_end(monkeypatch, capsys):
    """Where gloo's threads may abort it; a process alone returns its exit code."""
    def fails():
        raise llama.UserError("no luck")
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("RANK", raising=False)
    assert llama.run_command(fails) == 2 and not ended
    monkeypatch.setenv("RANK", "1")
    llama.run_command(fails)
    assert ended == [2] and "no luck" in capsys.readouterr().err
