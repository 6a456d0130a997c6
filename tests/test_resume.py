"""Never lose a run: what was stopped, killed or damaged goes on to the very weights that an undisturbed run has, or says why not in one line."""
import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT, command

import evaluate
import model as llama
import selfplay
import spin

COMMON = ("--model", str(ROOT / "tiny"), "--device", "cpu", "--eval-items", "6")
GAMES = {  # the command, its settings, and the function in whose n-th call the run is killed
    "lsp": (selfplay, ("--steps", "5", "--save-every", "2", "--queries", "2", "--answers", "2", "--lr", "1e-3"), ("update", 4)),
    "grpo": (selfplay, ("--game", "grpo", "--steps", "5", "--save-every", "2", "--queries", "2", "--answers", "2", "--lr", "1e-3"), ("update", 4)),
    "bfloat16": (selfplay, ("--dtype", "bfloat16", "--steps", "3", "--save-every", "1", "--queries", "2", "--answers", "2", "--lr", "1e-3"), ("update", 3)),
    "spin": (spin, ("--pairs", "12", "--batch", "4", "--iterations", "2", "--epochs", "1", "--save-every", "2", "--lr", "1e-3"), ("spin_gradients", 7)),
    "sft": (spin, ("--game", "sft", "--pairs", "12", "--batch", "4", "--iterations", "2", "--epochs", "1", "--save-every", "2", "--lr", "1e-3"), ("sft_gradients", 7)),
}


class Killed(BaseException):
    """As a SIGKILL: nothing catches it, nothing is saved."""


def killed_in(monkeypatch, module, name, call):
    """Make the call-th call of a function the end of the run."""
    real, calls = getattr(module, name), []

    def mortal(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args, **kwargs)
    monkeypatch.setattr(module, name, mortal)


def left(folder):
    """What a run leaves: weights and games as they are, metrics without their seconds."""
    timeless = lambda line: {k: v for k, v in json.loads(line).items() if k != "seconds"}
    return ([path.read_bytes() for iterate in evaluate.iterates(folder) for path in [iterate / "model.safetensors"]],
            (folder / "games.jsonl").read_text(), [timeless(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
            json.loads((folder / "evaluation.json").read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed runs, each played once: whole(game) is its folder."""
    folder, played = tmp_path_factory.mktemp("whole"), set()

    def run(game):
        module, flags, _ = GAMES[game]
        if game not in played:
            done = command(module, folder, *COMMON, *flags, "--run", game)
            assert done.returncode == 0, done.stderr
            (folder / "runs" / game / "said.txt").write_text(done.stdout)
            played.add(game)
        return folder / "runs" / game
    return run


@pytest.mark.parametrize("game", GAMES)
def test_a_killed_run_goes_on_to_the_same_bits(game, whole, tmp_path, monkeypatch):
    module, flags, (name, call) = GAMES[game]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_in(patch, module, name, call)
        command(module, tmp_path, *COMMON, *flags, "--run", "cut")
    cut = tmp_path / "runs" / "cut"
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rewa')  # the kill came in the middle of a line
    done = command(module, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0 and " on from " in done.stdout, done.stderr
    assert left(cut) == left(whole(game))
    changes = lambda text: [line for line in text.splitlines() if line.startswith("loss of all pairs")]  # SPIN's, of an iteration from its first update on
    assert changes(done.stdout) == changes((whole(game) / "said.txt").read_text())[-len(changes(done.stdout)) or None:]
    assert not list(cut.glob("checkpoint*"))  # at its end, a run has nothing to go on with
    done = command(module, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 2 and "no checkpoint" in done.stderr


@pytest.mark.parametrize("game", ["lsp", "spin"])
def test_a_stopped_run_goes_on_to_the_same_bits(game, whole, tmp_path, monkeypatch):
    """Ctrl-C: the step is finished, saved, and can be looked at; then the same bits as without it."""
    module, flags, (name, call) = GAMES[game]
    real, calls = getattr(module, name), []

    def stopped(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, stopped)
        done = command(module, tmp_path, *COMMON, *flags, "--run", "cut")
    assert done.returncode == 0 and "--resume runs/cut goes on" in done.stdout and "stopping after this step" in done.stderr
    again = command(module, tmp_path, *COMMON, *flags, "--run", "cut")
    assert again.returncode == 2 and "--resume runs/cut" in again.stderr
    (tmp_path / "runs" / "cut").rename(tmp_path / "runs" / f"{game}-7")
    unnamed = json.loads((tmp_path / "runs" / f"{game}-7" / "settings.json").read_text())
    del unnamed["run"], unnamed["torch"]
    (tmp_path / "runs" / f"{game}-7" / "settings.json").write_text(json.dumps(unnamed | {"torch": torch.__version__}))
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as out:
        assert evaluate.new_run(None, game, unnamed).name == f"{game}-1"
    assert f"--resume runs/{game}-7 would go on" in out.getvalue()  # the same command again offers it
    (tmp_path / "runs" / f"{game}-7" / "settings.json").write_text(json.dumps(unnamed | {"run": "cut"}))
    (tmp_path / "runs" / f"{game}-7").rename(tmp_path / "runs" / "cut")
    assert command(module, tmp_path, "--resume=runs/cut").returncode == 0
    assert left(tmp_path / "runs" / "cut") == left(whole(game))


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """A run of LSP that was killed in its fifth step, with checkpoints of steps 4 and 2."""
    module, flags, _ = GAMES["lsp"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_in(patch, module, "update", 5)
        command(module, tmp_path, *COMMON, *flags, "--run", "cut")
    return tmp_path / "runs" / "cut"


@pytest.mark.parametrize("damage, says", [
    (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "cut short"),
    (lambda file: file.write_bytes(b""), "cut short"),
    (lambda file: file.write_bytes((d := file.read_bytes())[:len(d) // 2] + bytes([d[len(d) // 2] ^ 1]) + d[len(d) // 2 + 1:]), "its checksum is another"),
    (lambda file: file.unlink(), None)], ids=["cut", "empty", "bit", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(damage, says, cut, whole):
    damage(cut / evaluate.CHECKPOINT)
    before = f"runs/cut/{evaluate.CHECKPOINT}.previous"
    if says:
        done = command(selfplay, cut.parent.parent, "--resume", "runs/cut")
        assert done.returncode == 2 and says in done.stderr and f"--resume {before}" in done.stderr and done.stderr.count("\n") == 1
    done = command(selfplay, cut.parent.parent, "--resume", before if says else "runs/cut")
    assert done.returncode == 0 and "on from step 2" in done.stdout and left(cut) == left(whole("lsp"))


def test_a_checkpoint_of_other_settings_or_another_start_is_refused(cut, tmp_path, monkeypatch):
    settings = json.loads((cut / "settings.json").read_text())
    (cut / "settings.json").write_text(json.dumps(settings | {"lr": 1.0}))
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 2 and "other settings" in done.stderr
    (cut / "settings.json").write_text(json.dumps(settings))
    done = command(spin, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 2 and "game of lsp" in done.stderr
    real = llama.fingerprint
    monkeypatch.setattr(selfplay, "fingerprint", lambda model, data: real(model, data) + 1)
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 2 and "is not what this run began with" in done.stderr


def test_a_fingerprint_tells_weights_and_data(small):
    before = llama.fingerprint(small), llama.fingerprint(small, [("a", "b")])
    assert len({*before}) == 2 and llama.fingerprint(small, [("a", "c")]) not in before
    with torch.no_grad():
        small.norm[0] += 1
    assert llama.fingerprint(small) not in before


def test_edited_data_is_refused(tmp_path, monkeypatch):
    """The opponent's answers in the checkpoint belong to the old prompts."""
    module, flags, (name, call) = GAMES["spin"]
    write = lambda last: (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"Add {i} and 2.", "answer": str(i + 2)}) + "\n" for i in [*range(11), last]))
    write(11)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_in(patch, module, name, call)
        command(module, tmp_path, *COMMON, *flags, "--data", "data.jsonl", "--run", "cut")
    write(12)
    done = command(module, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 2 and "data.jsonl is not what this run began with" in done.stderr
    write(11)
    assert command(module, tmp_path, "--resume", "runs/cut").returncode == 0


def test_a_run_of_an_older_version_goes_on(cut, tmp_path, whole):
    """Its settings know nothing of a newer flag: the default stands."""
    settings = json.loads((cut / "settings.json").read_text())
    facts, tensors = llama.read_state(cut / evaluate.CHECKPOINT)
    for old in (settings, facts["settings"]):
        del old["games_every"]
    (cut / "settings.json").write_text(json.dumps(settings | {"save_every": 1}))  # and this one may be changed
    metadata = json.dumps(facts)
    llama.save_file(tensors, cut / evaluate.CHECKPOINT, metadata={"facts": metadata, "checksum": str(llama._checksum(tensors, metadata))})
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0 and left(cut) == left(whole("lsp")), done.stderr


def test_two_processes_never_play_one_run(cut, tmp_path):
    held, before = evaluate.lock(cut), (cut / evaluate.CHECKPOINT).read_bytes()
    for run in ("runs/cut", f"runs/cut/{evaluate.CHECKPOINT}.previous"):
        done = command(selfplay, tmp_path, "--resume", run)
        assert done.returncode == 2 and "another process" in done.stderr and (cut / evaluate.CHECKPOINT).read_bytes() == before
    held.close()
    assert command(selfplay, tmp_path, "--resume", "runs/cut").returncode == 0


def test_a_checkpoint_is_let_go_of_once_it_is_restored(cut, tmp_path, monkeypatch):
    """It is as large as the weights and the optimizer together."""
    monkeypatch.chdir(tmp_path)
    args = selfplay.parse_args(["--resume", "runs/cut"])
    game = selfplay.set_up(args, "cpu")
    with evaluate.open_run(args, game.start) as run:
        weight = weakref.ref(run.tensors["weight.0"])
        run.restore(game.model, game.optimizer, game.generator, game.rng)
        assert weight() is None and run.facts["step"] == 4


def test_spin_knows_its_place_without_its_log(tmp_path, whole, monkeypatch):
    """The checkpoint says which update is next, not the lines of metrics.jsonl: after a power cut some may be missing."""
    module, flags, (name, call) = GAMES["spin"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_in(patch, module, name, call)
        command(module, tmp_path, *COMMON, *flags, "--run", "cut")
    (tmp_path / "runs" / "cut" / "metrics.jsonl").write_text("")
    done = command(module, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0 and left(tmp_path / "runs" / "cut")[0] == left(whole("spin"))[0], done.stderr


@pytest.mark.parametrize("flags, says", [(("--resume", "nowhere"), "no run's folder"), (("--resume", "runs/cut", "--lr", "1"), "leave all other flags out"),
                                         (("--steps", "9", "--resume=runs/cut"), "leave all other flags out"), (("--explain", "--resume=runs/cut"), "leave all other flags out")])
def test_resume_refuses_in_one_line(cut, tmp_path, flags, says):
    done = command(selfplay, tmp_path, *flags)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_stops_the_run_in_one_line(cut, tmp_path):
    """A limit on the size of files stands for the full disk: the checkpoint no longer fits, and the one before it is whole."""
    size = (cut / evaluate.CHECKPOINT).stat().st_size
    facts, _ = llama.read_state(cut / evaluate.CHECKPOINT)
    done = subprocess.run([sys.executable, str(ROOT / "selfplay.py"), "--resume", "runs/cut"], cwd=tmp_path, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)))
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].count("cannot be written") == 1 and "Traceback" not in done.stderr
    assert llama.read_state(cut / evaluate.CHECKPOINT)[0]["step"] == facts["step"] == 4 and not (cut / f"{evaluate.CHECKPOINT}.new").exists()
    assert command(selfplay, tmp_path, "--resume", "runs/cut").returncode == 0


REWARDS = """
import time
def raises(queries, answers): return 1 / 0
def hangs(queries, answers): time.sleep(60)
def swallows(queries, answers):
    for _ in range(100):
        try: time.sleep(0.1)
        except Exception: pass  # as somebody's own code may: it must not swallow the time limit
    return [[0.0] * len(group) for group in answers]
def two_lines(queries, answers): raise ValueError("one\\ntwo")
def nan(queries, answers): return [[float("nan")] * len(group) for group in answers]
def huge(queries, answers): return [[3e38 * (-1) ** i for i, _ in enumerate(group)] for group in answers]
"""


@pytest.mark.parametrize("name, says", [("raises", "failed: ZeroDivisionError: division by zero (mine.py, line 3)"), ("swallows", "took longer than 0.5 seconds"), ("two_lines", "ValueError: one two (mine.py, line 10)"), ("hangs", "took longer than 0.5 seconds"),
                                        ("nan", "NaN or infinity"), ("huge", "the step was not taken")])
def test_a_reward_gone_wrong_stops_the_run_in_one_line(name, says, tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    done = command(selfplay, tmp_path, *COMMON, "--game", "lsp-zero", "--steps", "2", "--queries", "2", "--answers", "2", "--reward", f"mine.py:{name}", "--reward-timeout", "0.5", "--run", "a")
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    if name == "huge":
        assert len(json.loads((tmp_path / "runs" / "a" / "not-finite.json").read_text())["games"]) == 2


def test_games_can_be_thinned(tmp_path):
    done = command(selfplay, tmp_path, *COMMON, "--steps", "4", "--queries", "2", "--answers", "2", "--games-every", "3", "--run", "a")
    assert done.returncode == 0 and [json.loads(line)["step"] for line in (tmp_path / "runs" / "a" / "games.jsonl").read_text().splitlines()] == [1, 3]


def test_a_kill_between_two_renames_leaves_a_whole_checkpoint(tmp_path, small, monkeypatch):
    """Whatever rename is the last, reopening finds the newest whole state."""
    optimizer, generator, path = torch.optim.AdamW(small.parameters()), torch.Generator(), tmp_path / evaluate.CHECKPOINT
    for step in (1, 2):
        llama.save_state(path, optimizer, generator, {"step": step, "settings": {}})
    real = os.replace
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(Killed()) if self.suffix == ".new" else real(self, target))
    with pytest.raises(Killed):
        llama.save_state(path, optimizer, generator, {"step": 3, "settings": {}})
    monkeypatch.undo()
    assert not path.exists()
    (tmp_path / "settings.json").write_text("{}")
    _, held, facts, _ = evaluate.reopen(tmp_path)
    held.close()
    assert facts["step"] == 2 and path.exists()


def test_a_lesson_that_is_not_finite_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    done = command(selfplay, tmp_path, *COMMON, "--game", "lsp-zero", "--explain", "--reward", "mine.py:huge")
    assert done.returncode == 2 and "the gradient's norm is" in done.stderr and done.stderr.count("\n") == 1


def test_a_reward_that_does_not_load_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\ny = missing\n")
    done = command(selfplay, tmp_path, *COMMON, "--game", "lsp-zero", "--reward", "mine.py:f")
    assert done.returncode == 2 and "NameError: name 'missing' is not defined (mine.py, line 2)" in done.stderr
