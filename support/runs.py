"""The folder of a run: make it, lock it, stop, and resume to the same bits.

    runs/lsp-1/  settings.json  metrics.jsonl  games.jsonl  model/  checkpoint.safetensors  ..
"""
import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import time
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from support import memory
from support.adapters import TARGETS
from support.console import UserError, note, positive
from support.files import TOKENIZER_FILES, adapter_of, find, is_hub_name, read_json
from support.learning import load_state, previous, read_state, save_state
from support.machine import DEVICE, DTYPES, Crew

CHECKPOINT = "checkpoint.safetensors"  # in a run's folder, until the run is at its end
MAY_CHANGE = ("torch", "save_every", "reward_timeout")  # settings that a resumed run may change

# The flags that both games share: same name, words and default. A row: flag, kind, default on the
# embedded model, default on a real one, help.
MODEL = ("--model", str, "tiny", "tiny",
         "folder in Hugging Face layout, a run's folder, or a hub name (org/name, or "
         "org/name@revision)")
SPLIT = ("--split", str, "train", "train",
         "which part of a hub dataset (--data owner/name), such as train, or main/train")
EVAL_SPLIT = ("--eval-split", str, "test", "test", "the same of --eval-data")
SKIP_BAD_ROWS = ("--skip-bad-rows", bool, False, False,
                 "leave out, and name, rows of --data that are empty, too long or refused by the "
                 "chat template; without it the run is refused")
TEMPLATE_ARGS = ("--template-args", [str], [], [],
                 "variables of the chat template, each name=value in JSON, such as "
                 "enable_thinking=false: for players, judge and data alike")
EVAL_DATA = ("--eval-data", str, None, None,
             "held-out rows for the scores, as --data; without it a tenth of --data is held out; "
             "none: nothing is")
ANSWER_TOKENS = ("--answer-tokens", positive(int), 32, 256, "longest answer")
# With LoRA the learning rate is this many times that of full training. Ten is what Schulman et al.
# found best ("LoRA Without Regret", 2025), for fine-tuning and for reinforcement learning.
LORA_RATE = 10
SETTINGS = [
    "the run",
    ("--seed", positive(int, zero=True), 0, 0, "seed of everything random"),
    ("--run", str, None, None,
     "name of the run's folder below runs/; without it: the game and the next free number"),
    ("--resume", str, None, None,
     "go on with a run that was stopped or killed, by its folder; its own settings hold, so no "
     "other flag may stand beside it"),
    ("--save-every", positive(int), 50, 50,
     "steps between checkpoints, from which --resume goes on; one is also written every ten "
     "minutes and on Ctrl-C"),
    ("--eval-items", positive(int), 1000, 100, "held-out questions for the scores, at the most"),
    ("--micro-batch", positive(int), 512, 4096,
     "token positions computed at once; changes memory and speed only"),
    ("--dtype", tuple(DTYPES), "float32", "float32",
     "of all models; a trained model keeps float32 weights beside it"),
    ("--lora", positive(int), None, None,
     "rank of LoRA adapters (arXiv 2106.09685), such as 16: they alone are trained, and the model "
     "with them off is the reference"),
    ("--lora-alpha", positive(float), 32.0, 32.0, "their scale is alpha divided by the rank"),
    ("--lora-targets", [TARGETS], [*TARGETS], [*TARGETS], "the layers of a block that have one"),
    ("--low-memory", bool, False, False,
     "compute activations again in the backward pass; on a GPU, also keep frozen models in CPU "
     "memory while they are not asked: less memory, more time"),
    ("--device", str, DEVICE, DEVICE, "cpu, cuda, mps, .."),
]


# --------------------------------------------------------------------------------------------------
# Names of folders

def model_folder(name):
    """The folder of the model that `name` stands for. A hub name stays as it is.

    For a run's folder that is model/, or SPIN's last whole iterate. Raises UserError where there is
    no model.
    """
    folder = Path(name)
    if str(name) == MODEL[2] and not folder.is_dir():  # started in somebody's own folder
        folder = Path(__file__).parent.parent / name
    if (folder / "metrics.jsonl").is_file():
        if not iterates(folder):
            raise UserError(f"{name}: this run has no finished model")
        return iterates(folder)[-1]
    if is_hub_name(name):
        return name
    if not folder.is_dir():
        raise UserError(f"{name}: no such model folder")
    read_json(find(folder, ["config.json"]) / "config.json")
    return folder


def iterates(folder):
    """The models of a run in order, the last one at the end.

    They are SPIN's whole iterates, or those that --keep-every kept and model/ of another game.
    """
    folder, last = Path(folder), Path(folder) / "model"
    is_whole = (last / "model.safetensors").is_file()
    kind = "step-" if is_whole else "iteration-"
    found = [path for path in folder.glob(f"{kind}*") if path.name.removeprefix(kind).isdigit()
             and (path / "model.safetensors").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(kind))) + [last] * is_whole


def check_name(name):
    """Raise UserError if --run `name` cannot be a new run. Asked before anything is loaded."""
    folder = Path("runs") / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"--run {name!r} is not a plain folder name")
    if os.path.lexists(folder):  # a link that leads nowhere counts, too
        go_on = f", or --resume {folder} to go on with it"
        raise UserError(f"{folder} exists already: choose another --run"
                        f"{go_on if (folder / CHECKPOINT).is_file() else ''}; nothing was touched")


def changed(args, other):
    """The settings, some of them changed. other: {name: value}."""
    return argparse.Namespace(**vars(args) | other)


def savings(args):
    """[(flag, {name: value})]: what a run could change to need less memory, the cheapest first.

    The first costs nothing, and the next ones time. Then it is another game.
    """
    found = []
    if args.dtype != "bfloat16":
        found.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    if args.micro_batch >= 512:
        found.append((f"--micro-batch {args.micro_batch // 4}",
                      {"micro_batch": args.micro_batch // 4}))
    if not args.low_memory:
        found.append(("--low-memory", {"low_memory": True}))
    if not args.lora:
        found.append(("--lora 16", {"lora": 16}))
    for name in ("queries", "answers", "answer_tokens"):
        half = getattr(args, name, 0) // 2
        if half > 1:
            found.append((f"--{name.replace('_', '-')} {half}", {name: half}))
    return found


def check_memory(plan, args, device, processes=1, **more):
    """memory.check of a game's plan, a function of (settings, processes, **more)."""
    memory.check(lambda other, count: plan(changed(args, other), count, **more), device,
                 args.dry_run, processes, savings(args))


def check_lora(args):
    """Raise UserError for settings of LoRA without --lora, and for --lora on an adapter."""
    if args.lora and adapter_of(model_folder(args.model)):
        raise UserError(f"--lora on {args.model}, which is an adapter itself: what is trained on "
                        "top would belong to no model's folder; merge it into its base first "
                        "(peft's merge_and_unload)")
    if not args.lora and (args.lora_alpha != 32 or tuple(args.lora_targets) != TARGETS):
        raise UserError("--lora-alpha and --lora-targets are about --lora: name its rank, too")


def other_files(args):
    """{file: its CRC-32} of what a run depends on besides weights and data.

    They are the files of users' functions (--reward, --pay, --judge), and the tokenizer's.
    """
    specs = ",".join(str(getattr(args, flag, "")) for flag in ("reward", "pay", "judge")).split(",")
    paths = [Path(spec.partition(".py:")[0] + ".py") for spec in specs if ".py:" in spec]
    paths += [Path(args.model) / name for name in TOKENIZER_FILES]
    return {str(path): zlib.crc32(path.read_bytes()) for path in paths if path.is_file()}


def check_disk(args, parameters, adapters, optimizer_floats, models):
    """Raise UserError if a run's folder would not fit on its disk. --dry-run: print what it needs.

    A checkpoint is the float32 weights that are trained, and the optimizer's numbers. Two are kept,
    and a third is there while it is written. adapters: how many numbers LoRA's have, or None.
    models: how many models of so many parameters the run leaves behind.
    """
    checkpoint = 4 * (1 + optimizer_floats) * (adapters or parameters)
    need = 3 * checkpoint + models * DTYPES[args.dtype].itemsize * parameters
    place, gib = Path(args.resume or "runs"), 2**30
    place = place.parent if place.is_file() else place
    there = [path.stat().st_size for path in place.glob("**/*.safetensors*")] if args.resume else []
    place = next(folder for folder in (place, *place.parents, Path(".")) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if getattr(args, "dry_run", False):
        print(f"    {'disk':<18}{need / gib:9.2f} GiB of {free / gib:.2f} GiB free: checkpoints of "
              f"{checkpoint / gib:.2f} GiB, three while one is written, and {models} "
              f"model{'s' * (models > 1)}; besides its games")
    if need - sum(there) > free:
        raise UserError(f"this run needs about {need / gib:.1f} GiB of disk, and "
                        f"{free / gib:.1f} GiB are free: three checkpoints of "
                        f"{checkpoint / gib:.1f} GiB and {models} model{'s' * (models > 1)}")


# --------------------------------------------------------------------------------------------------
# A run that is being played

class Run:
    """A run that is being played.

    folder: Path. facts: where it stands, as the last checkpoint says. tensors: that checkpoint's;
    None in a new run, and once they are restored. metrics, games: the two .jsonl files, open for
    writing. Of several processes only the first writes; the others' files lead nowhere.
    """

    def __init__(self, folder, facts, tensors, save_every, crew):
        self.folder, self.facts, self.tensors = folder, facts, tensors
        self.save_every, self.crew = save_every, crew
        self.saved = time.perf_counter()
        self.metrics = self._log("metrics")
        self.games = self._log("games")

    def _log(self, name):
        if self.crew.rank:
            return open(os.devnull, "w", encoding="utf-8")
        return open_log(self.folder / f"{name}.jsonl", self.facts[name])

    def restore(self, model, optimizer, generator, rng):
        """Put the checkpoint back into all four, and let go of it. Returns its tensors."""
        tensors, self.tensors = self.tensors, None
        load_state(model, optimizer, generator, tensors, self.crew)
        version, state, gauss = self.facts["rng"]
        rng.setstate((version, tuple(state), gauss))
        return tensors

    def due(self, done):
        """Is a checkpoint due after `done` steps? All processes get the same answer.

        One is due every --save-every steps, and ten minutes after the last.
        """
        return done % self.save_every == 0 or any(self.crew.all(self.late()))

    def late(self):
        """Were ten minutes not written down yet?"""
        return time.perf_counter() - self.saved > 600

    def checkpoint(self, optimizer, generator, facts, **tensors):
        """Write down where the run stands. facts: JSON. tensors: others that the game needs."""
        self.facts |= facts | {"metrics": self.metrics.tell(), "games": self.games.tell()}
        save_state(self.folder / CHECKPOINT, optimizer, generator, self.facts, self.crew, **tensors)
        self.saved = time.perf_counter()

    def end(self):
        """The run is at its end: remove what it could have gone on from."""
        for path in (self.folder / CHECKPOINT, previous(self.folder / CHECKPOINT)):
            path.unlink(missing_ok=True)


@contextmanager
def open_run(args, start, crew=Crew(), **facts):
    """The Run of these settings, locked against other processes inside the `with`.

    It is a new one, or the one that args.resume names. start: fingerprint of what it begins with,
    model and data. facts: where a new run stands. Raises UserError.
    """
    settings = {key: value for key, value in vars(args).items() if key != "resume"}
    with ExitStack() as stack:
        folder = tensors = None
        if not crew.rank and args.resume:
            folder, held, facts, tensors = reopen(args.resume)
            stack.push(held)
        elif not crew.rank:
            folder = new_run(args.run, args.game, settings)
            stack.push(lock(folder))
            facts |= {"settings": settings, "start": start, "metrics": 0, "games": 0,
                      "files": other_files(args)}
        folder, facts = crew.all((folder, facts))[0]  # the first process's
        if facts["start"] != start:
            data = f" or {args.data}" if args.data else ""
            raise UserError(f"{args.model}{data} is not what this run began with")
        for path, number in other_files(args).items():
            if facts.get("files", {}).get(path, number) != number:
                note(f"{path} is not what it was when this run began")
        if args.resume and crew.rank:
            tensors = read_state(folder / CHECKPOINT)[1]
        run = Run(folder, facts, tensors, args.save_every, crew)
        del tensors  # `restore` lets go of the last of them
        stack.push(run.metrics)
        stack.push(run.games)
        yield run


def new_run(name, game, settings):
    """Make runs/<name>, or runs/<game>-<next free number>, and write settings.json there.

    Never an existing folder. Says so where a run with these settings was stopped. Raises UserError.
    """
    number = 1
    while True:
        folder = Path("runs") / (name or f"{game}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if name:  # made since it was checked, by another process
                check_name(name)
            number += 1
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror}") from None
    settings = settings | {"torch": torch.__version__}
    for other in sorted(Path("runs").glob(f"{game}-*")):
        if (other / CHECKPOINT).is_file() and _could_go_on(other, settings):
            print(f"{other} was stopped with these very settings: --resume {other} would go on "
                  "with it; this is a new run")
    (folder / "settings.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def _could_go_on(folder, settings):
    try:
        lock(folder).close()
        other = read_json(folder / "settings.json")
        return other | {"date": None} == settings | {"date": None}
    except UserError:  # not readable, or being played
        return False


def lock(folder):
    """Make this the only process on a run's folder, while the returned file is open. UserError."""
    file = open(folder / "settings.json", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder}: another process is playing this run") from None
    return file


def open_log(path, size):
    """A run's .jsonl file, open for appending. What is beyond `size` bytes is cut off first.

    That was written after the checkpoint, and will be played again.
    """
    path.touch()
    os.truncate(path, min(size, path.stat().st_size))
    return open(path, "a", 1, encoding="utf-8")


@contextmanager
def stop_asked():
    """A list that is no longer empty once Ctrl-C or SIGTERM asked the run to stop.

    The run then finishes its step, saves, and stops. A second Ctrl-C stops it at once.
    """
    asked = []

    def ask(signum, _):
        if signum == signal.SIGINT and signum in asked:
            raise KeyboardInterrupt
        asked.append(signum)
        print("\nstopping after this step (Ctrl-C again: at once, the last checkpoint stays)",
              file=sys.stderr)
    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# --------------------------------------------------------------------------------------------------
# A run that goes on

def resumed(argv, defaults):
    """The settings of the run that --resume names: its folder, or a checkpoint in it.

    argv: the words of the command line, None for the process's own. defaults: the command's
    settings without any flag; they stand for what the run's version did not know.
    Raises UserError where there are other flags, or where the run cannot be resumed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[-1].removeprefix("--resume=")
    if argv not in (["--resume", name], [f"--resume={name}"]):
        raise UserError("--resume goes on by the run's own settings: leave all other flags out")
    folder = Path(name).parent if Path(name).is_file() else Path(name)
    if not (folder / "settings.json").is_file():
        raise UserError(f"--resume {name}: no run's folder (it has no settings.json)")
    settings = modern(read_json(folder / "settings.json"))
    if settings["command"] != defaults.command:
        raise UserError(f"--resume {name}: this was a game of {settings.get('game')}: "
                        f"resume it with {settings['command']}")
    if not any((folder / file).is_file() for file in (CHECKPOINT, CHECKPOINT + ".previous")):
        raise UserError(f"--resume {name}: there is no checkpoint: the run is at its end, or was "
                        "stopped before its first one")
    settings.pop("torch", None)
    # Older versions held nothing out of the data.
    settings.setdefault("eval_data", "none" if settings.get("data") else None)
    return argparse.Namespace(**vars(defaults) | settings | {"resume": name})


def modern(settings):
    """A run's settings, where an older version wrote them, in today's words. Raises UserError."""
    if "command" in settings:
        return settings
    old = settings | {"command": "spin.py" if settings.get("game") in ("spin", "sft")
                      else "selfplay.py"}
    for gone, default in (("clip", 1.0), ("cuda_graphs", False), ("explain", False)):
        if old.pop(gone, default) != default:
            raise UserError(f"this run was played with --{gone.replace('_', '-')}, which this "
                            "version does not have: go on with the version that began it")
    for gone in ("reward_timeout", "games_every"):
        old.pop(gone, None)
    old["low_memory"] = bool(old.pop("recompute", False)) | bool(old.pop("offload", False))
    if revision := old.pop("revision", None):
        old["model"] = f"{old.get('model')}@{revision}"
    if old.get("game") == "lsp" and old.get("quality") == 0:
        old["game"] = "lsp-zero"
    if "lam_last" in old:  # SPIN's per-iteration settings were two numbers, not one an iteration
        try:
            first, last, early, late = (old.pop(k) for k in ("lam", "lam_last", "lr", "lr_late"))
            t = old["iterations"]
            if type(t) is not int or not 0 < t <= 10**6:
                raise TypeError("iterations")
            old["lam"] = [first] * (t - 1) + [last if t > 1 else first]
            old["lr"] = [early] * min(t, 2) + [late] * (t - 2)
        except (KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"settings.json: not a run's settings ({error})") from None
    return old


def reopen(name):
    """(folder, its lock, facts, tensors) of the run that --resume names.

    A checkpoint named itself becomes the run's, in place of a damaged one. Raises UserError for a
    run that is being played, or a checkpoint of other settings than the folder's.
    """
    name = Path(name)
    folder = name.parent if name.is_file() else name
    held = lock(folder)
    path = name if name.is_file() else folder / CHECKPOINT
    if not path.is_file() and previous(folder / CHECKPOINT).is_file():
        path = previous(folder / CHECKPOINT)  # killed between two renames: this one is the last
    facts, tensors = read_state(path)
    if _fixed(facts.get("settings", {})) != _fixed(read_json(folder / "settings.json")):
        raise UserError(f"{path}: of a run with other settings than {folder / 'settings.json'} "
                        "says")
    if path.name != CHECKPOINT:
        path.replace(folder / CHECKPOINT)
    return folder, held, facts, tensors


def _fixed(settings):
    return {key: value for key, value in settings.items() if key not in MAY_CHANGE}
