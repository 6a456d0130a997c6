"""Trials: declared runs, played several at once, each with a small file of what it came to.

    OUT/runs/lsp-s10/              the run's own folder: a stopped one is resumed
    OUT/data/grpo-on-32-s10.jsonl  the data that it learns from, where it has some
    RESULTS/worth/lsp-s10.json     its result: settings, commit, curves, and how many answers are
                                   right, of how many, instruction by instruction

Whatever is shown is computed from results alone. A run that is part of several experiments is
played once: its result lies in the folder of the one that played it.
"""
import base64
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

from support import intervals, report, runs
from support.console import UserError

ROOT = Path(__file__).resolve().parent.parent
START = ROOT / "tiny"  # the model that all runs start from, unless they start from another run's
FIRST_SEED = 10  # the settings were chosen with smaller ones
FOUR = "chains of four"  # a set of instructions, beside the numbered drawings
TENTHS = 10  # a curve is kept as the mean of each tenth of the steps


class Run(NamedTuple):
    """A declared run. Its name is that of a row of a table, and of its files."""
    name: str
    command: str  # a script and its flags, but for model, seed and folder; "": nothing is played
    seeds: int = 3  # how many of them
    after: "Run | None" = None  # the run whose model it starts from
    data: Callable | None = None  # seed -> list of objects, the rows of its --data

    @property
    def slug(self):
        """The name as that of a file."""
        return self.name.lower().replace(",", "").replace(" ", "-")


AT_START = Run("start", "")  # nothing is played: the start itself is scored


# --------------------------------------------------------------------------------------------------
# Files of results

def packed(numbers):
    """Whole numbers from 0 to 255, one an instruction, as text: zlib, then base 64."""
    return base64.b64encode(zlib.compress(bytes(numbers), 9)).decode()


@functools.lru_cache(maxsize=4096)
def unpacked(text):
    """The numbers of `packed`, [n]."""
    return torch.tensor(list(zlib.decompress(base64.b64decode(text))), dtype=torch.float32)


def counted(items, samples):
    """What one set of instructions came to, with counts, of evaluate.py's figures of each.

    items: {"sampled", "greedy", "pass@8"}: for each instruction the share of right answers.
    samples: of how many answers "sampled" is the share.
    """
    sampled = [round(samples * share) for share in items["sampled"]]
    greedy, best, n = [round(x) for x in items["greedy"]], sum(k > 0 for k in sampled), len(sampled)
    return {"sampled": {"right": sum(sampled), "of": samples * n, "each": packed(sampled)},
            "greedy": {"right": sum(greedy), "of": n, "each": packed(greedy)},
            f"pass@{samples}": {"right": best, "of": n}}


def read_results(folder):
    """{(a run's slug, seed): result} of all files in the folders of `folder`. Raises UserError."""
    found = {}
    for path in sorted(Path(folder).glob("*/*-s*.json")):
        slug, _, seed = path.stem.rpartition("-s")
        try:
            found[slug, int(seed)] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not a result ({error})") from None
    return found


def write_json(path, value):
    """Write a JSON file, a line for each of its entries. A kill leaves the old one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(x)}" for key, x in value.items())
    new = path.with_suffix(".new")
    new.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    new.replace(path)


def curves_of(folder):
    """{figure: TENTHS means} of a run, each over a tenth of its steps; None where it has none."""
    found = {}
    for name, curve in report.read_metrics(folder).items():
        n, means = len(curve), []
        for i in range(TENTHS):
            part = curve[i * n // TENTHS:(i + 1) * n // TENTHS] or curve[-1:]
            part = [value for value in part if value == value]
            means.append(round(sum(part) / len(part), 5) if part else None)
        found[name] = means
    return {name: means for name, means in found.items() if name not in ("step", "iteration")}


@functools.cache
def commit():
    """The commit of the code, with "+" where files differ from it; "unknown" without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], text=True, check=True,
                              capture_output=True).stdout.strip()
        code = ["--", "*.py", "tiny"]
        same = subprocess.run([*git, "diff", "--quiet", "HEAD", *code]).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("" if same else "+")


@functools.cache
def start_weights():
    """A checksum of the start's weights."""
    return hashlib.sha256((START / "model.safetensors").read_bytes()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Playing

class Queue:
    """What plays runs in the folder `out`, and writes their results into `results`/`name`.

    sets: {name of a set of instructions: the flags by which evaluate.py score asks it}, of which a
    result has each, and FOUR.
    """

    def __init__(self, out, results, name, sets):
        self.out, self.results, self.name, self.sets = Path(out).resolve(), results, name, sets
        self.found, self.locks = read_results(results), defaultdict(threading.Lock)
        self.children, self.stopping = set(), False

    def is_done(self, run, seed):
        """Is a whole result there? Raises UserError for one of another declaration or start."""
        result = self.found.get((run.slug, seed))
        if result is None:
            return False
        declared = {"command": run.command, "weights": start_weights()}
        if {key: result[key] for key in declared} != declared:
            raise UserError(f"{self.results}: the result of {run.name}, seed {seed}, is of another "
                            "command or start than this version's: move it away")
        return all(self.sets.keys() <= model["scores"].keys() for model in result["models"])

    def play_all(self, trials, jobs):
        """Play those trials (run, seed) that have no result, `jobs` at once, in order.

        Raises UserError if any fails, once the others are through. Ctrl-C lets the runs that are
        being played save where they stand.
        """
        trials, running = [t for t in trials if not self.is_done(*t)], {}
        with (tqdm(total=len(trials), unit="run", dynamic_ncols=True) as bar,
              ThreadPoolExecutor(jobs) as pool):

            def play(trial):
                run, seed = trial
                running[trial] = f"{run.name}, seed {seed}"
                bar.set_postfix_str("; ".join(list(running.values())))
                try:
                    self.score(run, seed)
                except UserError as error:
                    return f"{run.name}, seed {seed}: {error}"
                finally:
                    del running[trial]
                    bar.update()

            try:
                errors = [error for error in pool.map(play, trials) if error]
            except KeyboardInterrupt:
                self.stopping = True
                for child in list(self.children):
                    child.send_signal(signal.SIGINT)
                pool.shutdown(cancel_futures=True)
                raise
        if errors:
            raise UserError(f"{len(errors)} of {len(trials)} runs failed: {errors[0]}; "
                            "the finished ones are kept, and the same command continues")

    def score(self, run, seed):
        """Play a run, ask its models all instructions, and write its result. Raises UserError."""
        folder, models = self.play(run, seed), []
        for path in runs.iterates(folder) if run.command else [START]:
            scores = {}
            for name, flags in self.sets.items():
                file = self.out / f"{run.slug}-s{seed}.scores"
                self.call("evaluate.py", "score", path, *flags.split(), "--seed", seed, "--json",
                          file, "--device", "cpu")
                figures = json.loads(file.read_text(encoding="utf-8"))
                file.unlink()
                scores[name] = counted(figures["items"], figures["samples"])
                scores[FOUR] = counted(figures["longer"], figures["samples"])
            models.append({"name": path.name, "scores": scores})
        result = self.facts(run, seed, folder) | {"models": models}
        there = sorted(Path(self.results).glob(f"*/{run.slug}-s{seed}.json"))  # with fewer scores
        write_json((there or [self.results / self.name / f"{run.slug}-s{seed}.json"])[0], result)
        self.found[run.slug, seed] = result

    def facts(self, run, seed, folder):
        """What a result says beside the scores."""
        facts = {"run": run.name, "seed": seed, "command": run.command,
                 "after": run.after and run.after.name, "commit": commit(),
                 "weights": start_weights(), "torch": torch.__version__,
                 "date": date.today().isoformat()}
        if not run.command:
            return facts
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        metrics = report.read_metrics(folder)
        facts["minutes"] = round(sum(metrics["seconds"]) / 60, 3)
        facts["tokens"] = int(sum(metrics["tokens"]))
        if run.data:
            text = self.data_file(run, seed).read_bytes()
            facts["data"] = {"rows": text.count(b"\n"), "crc32": zlib.crc32(text)}
        if (folder / "commit.txt").is_file():  # of when it was played
            facts["commit"] = (folder / "commit.txt").read_text(encoding="utf-8")
        # Not where the project, its runs and the model lie on this machine.
        settings = {key: value.removeprefix(f"{self.out}/").removeprefix(f"{ROOT}/")
                    if isinstance(value, str) else value for key, value in settings.items()}
        facts["settings"] = settings | {"model": run.after.name if run.after else START.name}
        return facts | {"curves": curves_of(folder)}

    def play(self, run, seed):
        """The folder of a run that is at its end. Plays what lacks, and first what it starts from.

        Raises UserError.
        """
        folder = self.out / "runs" / f"{run.slug}-s{seed}"
        with self.locks[run.slug, seed]:  # others may wait for this run's model
            if not run.command or finished(folder):
                return folder
            model = self.play(run.after, seed) if run.after else START
            script, *flags = run.command.split()  # a recipe's file is the project's
            flags = [str(ROOT / word) if word.startswith("recipes/") else word for word in flags]
            if (folder / runs.CHECKPOINT).is_file():
                self.call(script, "--resume", Path("runs") / folder.name)
            else:
                if folder.is_dir():
                    put_aside(folder)
                if run.data:
                    flags += ["--data", self.data_file(run, seed), "--eval-data", "none"]
                self.call(script, *flags, "--model", model, "--seed", seed, "--run", folder.name,
                          "--eval-items", 200, "--device", "cpu")
            if not finished(folder):
                raise UserError("stopped")
            (folder / "commit.txt").write_text(commit(), encoding="utf-8")
            return folder

    def data_file(self, run, seed):
        """The file of a run's data, written if it is not there."""
        path = self.out / "data" / f"{run.slug}-s{seed}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            lines = "".join(json.dumps(row) + "\n" for row in run.data(seed))
            new.write_text(lines, encoding="utf-8")
            new.replace(path)
        return path

    def call(self, script, *words):
        """Run one of the repository's scripts in the folder `out`, on one thread. UserError."""
        if self.stopping:
            raise UserError("stopped")
        # A session of its own: Ctrl-C is passed on by play_all alone, once.
        child = subprocess.Popen(
            [sys.executable, *map(str, (ROOT / script, *words))], cwd=self.out, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.children.add(child)
        errors = child.communicate()[1].strip().splitlines()
        self.children.discard(child)
        if child.returncode:
            raise UserError(errors[-1] if errors else f"{script} ended with {child.returncode}")


def finished(folder):
    """Did a run reach its end? A stopped run has a picture too, but fewer steps or iterations."""
    if not (folder / "curves.png").is_file():  # the last file that a run writes
        return False
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    if "steps" in settings:
        steps = len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return steps == settings["steps"]
    return len(runs.iterates(folder)) == settings["iterations"]


def put_aside(folder):
    """Rename the folder of a run that was cut off: it is kept, and its name becomes free."""
    names = (folder.with_name(f"{folder.name}-cut-{i}") for i in range(1, 1000))
    folder.rename(next(name for name in names if not name.exists()))


# --------------------------------------------------------------------------------------------------
# What was found

class Missing(Exception):
    """A figure that needs a run which has no result yet."""


class Results(NamedTuple):
    """What was found: figures of runs, over all seeds that are there."""
    found: dict  # of read_results
    instructions: str  # the set that figures are of
    outside: float = 0.05  # of the intervals, see support/intervals.py
    least: int = 1  # with fewer seeds a figure is Missing

    def has(self, run):
        """Is there a result of a run, and one of the start with the same seed?"""
        return any((AT_START.slug, seed) in self.found
                   for slug, seed in self.found if slug == run.slug)

    def seeds(self, *names):
        """The seeds that all these runs have results of. Raises Missing where they are too few."""
        seeds = [{seed for slug, seed in self.found if slug == run.slug} for run in names]
        if not (shared := set.intersection(*seeds)):
            raise Missing(" and ".join(r.name for r, own in zip(names, seeds) if not own)
                          or "a seed that all have")
        if len(shared) < self.least:
            each = dict.fromkeys(r.name for r in names)
            raise Missing(f"{self.least} seeds of {' and of '.join(each)}")
        return sorted(shared)

    def results(self, run, seeds=None):
        """The results of a run, one for each seed. Raises Missing."""
        return [self.found[run.slug, seed] for seed in seeds or self.seeds(run)]

    def items(self, run, way="sampled", seeds=None, model=-1):
        """[seeds, n]: the share of right answers to each instruction.

        way: "sampled", "greedy" or "pass@8". model: which of its models, for SPIN.
        """
        def each(scores):
            greedy = way == "greedy"
            k = unpacked(scores["greedy" if greedy else "sampled"]["each"])
            if way.startswith("pass"):
                return (k > 0).float()
            return k if greedy else k / (scores["sampled"]["of"] / len(k))
        found = [result["models"][model]["scores"] for result in self.results(run, seeds)]
        if not all(self.instructions in scores for scores in found):
            raise Missing(f"{run.name} on {self.instructions}")
        return torch.stack([each(scores[self.instructions]) for scores in found])

    def level(self, run, way="sampled", model=-1):
        """[mean, low, high]: a run's right answers in percent."""
        return self.percent(self.items(run, way, model=model))

    def gain(self, run, way="sampled", over=AT_START, model=-1, over_model=-1):
        """[mean, low, high]: what a run gained over another, or over the start, in points.

        A point is one of a hundred. Of the seeds that both have; paired by seed and instruction.
        """
        seeds = self.seeds(run, over)
        return self.percent(self.items(run, way, seeds, model)
                            - self.items(over, way, seeds, over_model))

    def percent(self, x):
        """[mean, low, high] of x [seeds, n], times a hundred."""
        return [100 * value for value in intervals.seeds_and_items(x, self.outside)]

    def curve(self, run, key):
        """TENTHS means over the seeds: a figure of metrics.jsonl over the steps. Raises Missing."""
        curves = [result["curves"].get(key) for result in self.results(run)]
        if None in curves:
            raise Missing(f"{key} of {run.name}")
        return [sum(values) / len(values) for values in zip(*curves)]

    def end(self, run, key, over=None, then=-1):
        """[mean, low, high] over the seeds: a curve's last tenth, or, with `over`, minus another's.

        over: a run. then: which tenth of that. Raises Missing, also with one seed: a single number
        has no interval.
        """
        seeds = self._replace(least=max(2, self.least)).seeds(run, over or run)
        try:
            ours, theirs = ([result["curves"][key][i] for result in self.results(r, seeds)]
                            for r, i in ((run, -1), (over or run, then)))
        except KeyError:
            raise Missing(f"{key} of {run.name}") from None
        differences = [a - b * bool(over) for a, b in zip(ours, theirs)]
        return intervals.seeds_and_items(torch.tensor(differences)[:, None], self.outside)

    def minutes(self, run):
        """Minutes on one thread, a mean over the seeds; with what it started from. Raises Missing.
        """
        own = [result["minutes"] for result in self.results(run)]
        return sum(own) / len(own) + (self.minutes(run.after) if run.after else 0.0)
