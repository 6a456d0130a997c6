"""A run is never lost. One that was stopped, killed or damaged can go on.

It ends with the very weights of an undisturbed run, or it says in one line why it cannot go on.
"""
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import weakref
from datetime import datetime, timedelta

import pytest
import torch
from conftest import HALF, ROOT, command, read_lines
from safetensors.torch import save_file

import model as llama
import selfplay
import spin
from support import console, learning, runs
from support.console import UserError

COMMON = ("--model", str(HALF), "--device", "cpu", "--eval-items", "2")
SHORT = ("--queries", "2", "--answers", "2", "--lr", "1e-3", "--answer-tokens", "12")
LSP = (*SHORT, "--query-tokens", "24")
GRPO = (*SHORT, "--model", str(ROOT / "tiny"))  # the half has no answer right: it learns nothing
SPIN = ("--pairs", "12", "--batch", "4", "--iterations", "2", "--epochs", "1",
        "--save-every", "2", "--lr", "1e-3", "--answer-tokens", "12")
GAMES = {  # the command, its settings, and the optimizer step before which the run is killed
    "lsp": (selfplay, ("--steps", "5", "--save-every", "2", *LSP), 4),
    "grpo": (selfplay, ("--game", "grpo", "--steps", "5", "--save-every", "2", *GRPO), 4),
    "bfloat16": (selfplay, ("--dtype", "bfloat16", "--steps", "3", "--save-every", "1", *LSP), 3),
    "spin": (spin, SPIN, 7),
    "sft": (spin, ("--game", "sft", *SPIN), 7),
}


class Killed(BaseException):
    """Like SIGKILL: nothing catches it, and nothing is saved."""


def in_the_middle(monkeypatch, call, act):
    """Before the given optimizer step (3: the third), `act` is called. The gradients are there."""
    real, calls = learning.take, []

    def take(optimizer, **crew):
        calls.append(1)
        if len(calls) == call:
            act()
        return real(optimizer, **crew)
    monkeypatch.setattr(learning, "take", take)


def killed(folder, game, *flags, call=None):
    """Play a game's run, runs/cut, until it is killed. Returns the run's folder."""
    module, own, usual = GAMES[game]

    def kill():
        raise Killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        in_the_middle(patch, call or usual, kill)
        command(module, folder, *COMMON, *own, *flags, "--run", "cut")
    return folder / "runs" / "cut"


def read_json(path):
    return json.loads(path.read_text())


def write_json(path, value):
    path.write_text(json.dumps(value))


def rewrite(run, settings):
    """Give a stopped run other settings: in its folder, and in its checkpoint."""
    write_json(run / "settings.json", settings)
    path = run / runs.CHECKPOINT
    facts, tensors = learning.read_state(path)
    facts = json.dumps(facts | {"settings": settings})
    checksum = str(learning.checksum(tensors, facts))
    save_file(tensors, path, metadata={"facts": facts, "checksum": checksum})


def left(folder):
    """What a run leaves: its weights, games, metrics without their seconds, and evaluation."""
    weights = [(iterate / "model.safetensors").read_bytes()
               for iterate in runs.iterates(folder)]
    assert weights
    metrics = read_lines(folder / "metrics.jsonl")
    for row in metrics:
        row.pop("seconds", None)
    games = (folder / "games.jsonl").read_text()
    return weights, games, metrics, read_json(folder / "evaluation.json")


def refused(done, *says):
    """The command ended with exit code 2, and said this."""
    return done.returncode == 2 and all(text in done.stderr for text in says)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed runs, each played once. whole(game) is the folder of such a run."""
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


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Killed runs, each played once. halves(game) is the folder of such a run."""
    folders = {}

    def run(game, call):
        if (game, call) not in folders:
            folders[game, call] = killed(tmp_path_factory.mktemp("half"), game, call=call)
        return folders[game, call]
    return run


@pytest.fixture
def cut(tmp_path, halves):
    """A run of LSP that was killed in its fifth step, with checkpoints of steps 4 and 2."""
    return shutil.copytree(halves("lsp", 5), tmp_path / "runs" / "cut")


@pytest.fixture
def cut_spin(tmp_path, halves):
    """A run of SPIN that was killed in its second iteration."""
    return shutil.copytree(halves("spin", 7), tmp_path / "runs" / "cut")


# --------------------------------------------------------------------------------------------------
# Killed or stopped

@pytest.mark.parametrize("game", GAMES)
def test_a_killed_run_goes_on_to_the_same_bits(game, whole, halves, tmp_path):
    module, _, call = GAMES[game]
    cut = shutil.copytree(halves(game, call), tmp_path / "runs" / "cut")
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rewa')  # the kill came in the middle of a line
    done = command(module, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0 and " on from " in done.stdout, done.stderr
    assert left(cut) == left(whole(game))

    def changes(text):  # SPIN's lines about an iteration, counted from its first update
        return [line for line in text.splitlines() if line.startswith("loss of all pairs")]
    found, undisturbed = changes(done.stdout), changes((whole(game) / "said.txt").read_text())
    assert found == undisturbed[-len(found) or None:]
    assert bool(found) == (module is spin)
    assert not list(cut.glob("checkpoint*"))  # a run that has ended needs none
    done = command(module, tmp_path, "--resume", "runs/cut")
    assert refused(done, "no checkpoint")


@pytest.mark.parametrize("game", ["lsp", "spin"])
def test_a_stopped_run_goes_on_to_the_same_bits(game, whole, tmp_path):
    """After Ctrl-C the step is finished and saved, and the result can be looked at.

    The resumed run then ends with the same bits as a run without Ctrl-C.
    """
    module, flags, call = GAMES[game]
    with pytest.MonkeyPatch.context() as patch:
        in_the_middle(patch, call, lambda: signal.raise_signal(signal.SIGINT))
        done = command(module, tmp_path, *COMMON, *flags)
    cut = tmp_path / "runs" / f"{game}-1"
    assert done.returncode == 0
    assert f"--resume runs/{game}-1 goes on" in done.stdout
    assert "stopping after this step" in done.stderr
    assert runs.iterates(cut)  # something to look at
    again = command(module, tmp_path, *COMMON, *flags, "--run", f"{game}-1")
    assert refused(again, f"--resume runs/{game}-1")
    # The same command offers to go on with the run that was stopped, and other settings do not.
    settings = read_json(cut / "settings.json")
    torch_version = settings.pop("torch")
    assert torch_version == torch.__version__
    for same, name in ((settings, f"{game}-2"), (settings | {"seed": 9}, f"{game}-3")):
        with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as out:
            assert runs.new_run(None, game, same).name == name
        assert (f"--resume runs/{game}-1 would go on" in out.getvalue()) == (same is settings)
    assert command(module, tmp_path, f"--resume=runs/{game}-1").returncode == 0
    assert left(cut) == left(whole(game))


DATED = ("{{ bos_token }}<|system|>{{ strftime_now('%d') }}<|end|>{% for m in messages %}"
         "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def test_the_embedded_default_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.model_folder("tiny").samefile(ROOT / "tiny")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert runs.model_folder("tiny").samefile(tmp_path / "tiny")  # a folder of one's own wins
    with pytest.raises(UserError, match="no such model folder"):
        runs.model_folder("small")


@pytest.mark.parametrize("game", ["lsp", "spin"])
def test_a_run_keeps_the_date_of_its_beginning(game, tmp_path, folder):
    """Some templates write today's date. On another day a resumed run has the same prompts."""
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": DATED})
    module, flags, _ = GAMES[game]
    cut = killed(tmp_path, game, "--model", str(folder), call=3)
    begun = read_json(cut / "settings.json")["date"]
    assert datetime.now() - datetime.fromisoformat(begun) < timedelta(minutes=5)
    rewrite(cut, read_json(cut / "settings.json") | {"date": "2001-02-03T04:05:06"})
    args = module.parse_args(["--resume", str(cut)])
    made = [module.set_up(args, "cpu")] if game == "lsp" else [module.set_up(args)]
    ids = made[0].tokenizer.chat([{"role": "user", "content": "a"}])
    assert made[0].tokenizer.encode("03") == ids[2:4]
    assert module.parse_args([*COMMON, *flags]).date >= begun


def test_a_resumed_run_says_what_changed_beside_it(tmp_path, folder):
    """A user may mend a reward or a judge, and go on. But nobody should do so without knowing."""
    mine, judge = tmp_path / "mine.py", tmp_path / "judge.py"
    judge.write_text("def f(queries, answers):\n    return [[0.5 for a in g] for g in answers]\n")
    own = ("--model", str(folder), "--reward", f"{mine}:f", "--judge", f"{judge}:f")
    mine.write_text("def f(queries, answers):\n    return [[len(a) for a in g] for g in answers]\n")
    killed(tmp_path, "lsp", *own, call=3)
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0 and "is not what it was" not in done.stderr
    shutil.rmtree(tmp_path / "runs")
    killed(tmp_path, "lsp", *own, call=3)
    mine.write_text(mine.read_text() + "\n")
    judge.write_text(judge.read_text() + "\n")
    write_json(folder / "tokenizer_config.json", read_json(folder / "tokenizer_config.json"))
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    for path in (mine, judge, folder / "tokenizer_config.json"):
        assert f"note: {path} is not what it was when this run began" in done.stderr


@pytest.mark.parametrize("how", ["stopped at the end", "killed"])
def test_what_the_opponent_has_answered_is_kept(how, tmp_path, monkeypatch):
    """SPIN is stopped, or killed, while the opponent answers in the second iteration.

    The answers so far are in the checkpoint. The run goes on with the others, to the same bits.
    """
    monkeypatch.setattr(llama, "ROOM", 90)  # a few prompts at a time
    batches, real = [], llama.generate
    _, flags, _ = GAMES["spin"]
    flags = [*COMMON, *flags]
    asked = {"killed": 7, "stopped at the end": 8}[how]
    assert command(spin, tmp_path, *flags, "--run", "whole").returncode == 0

    def generate(model, prompts, *rest):
        if rest[0] == 1 and rest[2] > 0:  # neither the score's samples, nor its greedy answers
            batches.append(len(prompts))
            if len(batches) == asked and how == "killed":
                raise Killed
            if len(batches) == asked:
                signal.raise_signal(signal.SIGINT)
        return real(model, prompts, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(llama, "generate", generate)
        if how == "killed":
            patch.setattr(runs.Run, "late", lambda self: True)  # as if ten minutes had passed
            with pytest.raises(Killed):
                command(spin, tmp_path, *flags, "--run", "cut")
        else:
            done = command(spin, tmp_path, *flags, "--run", "cut")
            assert "stopped in iteration 1, while the opponent answered: " in done.stdout
            assert done.returncode == 0
        before = sum(batches[:asked] if how != "killed" else batches[:asked - 1])
    facts, tensors = learning.read_state(tmp_path / "runs" / "cut" / runs.CHECKPOINT)
    assert (facts["iteration"], facts["update"]) == (1, 0) and "ref" not in tensors
    assert int((tensors["lengths"] > 0).sum()) == before
    batches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(llama, "generate", generate)
        how = "resumed"
        done = command(spin, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    assert left(tmp_path / "runs" / "cut") == left(tmp_path / "runs" / "whole")


def test_a_run_that_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch):
    """Three checkpoints of 12 bytes a weight, and the model. What a resumed run has counts."""
    need = 3 * 12 * 756224 + 4 * 756224
    usage = type("Usage", (), {"free": need - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = ["--model", str(ROOT / "tiny"), "--steps", "1", *LSP]
    done = command(selfplay, tmp_path, *words)
    assert refused(done, "this run needs about 0.0 GiB of disk", "three checkpoints")
    assert not (tmp_path / "runs").exists()
    usage.free = need
    args = selfplay.parse_args(words)
    runs.check_disk(args, 756224, None, 2, 1)
    usage.free = need - 1000
    args.resume = str(tmp_path / "cut")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "checkpoint.safetensors.previous").write_bytes(bytes(1000))
    runs.check_disk(args, 756224, None, 2, 1)
    usage.free -= 1
    with pytest.raises(UserError, match="of disk"):
        runs.check_disk(args, 756224, None, 2, 1)
    runs.check_disk(args, 756224, 1000, 2, 1)  # LoRA's checkpoints hold the adapters alone


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    """The last checkpoint stays, and the command ends as after any Ctrl-C."""
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    module, flags, _ = GAMES["lsp"]
    with pytest.MonkeyPatch.context() as patch:
        in_the_middle(patch, 3, twice)
        done = command(module, tmp_path, *COMMON, *flags, "--run", "cut")
    assert done.returncode == 130
    facts, _ = learning.read_state(tmp_path / "runs" / "cut" / runs.CHECKPOINT)
    assert facts["step"] == 2


def test_spin_knows_its_place_without_its_log(cut_spin, tmp_path, whole):
    """The checkpoint says which update is next.

    The lines of metrics.jsonl do not, because after a power cut some of them may be missing.
    """
    (cut_spin / "metrics.jsonl").write_text("")
    done = command(spin, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    assert left(cut_spin)[0] == left(whole("spin"))[0], done.stderr


def test_a_kill_between_two_renames_leaves_a_whole_checkpoint(tmp_path, small, monkeypatch):
    """Whichever rename is the last one, the run is reopened with its newest whole state."""
    optimizer, generator = torch.optim.AdamW(small.parameters()), torch.Generator()
    path = tmp_path / runs.CHECKPOINT
    for step in (1, 2):
        learning.save_state(path, optimizer, generator, {"step": step, "settings": {}})

    def replace(self, target):
        if self.suffix == ".new":
            raise Killed
        return os.replace(self, target)
    monkeypatch.setattr("pathlib.Path.replace", replace)
    with pytest.raises(Killed):
        learning.save_state(path, optimizer, generator, {"step": 3, "settings": {}})
    monkeypatch.undo()
    assert not path.exists()
    (tmp_path / "settings.json").write_text("{}")
    _, held, facts, _ = runs.reopen(tmp_path)
    held.close()
    assert facts["step"] == 2
    assert path.exists()


def test_a_checkpoint_is_let_go_of_once_it_is_restored(cut, tmp_path, monkeypatch):
    """Its memory is needed: it is as large as the weights and the optimizer together."""
    monkeypatch.chdir(tmp_path)
    args = selfplay.parse_args(["--resume", "runs/cut"])
    game = selfplay.set_up(args, "cpu")
    with runs.open_run(args, game.start) as run:
        weight = weakref.ref(run.tensors["weight.0"])
        run.restore(game.model, game.optimizer, game.generator, game.rng)
        assert weight() is None
        assert run.facts["step"] == 4


# --------------------------------------------------------------------------------------------------
# Damaged

def cut_short(file):
    file.write_bytes(file.read_bytes()[:-1000])


def empty(file):
    file.write_bytes(b"")


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove(file):
    file.unlink()


@pytest.mark.parametrize("damage, says", [
    pytest.param(cut_short, "cut short", id="cut"),
    pytest.param(empty, "cut short", id="empty"),
    pytest.param(flip_a_bit, "its checksum does not fit", id="bit"),
    pytest.param(remove, None, id="gone"),
])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(damage, says, cut, whole):
    damage(cut / runs.CHECKPOINT)
    folder, before = cut.parent.parent, f"runs/cut/{runs.CHECKPOINT}.previous"
    if says:
        done = command(selfplay, folder, "--resume", "runs/cut")
        assert refused(done, says, f"--resume {before}")
        assert done.stderr.count("\n") == 1
    done = command(selfplay, folder, "--resume", before if says else "runs/cut")
    assert done.returncode == 0 and "on from step 2" in done.stdout
    assert left(cut) == left(whole("lsp"))


def test_a_checkpoint_of_other_settings_or_another_start_is_refused(cut, tmp_path, monkeypatch):
    settings = read_json(cut / "settings.json")
    write_json(cut / "settings.json", settings | {"lr": 1.0})
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert refused(done, "other settings")
    write_json(cut / "settings.json", settings)
    done = command(spin, tmp_path, "--resume", "runs/cut")
    assert refused(done, "game of lsp", "resume it with selfplay.py")
    real = learning.fingerprint
    monkeypatch.setattr(learning, "fingerprint", lambda model, data: real(model, data) + 1)
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert refused(done, "is not what this run began with")


def test_edited_data_is_refused(tmp_path):
    """The opponent's answers in the checkpoint belong to the old prompts."""
    rows = [{"prompt": f"Add {i} and 2.", "answer": str(i + 2)} for i in range(13)]

    def write(last):
        lines = [json.dumps(row) + "\n" for row in [*rows[:11], rows[last]]]
        (tmp_path / "data.jsonl").write_text("".join(lines))
    write(11)
    killed(tmp_path, "spin", "--data", "data.jsonl")
    write(12)
    done = command(spin, tmp_path, "--resume", "runs/cut")
    assert refused(done, "data.jsonl is not what this run began with")
    write(11)
    assert command(spin, tmp_path, "--resume", "runs/cut").returncode == 0


def test_two_processes_never_play_one_run(cut, tmp_path):
    checkpoint = cut / runs.CHECKPOINT
    held, before = runs.lock(cut), checkpoint.read_bytes()
    for run in ("runs/cut", f"runs/cut/{runs.CHECKPOINT}.previous"):
        done = command(selfplay, tmp_path, "--resume", run)
        assert refused(done, "another process")
        assert checkpoint.read_bytes() == before
    held.close()
    assert command(selfplay, tmp_path, "--resume", "runs/cut").returncode == 0


@pytest.mark.parametrize("flags, says", [
    (("--resume", "nowhere"), "no run's folder"),
    (("--resume", "runs/cut", "--lr", "1"), "leave all other flags out"),
    (("--steps", "9", "--resume=runs/cut"), "leave all other flags out"),
    (("--dry-run", "--resume=runs/cut"), "leave all other flags out"),
])
def test_resume_refuses_in_one_line(cut, tmp_path, flags, says):
    done = command(selfplay, tmp_path, *flags)
    assert refused(done, says) and done.stderr.count("\n") == 1


def test_a_full_disk_stops_the_run_in_one_line(cut, tmp_path):
    """A limit on the size of files takes the place of a full disk.

    The new checkpoint no longer fits, and the one before it stays whole.
    """
    checkpoint = cut / runs.CHECKPOINT
    size = checkpoint.stat().st_size // 2
    facts, _ = learning.read_state(checkpoint)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        done = command(selfplay, tmp_path, "--resume", "runs/cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused(done, "cannot be written") and done.stderr.count("\n") == 1
    assert learning.read_state(checkpoint)[0]["step"] == facts["step"] == 4
    assert not (cut / f"{runs.CHECKPOINT}.new").exists()
    assert command(selfplay, tmp_path, "--resume", "runs/cut").returncode == 0


# --------------------------------------------------------------------------------------------------
# Begun with an older version

def test_a_setting_that_the_run_s_version_did_not_know_has_its_default(cut, tmp_path, whole):
    settings = read_json(cut / "settings.json")
    del settings["show_every"]
    rewrite(cut, settings)
    # save_every may be changed when a run goes on.
    write_json(cut / "settings.json", settings | {"save_every": 1})
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    assert left(cut) == left(whole("lsp")), done.stderr


# The names in settings.json as commit 032be62 wrote them. "data" is in SPIN's only if it was given.
OLD_NAMES = {
    "lsp": "game model revision reward reward_timeout data task template pay steps queries answers "
           "temperature query_tokens answer_tokens lr alpha_ch quality judge kl kl_challenger "
           "kl_form advantage aggregate clip seed save_every games_every show_every eval_items "
           "micro_batch dtype recompute offload cuda_graphs explain dry_run device run torch",
    "spin": "game model revision iterations pairs epochs batch answer_tokens loss lam lam_last lr "
            "lr_late clip seed save_every eval_items micro_batch dtype recompute cuda_graphs "
            "explain device run torch",
}
# Those that are gone, with their defaults.
GONE = {"revision": None, "reward_timeout": 600.0, "clip": 1.0, "games_every": 1,
        "recompute": False, "offload": False, "cuda_graphs": False, "explain": False}


def as_once(settings, game, **gone):
    """A run's settings as the old version would have written them."""
    known = settings | GONE | gone
    return {name: known[name] for name in OLD_NAMES[game].split()}


def test_an_old_run_of_lsp_goes_on_to_the_same_bits(cut, tmp_path, whole):
    rewrite(cut, as_once(read_json(cut / "settings.json"), "lsp"))
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0 and "on from step 4" in done.stdout, done.stderr
    assert left(cut) == left(whole("lsp"))


def test_an_old_run_of_spin_goes_on_to_the_same_bits(tmp_path):
    """It was played with one lambda for the last iteration and another one for those before it,
    and with one learning rate for iterations 0 and 1 and another one for those after them.
    """
    flags = ("--iterations", "4", "--pairs", "4", "--lam", "1", "1", "1", "3",
             "--lr", "1e-3", "1e-3", "5e-4")
    cut = killed(tmp_path, "spin", *flags, call=3)
    now = read_json(cut / "settings.json")
    old = as_once(now, "spin", lam=1.0, lam_last=3.0, lr=1e-3, lr_late=5e-4)
    rewrite(cut, old)
    done = command(spin, tmp_path, "--resume", "runs/cut")
    assert done.returncode == 0 and "on from update" in done.stdout, done.stderr
    assert "lambda 3" in done.stdout and "learning rate 0.0005" in done.stdout
    undisturbed = command(spin, tmp_path, *COMMON, *SPIN, *flags, "--run", "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert len(runs.iterates(cut)) == 4
    assert left(cut) == left(tmp_path / "runs" / "whole")


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 6])
def test_old_spin_settings_become_one_number_an_iteration(iterations):
    old = {"game": "spin", "model": "tiny", "iterations": iterations, "lam": 1.0, "lam_last": 2.0,
           "lr": 0.3, "lr_late": 0.1}
    new = runs.modern(old)
    last = iterations - 1
    assert new["lam"] == [2.0 if 0 < t == last else 1.0 for t in range(iterations)]
    assert new["lr"] == [0.3 if t < 2 else 0.1 for t in range(iterations)]
    assert new["command"] == "spin.py"
    assert not new.keys() & {"lam_last", "lr_late"}


@pytest.mark.parametrize("changes, found", [
    ({}, {"model": "tiny", "low_memory": False, "command": "selfplay.py"}),
    ({"recompute": True}, {"low_memory": True}),
    ({"offload": True}, {"low_memory": True}),
    ({"revision": "v1"}, {"model": "tiny@v1"}),
    ({"game": "grpo"}, {"command": "selfplay.py", "game": "grpo"}),
    ({"game": "sft"}, {"command": "spin.py"}),
    ({"quality": 0.0}, {"game": "lsp-zero"}),
    ({"reward_timeout": 5.0, "games_every": 9}, {"game": "lsp"}),
])
def test_old_settings_in_today_s_words(changes, found):
    old = {"game": "lsp", "model": "tiny", "quality": 1.0} | GONE | changes
    new = runs.modern(old)
    assert {name: new[name] for name in found} == found
    assert not new.keys() & GONE.keys()
    assert runs.modern(new) == new


@pytest.mark.parametrize("changes, says", [
    ({"clip": 0.5}, "--clip"),
    ({"cuda_graphs": True}, "--cuda-graphs"),
])
def test_what_this_version_cannot_play_is_refused(changes, says, cut, tmp_path):
    before = (cut / runs.CHECKPOINT).read_bytes()
    old = as_once(read_json(cut / "settings.json"), "lsp", **changes)
    write_json(cut / "settings.json", old)
    done = command(selfplay, tmp_path, "--resume", "runs/cut")
    assert refused(done, f"played with {says}", "does not have")
    assert done.stderr.count("\n") == 1
    assert (cut / runs.CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("settings", [
    {"lam_last": 2.0}, {"lam_last": 2.0, "iterations": "two"}, {"lam_last": 2.0, "iterations": 2},
])
def test_old_settings_that_make_no_sense_are_one_line(settings, cut, tmp_path):
    write_json(cut / "settings.json", {"game": "spin"} | settings)
    done = command(spin, tmp_path, "--resume", "runs/cut")
    assert refused(done, "not a run's settings") and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# A new run

def test_runs_are_numbered_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(runs.new_run(None, "lsp", {})) for _ in range(2)]
    assert names == ["runs/lsp-1", "runs/lsp-2"]
    (tmp_path / "runs" / "link").symlink_to("nowhere")
    for taken in ("lsp-1", "link"):
        with pytest.raises(console.UserError, match="exists already"):
            runs.new_run(taken, "lsp", {})


@pytest.mark.parametrize("module", [selfplay, spin])
def test_a_taken_name_is_refused_before_anything_is_loaded(module, tmp_path, monkeypatch):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    monkeypatch.setattr(module, "set_up", lambda *_: pytest.fail("loads first"))
    done = command(module, tmp_path, "--model", str(ROOT / "tiny"), "--run", "taken")
    assert done.returncode == 2 and "exists already" in done.stderr


REWARDS = """
import time

def raises(queries, answers):
    return 1 / 0

def hangs(queries, answers):
    time.sleep(60)

def swallows(queries, answers):
    for _ in range(100):
        try:
            time.sleep(0.1)
        except Exception:  # a user's own code may do this, but the time limit must still work
            pass
    return [[0.0] * len(group) for group in answers]

def two_lines(queries, answers):
    raise ValueError("one\\ntwo")

def nan(queries, answers):
    return [[float("nan")] * len(group) for group in answers]

def huge(queries, answers):
    return [[3e38 * (-1) ** i for i, _ in enumerate(group)] for group in answers]
"""


@pytest.mark.parametrize("name, says", [
    ("raises", "failed: ZeroDivisionError: division by zero (mine.py, line 5)"),
    ("swallows", "took longer than 0.2 seconds"),
    ("two_lines", "ValueError: one two (mine.py, line 19)"),
    ("hangs", "took longer than 0.2 seconds"),
    ("nan", "NaN or infinity"),
    ("huge", "the step was not taken"),
])
def test_a_reward_gone_wrong_stops_the_run_in_one_line(name, says, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.setattr(console, "REWARD_SECONDS", 0.2)
    done = command(selfplay, tmp_path, *COMMON, *LSP, "--game", "lsp-zero", "--steps", "2",
                   "--reward", f"mine.py:{name}", "--run", "a")
    assert refused(done, says) and done.stderr.count("\n") == 1
    run = tmp_path / "runs" / "a"
    assert (run / "metrics.jsonl").read_text() == (run / "games.jsonl").read_text() == ""
    if name == "huge":
        assert len(read_json(run / "not-finite.json")["games"]) == 2


def test_a_reward_that_does_not_load_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\ny = missing\n")
    done = command(selfplay, tmp_path, *COMMON, "--game", "lsp-zero", "--reward", "mine.py:f")
    assert refused(done, "NameError: name 'missing' is not defined (mine.py, line 2)")


# --------------------------------------------------------------------------------------------------
# The flags of both games

def rows(module):
    """A game's table of settings: {flag: its row}."""
    return {row[0]: row for row in module.SETTINGS if not isinstance(row, str)}


def test_flags_that_both_games_share_have_the_same_words_and_defaults():
    """Those of `runs` are the same rows. Only four flags are each game's own by nature."""
    lsp, other = rows(selfplay), rows(spin)
    shared = lsp.keys() & other.keys()
    different = {flag for flag in shared if lsp[flag] != other[flag]}
    assert different == {"--game", "--data", "--lr", "--dry-run"}
    for row in (runs.MODEL, runs.ANSWER_TOKENS, *runs.SETTINGS[1:]):
        assert lsp[row[0]] == other[row[0]] == row


@pytest.mark.parametrize("module", [selfplay, spin])
def test_help_names_every_default_of_both_columns(module, tmp_path, monkeypatch):
    """And they are the real defaults: those of a command line without flags."""
    monkeypatch.setenv("COLUMNS", "500")  # a flag's help on one line

    def shown(value):
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)
    done = command(module, tmp_path, "-h")
    assert done.returncode == 0
    text, named = " ".join(done.stdout.split()) + " -", 0
    for flag, _, tiny, real, words in rows(module).values():
        if tiny == real and (tiny is None or tiny is False or tiny == []):
            default = ""
        elif tiny == real:
            default = f" (default: {shown(tiny)})"
        else:
            other = "it must be given" if real is None else shown(real)
            default = f" (default: {shown(tiny)}; with a real model: {other})"
        named += bool(default)
        assert f"{words}{default} -" in text or f"{words}{default} the " in text, flag
    assert text.count("(default: ") == named > 10
    assert text.count("it must be given") == (module is selfplay)
    for real, column in ((False, 2), (True, 3)):
        found = vars(console.parse(module.SETTINGS, [], "x", "", real=real))
        for flag, row in rows(module).items():
            assert found[flag[2:].replace("-", "_")] == row[column]
