"""The claims of both papers, tested: every game is played, and each claim gets a verdict.

    python recipes/claims.py            3 runs of each method, 300 steps: two hours on 2 cores
    python recipes/claims.py --quick    1 run of each, 40 steps: some minutes, to see how it works

The papers are Language Self-Play (LSP, arXiv 2509.07414) and Self-Play Fine-Tuning (SPIN, arXiv
2401.01335). All methods start from the embedded default in tiny/. They are compared on the same
held-out instructions, which were not used to choose any setting. The folder --out gets claims.md
(the table and the verdicts), claims.png, and every run. Finished runs are kept, so the same
command continues where it was stopped.
"""
import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate
from support import console, report, runs
from tiny import language

START = ROOT / "tiny"  # the model that all methods start from
HELD_OUT = 1  # which draw of held-out instructions; the settings were chosen on other draws
ITEMS = 2000  # how many of them
EAGER = 0.03  # alpha_Ch of the long runs: large enough for LSP and LSP-Zero to drift apart

GRPO, GRPO_FIRST, LSP_FIRST = "GRPO on data", "GRPO, then LSP", "LSP, then GRPO"
EAGER_ZERO = "LSP-Zero, eager"
LONG_ZERO, LONG_LSP = "LSP-Zero, eager, 3 x as long", "LSP, eager, 3 x as long"
FINE_TUNING, ONE_LONG = "more fine-tuning", "SPIN, one long iteration"


def method_commands(steps):
    """{method: (command line, method whose model it starts from, or None)}.

    All runs of LSP and GRPO play the same number of games, except the two that are three times
    as long.
    """
    games = ("lsp", "lsp-zero", "grpo")
    lsp, zero, grpo = (f"selfplay.py --game {game} --steps {steps}" for game in games)
    long = f"--steps {3 * steps} --alpha-ch {EAGER}"
    pairs = f"--pairs {50 * steps // 3}"  # 300 steps: 5,000, the default of spin.py
    return {
        GRPO: (grpo, None),
        "LSP-Zero": (zero, None),
        "LSP": (lsp, None),
        GRPO_FIRST: (lsp, GRPO),
        LSP_FIRST: (grpo, "LSP"),
        "LSP paid r-zero": (f"{lsp} --pay r-zero", None),
        "LSP paid absolute-zero": (f"{lsp} --pay absolute-zero", None),
        "LSP paid sqlm": (f"{lsp} --pay sqlm", None),
        "LSP paid spice": (f"{lsp} --pay spice", None),
        EAGER_ZERO: (f"{zero} --alpha-ch {EAGER}", None),
        LONG_ZERO: (f"selfplay.py --game lsp-zero {long}", None),
        LONG_LSP: (f"selfplay.py --game lsp {long}", None),
        "SPIN": (f"spin.py {pairs}", None),
        FINE_TUNING: (f"spin.py --game sft {pairs}", None),
        ONE_LONG: (f"spin.py {pairs} --iterations 1 --epochs 14", None),
    }


# --------------------------------------------------------------------------------------------------
# Intervals and verdicts

STUDENT = [math.nan, math.nan,  # Student's t, 97.5 %, by number of seeds
           12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def seeds_and_items(x):
    """[mean, low, high] of x [seeds, items], with a 95 % interval.

    Seeds and items are two sources of chance. The half-width of each is computed, and the two are
    added in squares. For seeds it uses Student's t. With one seed, the spread between seeds is
    unknown and left out. A single number has no finite interval.
    """
    S, n = x.shape
    if S == n == 1:
        return [x.item(), -math.inf, math.inf]
    seeds = STUDENT[min(S, 10)] * x.mean(1).std().item() / math.sqrt(S) if S > 1 else 0.0
    items = 1.959964 * x.mean(0).std().item() / math.sqrt(n) if n > 1 else 0.0
    mean, half = x.mean().item(), math.hypot(seeds, items)
    return [mean, mean - half, mean + half]


def verdict(interval, worse_by=0.0):
    """Is a figure above -worse_by? yes or no if its whole interval says so, else not decided."""
    if interval[1] > -worse_by:
        return "yes"
    return "no" if interval[2] < -worse_by else "not decided"


def all_of(*verdicts):
    """The verdict on a claim of several parts: yes if all are yes, no if any is no."""
    if "no" in verdicts:
        return "no"
    return "yes" if set(verdicts) == {"yes"} else "not decided"


# --------------------------------------------------------------------------------------------------
# Playing: one process a run, several at once

def slug(method):
    """A method's name as the name of a folder."""
    return method.lower().replace(",", "").replace(" ", "-")


def run_folder(out, method, seed):
    """The folder of one run."""
    return out / "runs" / f"{slug(method)}-s{seed}"


def finished(folder):
    """Did a run reach its end? A stopped run has a picture too, but fewer steps or iterations."""
    if not (folder / "curves.png").is_file():  # the last file that a run writes
        return False
    settings = _read_json(folder / "settings.json")
    if "steps" in settings:
        steps = len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return steps == settings["steps"]
    return len(runs.iterates(folder)) == settings["iterations"]


def run_method(out, method, seed, start, commands, children):
    """Play one run and score its models. What is there already is not done again.

    children: set of running processes; Ctrl-C ends them. Returns an error message, or None.
    """
    command, after = commands[method]
    folder = run_folder(out, method, seed)
    model = run_folder(out, after, seed) / "model" if after else Path(start).resolve()
    if not finished(folder):
        if folder.is_dir():
            _put_aside(folder)
        script, *words = command.split()
        error = _call(out, children, script, *words, "--model", model, "--seed", 10 + seed,
                      "--run", folder.name, "--eval-items", 1, "--device", "cpu")
        if error:
            return f"{method}, seed {seed}: {error}"
    for iterate in runs.iterates(folder):
        scores = iterate / "scores.json"
        if not scores.is_file():
            error = _call(out, children, "evaluate.py", *score_words(iterate, 10 + seed, scores))
            if error:
                return f"{method}, seed {seed}: {error}"


def score_words(model, seed, path):
    """The arguments of evaluate.py that score a model and write the figures to a JSON file."""
    words = ("score", model, "--held-out", HELD_OUT, "--items", ITEMS, "--seed", seed,
             "--json", path, "--device", "cpu")
    return [str(word) for word in words]


def _put_aside(folder):
    """Rename the folder of a run that was cut off: it is kept, and its name becomes free."""
    names = (folder.with_name(f"{folder.name}-cut-{i}") for i in range(1, 1000))
    folder.rename(next(name for name in names if not name.exists()))


def _call(out, children, script, *words):
    """Run one of the repository's scripts in the folder `out`, on one thread.

    Returns its last line of error, or None if it succeeded.
    """
    # A session of its own: otherwise Ctrl-C would make it save half a run as if it were whole.
    child = subprocess.Popen(
        [sys.executable, *map(str, (ROOT / script, *words))], cwd=out, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    children.add(child)
    errors = child.communicate()[1].strip().splitlines()
    children.discard(child)
    if child.returncode:
        return errors[-1] if errors else f"exit {child.returncode}"
    return None


def play_all(out, commands, seeds, jobs):
    """Play all runs, `jobs` at once, with a progress bar. Raises UserError if any run fails."""
    rounds = in_rounds(commands, seeds)
    total, running, children = sum(map(len, rounds)), {}, set()
    with (tqdm(total=total, unit="run", dynamic_ncols=True) as bar,
          ThreadPoolExecutor(jobs) as pool):

        def play(job):
            running[job] = f"{job[0]}, seed {job[1]}"
            bar.set_postfix_str("; ".join(list(running.values())))
            try:
                return run_method(out, *job, START, commands, children)
            finally:
                del running[job]
                bar.update()

        for jobs_of_round in rounds:
            play_round(pool, play, jobs_of_round, children)


def in_rounds(commands, seeds):
    """Two lists of (method, seed). The second holds those that start from another's model.

    In each list, the long runs come first: then none is left running alone at the end.
    """
    methods = sorted(commands, key=_is_short)
    first = [(m, s) for s in seeds for m in methods if commands[m][1] is None]
    second = [(m, s) for s in seeds for m in methods if commands[m][1] is not None]
    return [first, second]


def _is_short(method):
    return "long" not in method


def play_round(pool, play, jobs, children):
    """Play one round to its end. Raises UserError if any run failed; Ctrl-C ends all of them."""
    try:
        errors = [error for error in pool.map(play, jobs) if error]
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(children):
            child.kill()
        raise
    if errors:
        raise console.UserError(
            f"{len(errors)} of {len(jobs)} runs failed: {errors[0]}; "
            "the finished ones are kept, and the same command continues")


# --------------------------------------------------------------------------------------------------
# Results

class Results:
    """What was found: the scores of every method, seed and iteration, and the runs' curves.

    start: scores of the start, one a seed. scores: {method: [seed][iteration]}.
    metrics: {method: [curves of each seed]}. settings: {method: settings of its first run}.
    after: {method: the method whose model it starts from, or None}.
    """

    def __init__(self, out, commands, seeds):
        folders = {m: [run_folder(out, m, s) for s in seeds] for m in commands}
        self.start = [_read_json(out / f"start-s{s}.json") for s in seeds]
        self.scores = {m: [_scores(f) for f in fs] for m, fs in folders.items()}
        self.metrics = {m: [report.read_metrics(f) for f in fs] for m, fs in folders.items()}
        self.settings = {m: _read_json(fs[0] / "settings.json") for m, fs in folders.items()}
        self.after = {m: after for m, (_, after) in commands.items()}

    def cost(self, method):
        """(games, sampled tokens, minutes on one thread) of a run, as a mean over the seeds.

        The run that it starts from is included.
        """
        settings, metrics = self.settings[method], self.metrics[method]
        tokens = sum(sum(m["tokens"]) for m in metrics) / len(metrics)
        minutes = sum(sum(m["seconds"]) for m in metrics) / 60 / len(metrics)
        own = (_games(settings), tokens, minutes)
        after = self.after[method]
        return tuple(a + b for a, b in zip(own, self.cost(after))) if after else own

    def items(self, method, key, iterate=-1):
        """[seeds, items]: the share of right answers to each item. method None is the start.

        key: "sampled", "greedy", "pass@8", or "longer" (chains longer than any in training).
        """
        rows = self.start if method is None else [seed[iterate] for seed in self.scores[method]]
        return torch.tensor([row["items"][key] for row in rows])

    def gain(self, method, key="sampled", over=None, iterate=-1, over_iterate=-1):
        """[mean, low, high]: a method's gain over another, or over the start, in points.

        A point is one of a hundred.
        """
        ours, theirs = self.items(method, key, iterate), self.items(over, key, over_iterate)
        return in_percent(ours - theirs)

    def end(self, method, key):
        """The mean of a curve's last tenth, over the seeds."""
        curves = [m[key] for m in self.metrics[method]]
        return sum(report.tenth(curve, True) for curve in curves) / len(curves)

    def change(self, method, key, over=None):
        """[mean, low, high] over the seeds: the last tenth of a curve, minus a second figure.

        That is the curve's first tenth or, if `over` is given, the last tenth of that method's.
        """
        ours, theirs = self.metrics[method], self.metrics[over or method]
        differences = [report.tenth(a[key], True) - report.tenth(b[key], bool(over))
                       for a, b in zip(ours, theirs)]
        return seeds_and_items(torch.tensor([[d] for d in differences]))


def in_percent(x):
    """[mean, low, high] of x [seeds, items], times a hundred."""
    return [100 * v for v in seeds_and_items(x)]


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _scores(folder):
    return [_read_json(iterate / "scores.json") for iterate in runs.iterates(folder)]


def _games(settings):
    if "steps" in settings:
        return settings["steps"] * settings["queries"] * settings["answers"]
    return settings["iterations"] * settings["pairs"] * (settings["game"] == "spin")


# --------------------------------------------------------------------------------------------------
# The claims. Each function returns (claim, verdict, figures). The figures that decide each verdict
# were fixed before the runs. Claim 8 is an open question: its verdict is empty.

def claim_1(r):
    """LSP: a model gets better by playing against itself, without data."""
    return ("1. Self-play without data improves the start", verdict(r.gain("LSP")),
            f"LSP {points(r.gain('LSP'))} sampled, {points(r.gain('LSP', 'greedy'))} greedy; "
            f"LSP-Zero {points(r.gain('LSP-Zero'))} sampled")


def claim_2(r):
    """LSP: it comes close to GRPO, which needs a set of instructions to learn from."""
    gain = r.gain("LSP", over=GRPO)
    return ("2. LSP comes within a point of GRPO on data", verdict(gain, 1.0),
            f"LSP minus GRPO: {points(gain)}; GRPO itself {points(r.gain(GRPO))}")


def claim_3(r):
    """LSP: without the quality reward, the Challenger ends up writing nonsense."""
    rise, valid = r.gain(EAGER_ZERO), r.change(LONG_ZERO, "valid")
    return (f"3. LSP-Zero improves, then its queries degenerate (alpha_Ch {EAGER})",
            all_of(verdict(rise), verdict(negated(valid))),
            f"it improves by {points(rise)}; in a run three times as long, "
            f"well-formed queries {share(valid)} from the first tenth to the last, "
            f"groups with spread {share(r.change(LONG_ZERO, 'spread'))}, "
            f"at the end {points(r.gain(LONG_ZERO))}")


def claim_4a(r):
    """LSP: with the quality reward, the queries stay well formed."""
    valid = r.change(LONG_LSP, "valid", LONG_ZERO)
    return ("4a. The quality self-reward prevents this in LSP, over a run three times as long",
            verdict(valid),
            f"at its end, LSP minus LSP-Zero: well-formed {share(valid)}, "
            f"spread {share(r.change(LONG_LSP, 'spread', LONG_ZERO))}; LSP's own well-formed "
            f"queries {share(r.change(LONG_LSP, 'valid'))} from the first tenth to the last")


def claim_4b(r):
    """LSP: with the quality reward, the model ends with more right answers."""
    gain = r.gain(LONG_LSP, over=LONG_ZERO)
    return ("4b. At the end of that run, LSP has more right answers than LSP-Zero", verdict(gain),
            f"LSP minus LSP-Zero: {points(gain)}; LSP ends at {points(r.gain(LONG_LSP))}")


def claim_5(r):
    """LSP: it improves a model that GRPO has already trained on data."""
    gain, other = r.gain(GRPO_FIRST, over=GRPO), r.gain(LSP_FIRST, over="LSP")
    return ("5. Self-play after GRPO improves on GRPO alone", verdict(gain),
            f"{points(gain)}; the other way round, GRPO after LSP {points(other)}")


def claim_6a(r):
    """SPIN: each iteration adds less. The verdict compares the first with the last."""
    number = len(r.scores["SPIN"][0])
    gains = [r.gain("SPIN", iterate=0)]
    gains += [r.gain("SPIN", iterate=i, over="SPIN", over_iterate=i - 1) for i in range(1, number)]
    first = r.items("SPIN", "sampled", 0) - r.items(None, "sampled")
    last = r.items("SPIN", "sampled", -1) - r.items("SPIN", "sampled", -2)
    shrink = in_percent(first - last)
    return ("6a. SPIN improves, and its gains shrink",
            all_of(verdict(r.gain("SPIN")), verdict(shrink)),
            "gain of each iteration " + ", ".join(map(points, gains))
            + f"; the first minus the last: {points(shrink)}")


def claim_6b(r):
    """SPIN: it improves where further fine-tuning on the same answers does not."""
    gain = r.gain("SPIN", over=FINE_TUNING)
    return ("6b. SPIN gets further than more fine-tuning on the same answers", verdict(gain),
            f"SPIN minus fine-tuning: {points(gain)}; "
            f"fine-tuning itself {points(r.gain(FINE_TUNING))}")


def claim_7(r):
    """SPIN: it takes several iterations, each against a new opponent."""
    gain = r.gain("SPIN", over=ONE_LONG)
    return ("7. Training longer inside iteration 0 does not replace iterations", verdict(gain),
            f"SPIN minus one long iteration: {points(gain)}")


def claim_8(r):
    """Not in the papers: does the Challenger's pay change how diverse its queries are?"""
    return ("8. How diverse do the queries stay under each pay? (share of distinct queries in a "
            "step, and of pieces that two queries have in common, in the last tenth)", "",
            f"distinct: {by_pay(r, 'distinct')}; in common: {by_pay(r, 'similarity')}")


def claim_9(r):
    """Not in the papers: LSP pays most for the hardest queries, R-Zero for half-right ones."""
    gain, spice = r.gain("LSP paid r-zero", over="LSP"), r.gain("LSP paid spice", over="LSP")
    return ("9. Paying for queries at the frontier (r-zero) beats paying for the hardest (minimax)",
            verdict(gain),
            f"r-zero minus minimax: {points(gain)}; spice minus minimax: {points(spice)}; "
            f"groups with spread at the end: {by_pay(r, 'spread')}")


def claim_10(r):
    """Not in the papers: does it help with instructions longer than any in training?"""
    lsp, grpo, spin = (r.gain(method, "longer") for method in ("LSP", GRPO, "SPIN"))
    return ("10. Self-play also improves chains one operation longer than any in training",
            verdict(lsp), f"LSP {points(lsp)}, GRPO {points(grpo)}, SPIN {points(spin)}, "
            f"from {100 * r.items(None, 'longer').mean():.1f} %")


CLAIMS = (claim_1, claim_2, claim_3, claim_4a, claim_4b, claim_5, claim_6a, claim_6b, claim_7,
          claim_8, claim_9, claim_10)


def claims(r):
    """The verdict on every claim: [(claim, verdict, figures)] of a Results."""
    return [claim(r) for claim in CLAIMS]


def by_pay(r, key):
    """The end of a curve for each pay of the Challenger, as text. LSP's own pay is minimax."""
    prefix = "LSP paid "
    pays = {"LSP": "minimax"}
    pays |= {m: m.removeprefix(prefix) for m in r.scores if m.startswith(prefix)}
    return ", ".join(f"{pay} {r.end(m, key):.2f}" for m, pay in pays.items())


def points(interval):
    """[mean, low, high] in points of a hundred, as text."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval)


def share(interval):
    """[mean, low, high] of a share between 0 and 1, as text."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval)


def negated(interval):
    """[mean, low, high] of the same figure with its sign changed."""
    mean, low, high = interval
    return [-mean, -high, -low]


# --------------------------------------------------------------------------------------------------
# The table and the picture

def table(r):
    """A Markdown table: right answers of every method and iteration, win rate, and cost."""
    heads = ["method", "sampled, %", "gain", "greedy, %", "gain", "pass@8, %", *language.KINDS,
             "win rate, %", "games", "tokens", "minutes"]
    rows = [row(r, None, -1, "start")]
    for method, seeds in r.scores.items():
        number = len(seeds[0])
        for i in range(number):
            name = method + (f", iteration {i}" if number > 1 else "")
            rows.append(row(r, method, i, name, last=i == number - 1))
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def row(r, method, iterate, name, last=False):
    """The table's cells for one model. Its cost is shown if it is the last of its run."""
    sampled, greedy, best = (r.items(method, k, iterate) for k in ("sampled", "greedy", "pass@8"))
    gains, wins, cost = ["", ""], "50.0", ["", "", ""]
    if method is not None:
        gains = [points(r.gain(method, k, iterate=iterate)) for k in ("sampled", "greedy")]
        # Answers right with shares p and q win with 1/2 + (p - q)/2, if a tie counts as half.
        wins = level(0.5 + 0.5 * (sampled - r.items(None, "sampled")))
    if last:
        games, tokens, minutes = r.cost(method)
        cost = [f"{games:,.0f}", f"{tokens:,.0f}", f"{minutes:,.1f}"]
    return [name, level(sampled), gains[0], level(greedy), gains[1], f"{100 * best.mean():.1f}",
            *by_kind(r, sampled), wins, *cost]


def by_kind(r, x):
    """The mean of x [seeds, items] for each kind of instruction, in percent, as text."""
    kinds = r.start[0]["kinds"]
    masks = [torch.tensor([k == kind for k in kinds]) for kind in language.KINDS]
    return [f"{100 * x[:, mask].mean():.1f}" for mask in masks]


def level(x):
    """Mean and interval of x [seeds, items] in percent, as text."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*in_percent(x))


def picture(r, path):
    """Draw three panels: gains of all methods, SPIN by iteration, spread over the steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained",
                                width_ratios=[1.5, 1, 1.2])
    for draw, axis in zip((gains_panel, spin_panel, spread_panel), axes):
        draw(r, axis)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gains_panel(r, axis):
    """The gain of every method over the start, sampled and greedy, with intervals."""
    names = list(reversed(r.scores))
    for key, shift, color in (("sampled", 0.17, "C0"), ("greedy", -0.17, "C1")):
        mean, errors = bars([r.gain(m, key) for m in names])
        axis.barh([i + shift for i in range(len(names))], mean, 0.32, xerr=errors, color=color,
                  label=key, ecolor="0.4")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title("gain in right answers, points", fontsize=10)
    axis.legend(fontsize=8)


def spin_panel(r, axis):
    """The gain of SPIN and of fine-tuning after each iteration, and of one long iteration."""
    for i, method in enumerate(("SPIN", FINE_TUNING)):
        number = len(r.scores[method][0])
        mean, errors = bars([[0.0, 0.0, 0.0]] + [r.gain(method, iterate=t) for t in range(number)])
        places = [t + 0.05 * i for t in range(number + 1)]  # shifted, so that the bars stand apart
        axis.errorbar(places, mean, errors, marker="o", capsize=3, label=method)
    mean, errors = bars([r.gain(ONE_LONG)])
    axis.errorbar([number + 0.1], mean, errors, marker="s", capsize=3, label="one long iteration")
    ticks = ["start", *(f"iteration {t}" for t in range(number))]
    axis.set_xticks(range(number + 1), ticks, fontsize=7)
    axis.set_title("SPIN, gain sampled, points", fontsize=10)
    axis.legend(fontsize=8)


def spread_panel(r, axis):
    """The share of groups with spread by step, a smoothed mean over the seeds."""
    for method, metrics in r.metrics.items():
        if "spread" in metrics[0] and "then" not in method:
            curve = [sum(column) / len(column) for column in zip(*(m["spread"] for m in metrics))]
            axis.plot(report.smooth(curve, 15), label=method)
    axis.set_title("groups with spread, by step", fontsize=10)
    axis.legend(fontsize=7)


def bars(intervals):
    """Intervals [mean, low, high] as matplotlib draws them: means, and [below, above] the mean."""
    x = torch.tensor(intervals).numpy()
    return x[:, 0], [x[:, 0] - x[:, 1], x[:, 2] - x[:, 0]]


# --------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    """The command's settings. --quick changes the defaults of the others."""
    parser = argparse.ArgumentParser(
        description="Play all games of both papers on the embedded default, and judge the claims.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    whole = console.positive(int)
    parser.add_argument("--seeds", type=whole, default=3, help="runs of each method")
    parser.add_argument("--steps", type=whole, default=300,
                        help="steps of each run of LSP and GRPO; SPIN's pairs in an iteration are "
                             "in proportion, 5000 for 300")
    parser.add_argument("--quick", action="store_true",
                        help="one seed, 40 steps and --out claims-quick, unless given: everything "
                             "in a few minutes, but too little to judge any claim by")
    parser.add_argument("--out", default="claims",
                        help="folder for all runs; finished ones are kept, and the same command "
                             "continues")
    parser.add_argument("--jobs", type=whole, default=os.cpu_count(),
                        help="runs at once, one thread each")
    if parser.parse_args(argv).quick:
        parser.set_defaults(seeds=1, steps=40, out="claims-quick")
    return parser.parse_args(argv)


def open_folder(name, commands):
    """Make the folder of all runs, or open it if its runs have the same settings. Returns its path.

    Raises UserError.
    """
    out = Path(name).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise console.UserError(
            f"--out {name}: cannot be made a folder ({error.strerror})") from None
    weights = hashlib.sha256((START / "model.safetensors").read_bytes()).hexdigest()[:16]
    settings = {"commands": {m: list(c) for m, c in commands.items()},
                "held_out": HELD_OUT, "items": ITEMS, "weights": weights}
    path = out / "settings.json"
    if path.is_file() and _read_json(path) != settings:
        raise console.UserError(
            f"{out} holds runs of other settings or another start: choose another --out")
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return out


def score_start(out, seeds):
    """Score the start once for each seed, as sampled answers vary with the seed."""
    for s in seeds:
        path = out / f"start-s{s}.json"
        if not path.is_file():
            evaluate.main(score_words(START, 1000 + s, path))


def write_up(r, out):
    """Write claims.md and claims.png, and print the text."""
    picture(r, out / "claims.png")
    lines = [f"- **{claim}: {said}.** {figures}." if said else f"- **{claim}** {figures}."
             for claim, said, figures in claims(r)]
    text = "\n".join([table(r), "", *lines, ""])
    (out / "claims.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nthe same in {out / 'claims.md'}, as a picture in {out / 'claims.png'}")


def main(argv=None):
    """Play what is missing, then write the table, the verdicts and the picture."""
    args = parse_args(argv)
    seeds, commands = range(args.seeds), method_commands(args.steps)
    out = open_folder(args.out, commands)
    score_start(out, seeds)
    play_all(out, commands, seeds, args.jobs)
    write_up(Results(out, commands, seeds), out)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
