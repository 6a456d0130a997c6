"""The scoreboard: how often a model is right, how often it beats another, and what a run looked like.

    python evaluate.py tiny                              accuracy by kind: greedy, at temperature 1, pass@8
    python evaluate.py runs/lsp-1 --against tiny         the same for both, and the win rate
    python evaluate.py runs/lsp-1 runs/grpo-1 --picture curves.png
    python evaluate.py MODEL --against BASE --instructions alpaca_eval.json --reward REWARD_MODEL
    python evaluate.py report runs/lsp-1                 a run as a page for the browser: curves, games, answers
    python evaluate.py reproduce                         every game of both papers, and what they say of the claims

MODEL is a folder in Hugging Face layout, a hub name, or the folder of a run (then its model, and its curves are drawn).
Held-out instructions of the embedded language; 95 % intervals.
"""
import argparse
import hashlib
import html
import itertools
import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from model import (DTYPES, Crew, UserError, check_device, generate, groups, is_hub_name, load, load_state, number, previous, read_json, read_state,
                   run_command, save_state)
from rewards import ExactReward, PairJudge, judged, load_referee
from tiny import language

SAMPLES = 8  # answers at temperature 1 for each instruction: their mean is the sampled accuracy, their best is pass@8


def wilson(p, n):
    """95 % Wilson score interval (low, high) of a share p of n items."""
    z = 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def answer(model, tokenizer, queries, samples=1, temperature=1.0, seed=0, max_new_tokens=32):
    """`samples` answers to each query: list of N lists of text."""
    generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    rows = []
    for part in groups(prompts, max(1, 16384 // (samples * max_new_tokens))):  # bounds the memory of the cache
        rows += generate(model, part, samples, max_new_tokens, temperature, generator).ids
    return groups([tokenizer.decode(ids) for ids in rows], samples)


def rate(model, tokenizer, queries, seed=0, referee=ExactReward()):
    """{"sampled": R [n, SAMPLES], "greedy": R [n, 1]}: right or wrong, for every query and answer."""
    sampled = answer(model, tokenizer, queries, SAMPLES, 1.0, seed)
    greedy = answer(model, tokenizer, queries, 1, 0)
    return {"sampled": judged(referee, queries, sampled), "greedy": judged(referee, queries, greedy)}


def summary(rates, queries):
    """{kind or "all": {"n", "greedy", "sampled", "pass@8"}}, each figure [share, low, high].

    The intervals are Wilson's over instructions. For the sampled share, a mean over SAMPLES answers to each, that is wider
    than need be, never narrower.
    """
    kinds, out = [language.kind(q) for q in queries], {}
    for name in [*language.KINDS, "all"]:
        pick = torch.tensor([name in ("all", k) for k in kinds])
        n = int(pick.sum())
        if n:
            shares = {"greedy": rates["greedy"][pick].mean(), "sampled": rates["sampled"][pick].mean(), "pass@8": rates["sampled"][pick].amax(1).mean()}
            out[name] = {"n": n} | {k: [v.item(), *wilson(v.item(), n)] for k, v in shares.items()}
    return out


def win_rate(ours, theirs):
    """[win rate, low, high] of R [n, a] against R [n, b]: over all pairs of answers to a query, a tie counting half.

    The interval is normal over the n queries.
    """
    pairs = (ours[:, :, None] > theirs[:, None, :]).float() + 0.5 * (ours[:, :, None] == theirs[:, None, :]).float()
    item = pairs.mean((1, 2))  # [n]
    half = 1.959964 * item.std().item() / math.sqrt(len(item)) if len(item) > 1 else 0.5
    return [item.mean().item(), item.mean().item() - half, item.mean().item() + half]


def short(rates):
    """A player's rates as half a sentence."""
    return f"{100 * rates['sampled'].mean():.1f} % at temperature 1, {100 * rates['greedy'].mean():.1f} % greedy"


def table(summaries):
    """A text table of several models' summaries, {name: summary}: a line for each kind and model, in percent."""
    cell = lambda share: "{:5.1f} [{:4.1f}, {:4.1f}]".format(*(100 * x for x in share))
    columns, first = ("sampled", "greedy", "pass@8"), next(iter(summaries.values()))
    width = max(map(len, summaries))
    lines = [f"{'right answers, %':<22}{'':<{width}}" + "".join(f"{c:>21}" for c in columns)]
    for kind in first:
        for i, (name, rows) in enumerate(summaries.items()):
            label = "" if i else f"{kind} (n={rows[kind]['n']})"
            lines.append(f"{label:<22}{name:<{width}}" + "".join(f"{cell(rows[kind][c]):>21}" for c in columns))
    return "\n".join([*lines, f"sampled: {SAMPLES} answers at temperature 1; greedy: the likeliest one; pass@{SAMPLES}: one of the {SAMPLES} is right; with 95 % intervals"])


def win_line(win, against="the start"):
    """The win rate as one sentence."""
    return f"win rate against {against}, ties as half: {100 * win[0]:.1f} % [{100 * win[1]:.1f}, {100 * win[2]:.1f}]"


def scoreboard(rates, queries, path):
    """Print the table and the win rates of {name: rates}, all against the first, and write them to a JSON file.

    There: {"scores": {name: summary}, "win_rate": {name: [share, low, high]}}.
    """
    start, *others = rates
    scores = {name: summary(r, queries) for name, r in rates.items()}
    wins = {name: win_rate(rates[name]["sampled"], rates[start]["sampled"]) for name in others}
    path.write_text(json.dumps({"scores": scores, "win_rate": wins}, indent=2) + "\n")
    print("\n" + table(scores))
    for name, win in wins.items():
        print((f"{name}: " if len(wins) > 1 else "") + win_line(win))


# ---------------------------------------------------------------------------------------------------------------------
# Open instructions, as in both papers: AlpacaEval's format, and one answer against another's

def read_instructions(path):
    """[{"instruction", "dataset"}] of a JSON list in AlpacaEval's format. Raises UserError."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--instructions {path}: not readable as JSON ({type(error).__name__})") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"--instructions {path}: expected a list of objects with \"instruction\" and \"dataset\"")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
            raise UserError(f"--instructions {path}: entry {i} has no \"instruction\"")
        if not _is_text(row["instruction"]):
            raise UserError(f"--instructions {path}: entry {i}: half of a surrogate pair, which is no text")
    return [{"instruction": row["instruction"], "dataset": str(row.get("dataset", "all"))} for row in rows]


def _is_text(string):
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        string.encode()
        return True
    except UnicodeEncodeError:
        return False


def bootstrap(values, rounds=2000, seed=0):
    """95 % percentile interval (low, high) of the mean of values [n], by drawing the items again with replacement."""
    index = torch.randint(len(values), (rounds, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[index].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def duel_table(wins, sets):
    """Win rates of wins [n] (1, 1/2, 0) by set and overall, ties counted as half and as losses (as LSP's paper seems to)."""
    cell = lambda v: "{:5.1f} [{:4.1f}, {:4.1f}]".format(*(100 * x for x in (v.mean().item(), *bootstrap(v))))
    lines = [f"{'win rate, %':<24}{'ties as half':>20}{'ties as losses':>22}{'ties':>8}"]
    for name in [*dict.fromkeys(sets), "overall"]:
        v = wins[torch.tensor([name in ("overall", s) for s in sets])]
        lines.append(f"{f'{name} (n={len(v)})':<24}{cell(v):>20}{cell((v == 1).float()):>22}{100 * (v == 0.5).float().mean():7.1f}%")
    return "\n".join([*lines, "95 % intervals by bootstrap over the instructions"])


def duel(ours, theirs, instructions, referee=None, judge=None):
    """wins [n]: 1 where our answer is better, 1/2 for a tie, 0 else; by a referee's two rewards or by a PairJudge."""
    queries = [row["instruction"] for row in instructions]
    if judge:
        return judge(queries, ours, theirs)
    rewards = judged(referee, queries, [list(pair) for pair in zip(ours, theirs)])
    return (rewards[:, 0] > rewards[:, 1]).float() + 0.5 * (rewards[:, 0] == rewards[:, 1]).float()


# ---------------------------------------------------------------------------------------------------------------------
# Data and runs

def read_data(path):
    """Pairs of a JSONL file: [(messages, text)]. Raises UserError with the number of the first bad line.

    A line holds "prompt" (or "question") and "answer", or a chat's "messages", of which the first turn is used (as SPIN's
    paper does), with the system message before it, if there is one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028, inside a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: not readable as text ({error})") from None
    pairs = []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--data {path}, line {i}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not JSON; one object a line is expected") from None
        prompt = next((k for k in ("prompt", "question") if isinstance(row, dict) and k in row), "messages")
        if not isinstance(row, dict) or not ("messages" in row or {prompt, "answer"} <= row.keys()):
            raise UserError(f'{where}: expected an object with "prompt" and "answer", or with "messages"')
        messages = row.get("messages", [{"role": "user", "content": row.get(prompt)}, {"role": "assistant", "content": row.get("answer")}])
        if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            raise UserError(f"{where}: every message needs a text")
        if not all(_is_text(m["content"]) for m in messages):
            raise UserError(f"{where}: half of a surrogate pair, which is no text")
        roles = [m.get("role") for m in messages]
        turn = 3 if roles[:1] == ["system"] else 2
        if roles[:turn] != ["system", "user", "assistant"][-turn:]:
            raise UserError(f"{where}: the first turn must be a user's message and the assistant's answer")
        if not messages[turn - 2]["content"].strip() or not messages[turn - 1]["content"].strip():
            raise UserError(f"{where}: an empty prompt or answer")
        pairs.append(([{"role": m["role"], "content": m["content"]} for m in messages[:turn - 1]], messages[turn - 1]["content"]))
    if len(pairs) < 2:
        raise UserError(f"--data {path}: {len(pairs)} line{'s' * (len(pairs) != 1)} of data; at least 2 are needed, each an object on its own line")
    return pairs


CHECKPOINT = "checkpoint.safetensors"  # in a run's folder, until the run is at its end
MAY_CHANGE = ("torch", "reward_timeout", "save_every")  # settings that a resumed run may have others of


def resumed(parser, argv, games):
    """The settings of the run that --resume names (its folder, or a checkpoint in it), as `parser` would give them.

    games: whose command this is, by its names of games. A setting that the run's version did not know has its default.
    Exits with 2 if there are other flags; raises UserError for a run that cannot be resumed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    run = parser.parse_args(argv).resume
    if argv not in (["--resume", run], [f"--resume={run}"]):
        parser.error("--resume goes on by the run's own settings: leave all other flags out")
    folder = Path(run).parent if Path(run).is_file() else Path(run)
    if not (folder / "settings.json").is_file():
        raise UserError(f"--resume {run}: no run's folder (it has no settings.json)")
    settings = read_json(folder / "settings.json")
    if settings.get("game") not in games:
        raise UserError(f"--resume {run}: this was a game of {settings.get('game')}: resume it with {'spin.py' if settings.get('game') in ('spin', 'sft') else 'selfplay.py'}")
    if not any((folder / name).is_file() for name in (CHECKPOINT, CHECKPOINT + ".previous")):
        raise UserError(f"--resume {run}: there is no checkpoint: it is at its end, or was stopped before its first one")
    settings.pop("torch", None)
    return argparse.Namespace(**vars(parser.parse_args([])) | settings | {"resume": run})


class Run:
    """A run that is being played: its folder, what it has written so far, and the checkpoint that it goes on from.

    folder: Path. facts: where it stands, as the last checkpoint says. tensors: that checkpoint's; None in a new run, and once restored. metrics, games:
    the two .jsonl files, open for writing. Of several processes the first alone writes; the others' files lead nowhere.
    """

    def __init__(self, folder, facts, tensors, save_every, crew):
        self.folder, self.facts, self.tensors, self.save_every, self.crew, self.saved = folder, facts, tensors, save_every, crew, time.perf_counter()
        self.metrics, self.games = (log(folder / f"{name}.jsonl", facts[name]) if not crew.rank else open(os.devnull, "w") for name in ("metrics", "games"))

    def restore(self, model, optimizer, generator, rng):
        """Put the checkpoint back into all four, and let go of it. Returns its tensors: a game may have kept others there."""
        tensors, self.tensors = self.tensors, None
        load_state(model, optimizer, generator, tensors, self.crew)
        version, state, gauss = self.facts["rng"]
        rng.setstate((version, tuple(state), gauss))
        return tensors

    def due(self, done):
        """Is a checkpoint due after so many steps: one of --save-every, or ten minutes after the last? All processes say the same."""
        return done % self.save_every == 0 or any(self.crew.all(time.perf_counter() - self.saved > 600))

    def checkpoint(self, optimizer, generator, facts, **tensors):
        """Write down where the run stands: the optimizer's weights and state, the generator's state, facts (JSON) and other tensors."""
        self.facts |= facts | {"metrics": self.metrics.tell(), "games": self.games.tell()}
        save_state(self.folder / CHECKPOINT, optimizer, generator, self.facts, self.crew, **tensors)
        self.saved = time.perf_counter()

    def end(self):
        """The run is at its end: nothing is left to go on with."""
        for path in (self.folder / CHECKPOINT, previous(self.folder / CHECKPOINT)):
            path.unlink(missing_ok=True)


@contextmanager
def open_run(args, start, crew=Crew(), **facts):
    """The Run of these settings, locked against other processes inside the `with`: a new one, or the one that args.resume names.

    start: fingerprint of what it begins with, model and data. facts: where a new run stands. Raises UserError.
    """
    with ExitStack() as files:
        folder = tensors = None
        if not crew.rank and hasattr(args, "resume"):
            folder, held, facts, tensors = reopen(args.resume)
            files.push(held)
        elif not crew.rank:
            folder = new_run(getattr(args, "run", None), args.game, vars(args))
            files.push(lock(folder))
            facts |= {"settings": vars(args), "start": start, "metrics": 0, "games": 0}
        folder, facts = crew.all((folder, facts))[0]  # the first one's
        if facts["start"] != start:
            data = getattr(args, "data", None)
            raise UserError(f"{args.model}{f' or {data}' if data else ''} is not what this run began with")
        if hasattr(args, "resume") and crew.rank:
            tensors = read_state(folder / CHECKPOINT)[1]
        run = Run(folder, facts, tensors, args.save_every, crew)
        del tensors  # `restore` lets go of the last of them
        files.push(run.metrics)
        files.push(run.games)
        yield run


def reopen(run):
    """(folder, its lock, facts, tensors) of the run that --resume names. A checkpoint named itself becomes the run's, in place of a damaged one.

    Raises UserError for a run that is being played, or a checkpoint of other settings than the folder's.
    """
    run = Path(run)
    folder = run.parent if run.is_file() else run
    held = lock(folder)
    path = run if run.is_file() else folder / CHECKPOINT
    if not path.is_file() and previous(folder / CHECKPOINT).is_file():  # killed between two renames: the one before is the last
        path = previous(folder / CHECKPOINT)
    facts, tensors = read_state(path)
    fixed = lambda settings: {k: v for k, v in settings.items() if k not in MAY_CHANGE}
    if fixed(facts.get("settings", {})) != fixed(read_json(folder / "settings.json")):
        raise UserError(f"{path}: of a run with other settings than {folder / 'settings.json'} says")
    if path.name != CHECKPOINT:
        path.replace(folder / CHECKPOINT)
    return folder, held, facts, tensors


def check_name(name):
    """Raise UserError if this cannot name a new run: asked before anything is loaded."""
    folder = Path("runs") / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"--run {name!r} is not a plain folder name")
    if os.path.lexists(folder):  # a link that leads nowhere, too
        go_on = f", or --resume {folder} to go on with it" if (folder / CHECKPOINT).is_file() else ""
        raise UserError(f"{folder} exists already: choose another --run{go_on}; nothing was touched")


def new_run(name, game, settings):
    """Make runs/<name> and write settings.json; without a name, runs/<game>-<next free number>. Never an existing folder. name: see check_name."""
    number = 1
    while True:
        folder = Path("runs") / (name or f"{game}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if name:  # made since then, by another process
                check_name(name)
            number += 1
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror}") from None
    for other in sorted(Path("runs").glob(f"{game}-*")):
        if (other / CHECKPOINT).is_file():
            try:
                same = read_json(other / "settings.json") == settings | {"torch": torch.__version__}
                lock(other).close()
            except UserError:
                continue  # not readable, or being played
            if same:
                print(f"{other} was stopped with these very settings: --resume {other} would go on with it; this is a new run")
    (folder / "settings.json").write_text(json.dumps(settings | {"torch": torch.__version__}, indent=2) + "\n")
    return folder


def lock(folder):
    """Make this the only process on a run's folder, for as long as the returned file stays open. Raises UserError."""
    import fcntl
    file = open(folder / "settings.json")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder}: another process is playing this run") from None
    return file


def log(path, size):
    """A run's .jsonl file, open for appending: what is beyond `size` bytes, from after a checkpoint, is cut off first."""
    path.touch()
    os.truncate(path, min(size, path.stat().st_size))
    return open(path, "a", 1)


@contextmanager
def stop_asked():
    """A list that is no longer empty once Ctrl-C (or SIGTERM) asked to stop: then finish the step, save, and stop. A second Ctrl-C stops at once."""
    asked = []

    def ask(signum, _):
        if signum == signal.SIGINT and signum in asked:
            raise KeyboardInterrupt
        asked.append(signum)
        print("\nstopping after this step (Ctrl-C again: at once, the last checkpoint stays)", file=sys.stderr)
    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def show_run(folder):
    """Draw a finished run's curves, and say where to look."""
    if draw([folder], folder / "curves.png"):
        games = f"every game: {folder / 'games.jsonl'}; " if (folder / "games.jsonl").stat().st_size else ""  # plain fine-tuning has none
        print(f"look at it: {folder / 'curves.png'}; {games}as a page: python evaluate.py report {folder}")


def read_metrics(run):
    """A run's metrics.jsonl as {name: [value a step]}, with "step" among the names.

    Where a step lacks a figure that others have, its neighbour's stands. A last line that was cut off is left out; any
    other line that is no JSON object raises UserError.
    """
    path, rows = Path(run) / "metrics.jsonl", []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    for i, line in enumerate(lines, 1):
        try:
            rows.append({k: float(v) for k, v in json.loads(line).items()})
        except (ValueError, TypeError, AttributeError, RecursionError):
            if i < len(lines) or line.endswith("\n"):
                raise UserError(f"{path}: line {i} is not a step's figures") from None
    columns = {}
    for key in dict.fromkeys(k for row in rows for k in row):
        value = next(row[key] for row in rows if key in row)
        columns[key] = [value := row.get(key, value) for row in rows]
    return columns


PANELS = {  # of a run's picture: name in metrics.jsonl -> what it is
    "reward": "mean of the step", "quality": "mean of the step", "valid": "queries with a right answer", "spread": "groups whose rewards differ",
    "distinct": "share of different queries", "kl_solver": "nats a token", "kl_challenger": "nats a token",
    "loss": "mean over the pairs", "margin": "of pairs that differ", "logprob_answer": "of people's answers", "logprob_rival": "of the opponent's answers",
    "answer_tokens": "length of an answer", "query_tokens": "length of a query", "entropy_solver": "nats a token",
    "entropy_challenger": "nats a token", "similarity": "pieces that two queries share", "agreement": "judge prefers the right answer"}

SHARES = ("valid", "spread", "distinct", "agreement")  # these are drawn from 0 to 1
COLOURS = ("#3b82f6", "#f97316", "#22a06b", "#d946a0", "#8b6f47", "#7c6cf0")  # of the runs; readable on white and on black


def smooth(curve, parts):
    """Each value's mean with those before it, over a `parts`-th of the curve."""
    window = max(1, len(curve) // parts)
    return [sum(curve[max(0, j - window + 1):j + 1]) / min(window, j + 1) for j in range(len(curve))]


def plot(axis, key, data):
    """One figure of several runs on a matplotlib axis: its values pale, their mean over a twentieth of the run on top. data: {run: its read_metrics}."""
    for colour, (name, d) in zip(itertools.cycle(COLOURS), data.items()):
        if key in d:
            axis.plot(*thin(d["step"], d[key]), color=colour, alpha=0.35, linewidth=0.7)
            axis.plot(*thin(d["step"], smooth(d[key], 20)), color=colour, label=name)
    axis.set_title(f"{key}\n{PANELS[key]}", fontsize=9)
    axis.grid(alpha=0.25)
    if key in SHARES:
        axis.set_ylim(-0.03, 1.03)


def thin(x, y, most=400):
    """At most so many points of a curve, evenly taken."""
    k = math.ceil(len(x) / most)
    return x[::k], y[::k]


def draw(runs, path):
    """Draw the curves of one or several runs into one PNG; False if there are none.

    The last panel shows right answers at temperature 1 (greedy dotted), from the start to the end, by iterate.
    """
    import matplotlib  # only who draws needs it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    data = {str(r): read_metrics(r) for r in runs}
    scores = {str(r): json.loads(file.read_text())["scores"] for r in runs if (file := Path(r) / "evaluation.json").is_file()}
    panels = [k for k in PANELS if any(k in d for d in data.values())]
    if not panels:
        return False
    count = len(panels) + bool(scores)
    rows = 2 if count <= 10 else 3
    columns = math.ceil(count / rows)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.75 * rows), layout="constrained", squeeze=False)
    for axis, key in zip(axes.flat, panels):
        plot(axis, key, data)
        axis.set_xlabel("step", fontsize=8)
    for colour, name in zip(itertools.cycle(COLOURS), data):
        if name in scores:
            axis, shares = axes.flat[len(panels)], [100 * torch.tensor(s["all"]["sampled"]) for s in scores[name].values()]
            points = torch.stack(shares).T.numpy()  # [share, low, high] of each iterate, the start first
            axis.errorbar(range(len(shares)), points[0], [points[0] - points[1], points[2] - points[0]], color=colour, marker="o", capsize=3)
            axis.plot([100 * s["all"]["greedy"][0] for s in scores[name].values()], color=colour, linestyle=":", marker=".")
            axis.set_title("right answers, %\nsampled (line), greedy (dots)", fontsize=9)
            axis.grid(alpha=0.25)
            axis.set_xticks(range(max(map(len, scores.values()))), max(scores.values(), key=len), fontsize=7, rotation=20)
    for axis in axes.flat[count:]:
        axis.axis("off")
    figure.legend(*_legend(axes), fontsize=8, loc="outside lower center", ncols=4, title="pale: each step; full: the mean over a twentieth of the run", title_fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _legend(axes):
    """Each run's line and name once, from whichever panels show it."""
    lines = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    return list(lines.values()), list(lines)


def model_folder(name):
    """Where a run folder's model is: model/, or the last whole iterate of SPIN. Anything else is a model's own name."""
    if not (Path(name) / "metrics.jsonl").is_file():
        return name
    if not iterates(Path(name)):
        raise UserError(f"{name}: this run has no finished model")
    return iterates(Path(name))[-1]


def iterates(folder):
    """The models of a run in order: SPIN's whole iterates, or the one model of another game."""
    if (folder / "model" / "model.safetensors").is_file():
        return [folder / "model"]
    whole = [p for p in folder.glob("iteration-*") if p.name.removeprefix("iteration-").isdigit() and (p / "model.safetensors").is_file()]
    return sorted(whole, key=lambda p: int(p.name.removeprefix("iteration-")))


def is_real(name):
    """Is a model there that does not speak the embedded language? The games then have the papers' prompts and settings.

    Raises UserError for a folder that is no model's.
    """
    if is_hub_name(name):
        return True
    folder = Path(model_folder(name))
    if folder.is_dir():
        read_json(folder / "config.json")
    return folder.is_dir() and not language.spoken_by(folder)


# ---------------------------------------------------------------------------------------------------------------------
# A run as something to look at: `python evaluate.py report RUN...`

INK = "#123456"  # stands in matplotlib's SVG for whatever colour the page's text has, light or dark
GAMES_SIZE = 8_000_000  # characters of games in a report; with more, only every k-th step's stand in it

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: light-dark(#ddd, #3a3a3a); --soft: light-dark(#f6f6f4, #1e1e1e); --good: light-dark(#157347, #5fd39a); --bad: light-dark(#b02a37, #ff8a8a); }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; background: light-dark(#fff, #141414); color: light-dark(#1b1b1b, #e4e4e4); }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .6rem; }}
.panels svg {{ width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .9rem; }} th, td {{ padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; }}
tr + tr > * {{ border-top: 1px solid var(--line); }} #shown {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: .6rem; max-height: 42rem; overflow-y: auto; }}
.game {{ background: var(--soft); border-radius: .5rem; padding: .6rem .8rem; overflow-wrap: anywhere; }}
.right {{ color: var(--good); }} .wrong {{ color: var(--bad); }} .quiet {{ opacity: .7; font-size: .88rem; }} .line {{ white-space: nowrap; }} code {{ overflow-wrap: anywhere; }}
input[type=range] {{ width: min(36rem, 100%); }} dot {{ display: inline-block; width: .8em; height: .8em; border-radius: 50%; }}
</style></head><body>
<h1>{title}</h1>
{body}
<script type="application/json" id="games">{games}</script>
<script>
const games = JSON.parse(document.getElementById("games").textContent), run = document.getElementById("run"), at = document.getElementById("at");
const element = (tag, text, kind) => {{ const e = document.createElement(tag); e.textContent = text; if (kind) e.className = kind; return e; }};
function show() {{  // textContent alone: nothing that a model wrote can become part of the page
  const steps = games[run.value], line = steps[at.value], box = document.getElementById("shown");
  document.getElementById("step").textContent = "step " + line.step;
  box.replaceChildren(...line.games.map(game => {{
    const card = element("div", "", "game");
    card.append(element("strong", game.query ?? game.prompt));
    if (game.valid === false) card.append(element("span", "  no such task: it has no right answer", "quiet"));
    if (game.answers) {{
      for (const a of [...game.answers].sort((x, y) => y.reward - x.reward || y.times - x.times))
        card.append(element("div", (a.answer || "(nothing)") + (a.times > 1 ? "  x" + a.times : "") + "   reward " + a.reward + (a.quality === null ? "" : ", quality " + a.quality), a.reward > 0 ? "right" : "wrong"));
      if (game.challenger_advantage !== null) card.append(element("div", "the Challenger's advantage " + game.challenger_advantage, "quiet"));
    }} else card.append(element("div", "people: " + game.answer, "right"), element("div", "opponent: " + game.rival, game.rival === game.answer ? "right" : "wrong"));
    return card;
  }}));
}}
if (run) {{
  const choose = () => {{ at.max = games[run.value].length - 1; at.value = Math.min(at.value, at.max); show(); }};
  run.addEventListener("change", choose); at.addEventListener("input", show); choose();
}}
</script></body></html>
"""

HOW_TO_READ = """
<p>Pale: each step; full: the mean over a twentieth of the run. <b>reward</b> may fall while the model improves: the Challenger asks harder things.
<b>spread</b> is the share of queries whose answers have not all the same reward; the others teach the Solver by the judge's differences alone.
<b>valid</b> queries have a right answer at all; when fewer do, the Challenger has found that nonsense pays. <b>distinct</b> and <b>similarity</b> say whether it repeats itself. <b>kl</b> is the distance from the start.
<b>entropy</b> falls as a player grows sure; if it falls while greedy accuracy stands still, the model is being sharpened and learns nothing new.
<b>agreement</b>: one half is chance; when it falls, the judge and the truth part. In SPIN, <b>loss</b> begins each iteration at log 2, and both
<b>logprob</b> figures may fall: only the margin between them is trained.</p>"""


def panel(key, data):
    """One figure of several runs as SVG text. data: {run: its read_metrics}."""
    import io
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
                         "xtick.color": INK, "ytick.color": INK, "font.size": 9}):
        figure, axis = plt.subplots(figsize=(3.4, 2.3), layout="constrained")
        plot(axis, key, data)
        axis.spines[["top", "right"]].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = out.getvalue()
    return svg[svg.index("<svg"):].replace(INK, "currentColor")


def read_games(run):
    """(the games of a run: a list of a line's dicts, of every k-th line; k), at most 64 of a line, small enough for a page. Raises UserError."""
    path, lines, size = Path(run) / "games.jsonl", [], 0
    if not path.is_file():
        return [], 1
    with open(path, errors="replace") as file:
        for i, line in enumerate(file, 1):
            if line.endswith("\n"):  # else it was cut off
                try:
                    row = json.loads(line)
                    lines.append({"step": row["step"], "games": [dict(game) for game in row["games"][:64]]})
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UserError(f"{path}: line {i} is not a step's games") from None
                size += len(line) * len(lines[-1]["games"]) // max(1, len(row["games"]))
    k = math.ceil(size / GAMES_SIZE) or 1
    return lines[::k], k


def write_page(runs, path, asked=12):
    """One HTML file about one or several runs: scores, curves, games, the same instructions answered by every checkpoint, settings.

    runs: run folders. asked: how many instructions (0: none, then no model is loaded). Needs nothing but the file itself to be looked at.
    """
    text = lambda value: html.escape(str(value))
    settings = {run: read_json(Path(run) / "settings.json") for run in runs}
    data = {run: read_metrics(run) for run in runs}
    dot = {run: f'<span class="line"><dot style="background:{colour}"></dot> {text(Path(run).name)}</span>' for run, colour in zip(runs, itertools.cycle(COLOURS))}
    row = lambda cells, tag="td": "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    rows = lambda lines: f'<div class="wide"><table>{"".join(lines)}</table></div>'
    body = ["<p>" + " &nbsp; ".join(f"{dot[run]}: {text(s.get('game', ''))} on {text(Path(s['model']).name)}, seed {text(s.get('seed'))}, {len(data[run].get('step', []))} steps" for run, s in settings.items()) + "</p>"]
    said = {run: (Path(run) / "warnings.txt").read_text().splitlines() for run in runs if (Path(run) / "warnings.txt").is_file()}
    body.append("<h2>What the runs said</h2>" + "".join(f"<p>{dot[run]}: {text(line)}</p>" for run, lines in said.items() for line in lines) if said else "<p>No run gave a warning.</p>")
    scores = {run: read_json(file).get("scores", {}) for run in runs if (file := Path(run) / "evaluation.json").is_file()}
    if any(scores.values()):
        share = lambda v: '<span class="line">{:.1f} <span class="quiet">[{:.1f}, {:.1f}]</span></span>'.format(*(100 * x for x in v))
        lines = [row(["run", "", "kind", "n", "temperature 1, %", "greedy, %", "pass@8, %"], "th")]
        for run, names in scores.items():
            for name in (next(iter(names)), list(names)[-1]):
                lines += [row([dot[run], text(name), text(kind), text(s["n"]), share(s["sampled"]), share(s["greedy"]), share(s["pass@8"])]) for kind, s in names[name].items() if kind == "all" or len(runs) == 1]
        body.append("<h2>Right answers on held-out instructions</h2>" + rows(lines))
    panels = [key for key in PANELS if any(key in d for d in data.values())]
    body.append('<h2>Curves</h2><div class="panels">' + "".join(f"<div>{panel(key, data)}</div>" for key in panels) + "</div>" + f"<h2>How to read this</h2>{HOW_TO_READ}")
    games = {run: read_games(run) for run in runs}
    games = {run: (lines, k) for run, (lines, k) in games.items() if lines}
    if games:
        thinned, cut = max(k for _, k in games.values()), any(len(line["games"]) == 64 for lines, _ in games.values() for line in lines)
        options = "".join(f'<option value="{text(run)}">{text(Path(run).name)}</option>' for run in games)
        body.append(f'<h2>The games</h2><p><select id="run" aria-label="run">{options}</select> <input type="range" id="at" min="0" value="0" aria-label="step"> <span id="step"></span>'
                    + (f' <span class="quiet">(only every {thinned}th step is on this page; all are in games.jsonl)</span>' if thinned > 1 else "")
                    + (' <span class="quiet">(at most 64 of a step)</span>' if cut else "") + '</p><div id="shown"></div>')
    if asked:
        body.append(asked_alike(runs, settings, games, asked, dot, row, rows))
    keys = dict.fromkeys(k for s in settings.values() for k in s)
    lines = [row(["", *dot.values()], "th")]
    for key in keys:
        values = [text(s.get(key, "")) for s in settings.values()]
        lines.append(row([f"<code>{text(key)}</code>", *(f"<b>{v}</b>" if len(set(values)) > 1 else v for v in values)]))
    body.append("<h2>Settings</h2>" + rows(lines))
    data = json.dumps({run: lines for run, (lines, _) in games.items()}, ensure_ascii=False).replace("<", "\\u003c")  # no text of a game can end the script
    title = text(", ".join(Path(run).name for run in runs))
    Path(path).write_text(PAGE.format(title=title, body="\n".join(body), games=data))


def asked_alike(runs, settings, games, asked, dot, row, rows):
    """A table of the same instructions answered greedily by the start and every checkpoint of the runs, right ones coloured."""
    text, columns, queries = lambda value: html.escape(str(value)), [], None
    for run in runs:
        for name, folder in [("start", settings[run]["model"]), *((folder.name, folder) for folder in iterates(Path(run)))]:
            if name == "start" and (not Path(folder).is_dir() or any(folder == other for _, other, _ in columns)):
                continue  # a start that is not here from where we stand, or one that another run began from too
            model, tokenizer = load(folder)
            if queries is None:
                first = next(iter(games.values()))[0][0]["games"] if games else []
                queries = language.evaluation_set(asked) if language.spoken_by(tokenizer) else list(dict.fromkeys(g.get("query", g.get("prompt")) for g in first))[:asked]
                if not queries:
                    return ""
            columns.append((f"{dot[run]}<br>{text(name)}", folder, [group[0] for group in answer(model, tokenizer, queries, 1, 0, max_new_tokens=settings[run]["answer_tokens"])]))
    lines = [row(["", *(name for name, *_ in columns)], "th")]
    for i, query in enumerate(queries):
        right = language.solve(query)
        kind = lambda a: "" if right is None else "right" if a == right else "wrong"
        lines.append(row([text(query), *(f'<span class="{kind(answers[i])}">{text(answers[i] or "(nothing)")}</span>' for *_, answers in columns)]))
    return f"<h2>The same instructions, answered by every checkpoint</h2>{rows(lines)}"


def first_and_last(data):
    """A text table of runs side by side: each figure's mean over the first and the last tenth of the steps, or ten steps if that is more. data: {run: its read_metrics}."""
    data = {run: d for run, d in data.items() if d}
    if not data:
        return "no step was finished"
    ends = lambda curve: f"{_tenth(curve, False, 10):8.3f} -> {_tenth(curve, True, 10):8.3f}"
    table = [("first -> last", list(map(str, data)))]
    table += [(key, [ends(d[key]) if key in d else "" for d in data.values()]) for key in PANELS if any(key in d for d in data.values())]
    width = 2 + max(len(cell) for _, cells in table for cell in cells)
    return "\n".join(f"{key:<20}" + "".join(f"{cell:>{width}}" for cell in cells) for key, cells in table)


def report(argv):
    """`python evaluate.py report RUN...`: one HTML file that shows runs, for a browser, with nothing else needed; in the terminal, where each curve began and ended."""
    parser = argparse.ArgumentParser(prog="evaluate.py report", description=report.__doc__.split(": ")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="+", metavar="RUN", help="run folders; several are laid over each other")
    parser.add_argument("--out", default=argparse.SUPPRESS, metavar="HTML", help="where to write; default: report.html in a single run's folder, or here for several runs")
    parser.add_argument("--ask", type=number(int, zero=True), default=12, metavar="N", help="instructions that every checkpoint answers anew; 0 loads no model")
    args = parser.parse_args(argv)
    for run in args.run:
        if not (Path(run) / "metrics.jsonl").is_file() or not (Path(run) / "settings.json").is_file():
            raise UserError(f"{run}: no run's folder (it has no metrics.jsonl and settings.json)")
    path = Path(getattr(args, "out", Path(args.run[0]) / "report.html" if len(args.run) == 1 else "report.html"))
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UserError(f"--out {path}: expected a file's path in a folder that exists")
    write_page(args.run, path, args.ask)
    print("means of the first and of the last tenth of the steps (ten of them at the least):\n")
    print(first_and_last({run: read_metrics(run) for run in args.run}))
    print(f"\nopen it in a browser: {path} ({path.stat().st_size / 2**20:.1f} MiB)")


# ---------------------------------------------------------------------------------------------------------------------
# The claims of both papers: `python evaluate.py reproduce`

def method_commands(steps):
    """{method: (command line of its game, the method whose model it starts from or None)}, all with as many games a step."""
    lsp, zero, grpo = (f"selfplay.py --game {game} --steps {steps}" for game in ("lsp", "lsp-zero", "grpo"))
    long = f"--steps {3 * steps} --alpha-ch {EAGER}"
    pairs = 50 * steps // 3  # 300 steps: 5,000, as spin.py's default
    return {"GRPO on data": (grpo, None), "LSP-Zero": (zero, None), "LSP": (lsp, None),
            "GRPO, then LSP": (lsp, "GRPO on data"), "LSP, then GRPO": (grpo, "LSP"),
            **{f"LSP paid {pay}": (f"{lsp} --pay {pay}", None) for pay in ("r-zero", "absolute-zero", "sqlm", "spice")},
            "LSP-Zero, eager": (f"{zero} --alpha-ch {EAGER}", None),
            "LSP-Zero, eager, 3 x as long": (f"selfplay.py --game lsp-zero {long}", None), "LSP, eager, 3 x as long": (f"selfplay.py --game lsp {long}", None),
            "SPIN": (f"spin.py --pairs {pairs}", None), "more fine-tuning": (f"spin.py --game sft --pairs {pairs}", None),
            "SPIN, one long iteration": (f"spin.py --pairs {pairs} --iterations 1 --epochs 14", None)}


EAGER = 0.03  # alpha_Ch of the long runs: a Challenger that moves far enough for the two games to part
HELD_OUT, ITEMS = 1, 2000  # which drawing of held-out instructions the claims are judged by, and its size; settings were chosen on others
STUDENT = [math.nan, math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # t, 97.5 %, by number of seeds


def seeds_and_items(x):
    """[mean, low, high], 95 %, of x [seeds, items]: seeds and items each vary, so both widths count, added in squares.

    Between seeds Student's t; with one seed that part is unknown and left out. A single number has no interval at all.
    """
    S, n = x.shape
    if S == n == 1:
        return [x.item(), -math.inf, math.inf]
    seeds = STUDENT[min(S, 10)] * x.mean(1).std().item() / math.sqrt(S) if S > 1 else 0.0
    items = 1.959964 * x.mean(0).std().item() / math.sqrt(n) if n > 1 else 0.0
    mean, half = x.mean().item(), math.hypot(seeds, items)
    return [mean, mean - half, mean + half]


def finished(folder):
    """Was a run played to its end? A run that was stopped has a picture, too, but fewer steps or iterates."""
    if not (folder / "curves.png").is_file():  # the last thing that a run writes
        return False
    settings = json.loads((folder / "settings.json").read_text())
    if "steps" in settings:
        return len((folder / "metrics.jsonl").read_text().splitlines()) == settings["steps"]
    return len(iterates(folder)) == settings["iterations"]


def run_method(out, method, seed, start, commands, children):
    """One run of `reproduce` and the scores of its iterates, unless both are there already. Returns an error text or None.

    children: a set that holds the process while it runs, for Ctrl-C to end.
    """
    import subprocess
    command, after = commands[method]
    folder = out / "runs" / f"{slug(method)}-s{seed}"
    model = out / "runs" / f"{slug(after)}-s{seed}" / "model" if after else Path(start).resolve()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    here = Path(__file__).resolve().parent

    def call(*words):
        # In a session of its own: Ctrl-C must not make it save half a run as if it were whole.
        child = subprocess.Popen([sys.executable, *map(str, words)], cwd=out, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        children.add(child)
        errors = child.communicate()[1]
        children.discard(child)
        return (errors.strip().splitlines() or [f"exit {child.returncode}"])[-1] if child.returncode else None

    if not finished(folder):
        if folder.is_dir():  # a run that was cut off: kept, out of the way
            free = next(i for i in range(1, 1000) if not folder.with_name(f"{folder.name}-cut-{i}").exists())
            folder.rename(folder.with_name(f"{folder.name}-cut-{free}"))
        script, *words = command.split()
        if error := call(here / script, *words, "--model", model, "--seed", 10 + seed, "--run", folder.name, "--eval-items", 1, "--device", "cpu"):
            return f"{method}, seed {seed}: {error}"
    for iterate in iterates(folder):
        if not (iterate / "scores.json").is_file():
            if error := call(here / "evaluate.py", iterate, "--held-out", HELD_OUT, "--items", ITEMS, "--seed", 10 + seed, "--json", iterate / "scores.json", "--device", "cpu"):
                return f"{method}, seed {seed}: {error}"


def slug(method):
    """A method's name as a folder's."""
    return method.lower().replace(",", "").replace(" ", "-")


class Results:
    """What `reproduce` found: the scores of all methods, seeds and iterates, and the runs' curves."""

    def __init__(self, out, commands, seeds):
        read = lambda path: json.loads(path.read_text())
        folders = {m: [out / "runs" / f"{slug(m)}-s{s}" for s in seeds] for m in commands}
        self.start = [read(out / f"start-s{s}.json") for s in seeds]
        self.scores = {m: [[read(i / "scores.json") for i in iterates(f)] for f in fs] for m, fs in folders.items()}  # [seed][iterate]
        self.metrics = {m: [read_metrics(f) for f in fs] for m, fs in folders.items()}
        self.settings = {m: read(fs[0] / "settings.json") for m, fs in folders.items()}
        self.after = {m: after for m, (_, after) in commands.items()}

    def cost(self, method):
        """(games, tokens sampled, minutes on one thread) of a method's run, mean over seeds, with the run that it started from."""
        s, metrics = self.settings[method], self.metrics[method]
        games = s["steps"] * s["queries"] * s["answers"] if "steps" in s else s["iterations"] * s["pairs"] * (s["game"] == "spin")
        own = (games, sum(sum(m["tokens"]) for m in metrics) / len(metrics), sum(sum(m["seconds"]) for m in metrics) / 60 / len(metrics))
        return tuple(a + b for a, b in zip(own, self.cost(self.after[method]))) if self.after[method] else own

    def items(self, method, key, iterate=-1):
        """[seeds, items] of "sampled", "greedy", "pass@8" or "longer": shares of right answers. method None: the start."""
        rows = self.start if method is None else [seed[iterate] for seed in self.scores[method]]
        return torch.tensor([row["items"][key] for row in rows])

    def gain(self, method, key="sampled", over=None, iterate=-1, over_iterate=-1):
        """[mean, low, high] of a method's gain over another (or the start), in points of a hundred."""
        return [100 * v for v in seeds_and_items(self.items(method, key, iterate) - self.items(over, key, over_iterate))]

    def end(self, method, key):
        """The mean of a curve's last tenth, over the seeds."""
        return sum(_tenth(m[key], True) for m in self.metrics[method]) / len(self.metrics[method])

    def change(self, method, key, over=None):
        """[mean, low, high] over seeds: the last tenth of a curve less its first, or less another method's last tenth."""
        pairs = zip(self.metrics[method], self.metrics[over] if over else self.metrics[method])
        return seeds_and_items(torch.tensor([[_tenth(a[key], True) - _tenth(b[key], bool(over))] for a, b in pairs]))


def _tenth(curve, last, least=1):
    """Mean of a curve's last tenth, or of its first: of so many values at the least, if it has them."""
    k = min(len(curve), max(least, len(curve) // 10))
    return sum(curve[-k:] if last else curve[:k]) / k


def verdict(interval, worse_by=0.0):
    """yes, no or not decided: is the figure above -worse_by?"""
    return "yes" if interval[1] > -worse_by else "no" if interval[2] < -worse_by else "not decided"


def all_of(*verdicts):
    """yes if every part of a claim holds, no if one is refuted."""
    return "no" if "no" in verdicts else "yes" if set(verdicts) == {"yes"} else "not decided"


def claims(r):
    """The papers' claims: [(claim, verdict, the figures that say so)] of a Results. Each verdict rests on figures fixed beforehand."""
    points = lambda v: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*v)
    share = lambda v: "{:+.2f} [{:+.2f}, {:+.2f}]".format(*v)
    less = lambda v: [-v[0], -v[2], -v[1]]
    zero, long, long_zero, sft, one = "LSP-Zero, eager", "LSP, eager, 3 x as long", "LSP-Zero, eager, 3 x as long", "more fine-tuning", "SPIN, one long iteration"
    end = lambda key: ", ".join(f"{m.removeprefix('LSP paid ').replace('LSP', 'minimax')} {r.end(m, key):.2f}" for m in r.scores if m == "LSP" or m.startswith("LSP paid"))
    valid, kept, right = r.change(long_zero, "valid"), r.change(long, "valid", long_zero), r.gain(long, over=long_zero)
    spin = [r.gain("SPIN", iterate=i, over="SPIN" if i else None, over_iterate=i - 1) for i in range(len(r.scores["SPIN"][0]))]
    items = lambda i: r.items("SPIN", "sampled", i)
    shrink = [100 * v for v in seeds_and_items((items(0) - r.items(None, "sampled")) - (items(-1) - items(-2)))]
    grpo, frontier = r.gain("LSP", over="GRPO on data"), r.gain("LSP paid r-zero", over="LSP")
    return [
        ("1. Self-play without data improves the start", verdict(r.gain("LSP")),
         f"LSP {points(r.gain('LSP'))} sampled, {points(r.gain('LSP', 'greedy'))} greedy; LSP-Zero {points(r.gain('LSP-Zero'))} sampled"),
        ("2. It reaches GRPO on data, within a point", verdict(grpo, 1.0), f"LSP less GRPO {points(grpo)}; GRPO itself {points(r.gain('GRPO on data'))}"),
        (f"3. LSP-Zero rises, then its queries degenerate (alpha_Ch {EAGER})", all_of(verdict(r.gain(zero)), verdict(less(valid))),
         f"it rises by {points(r.gain(zero))}; in a run three times as long, well-formed queries {share(valid)} from the first tenth to the last, "
         f"groups with spread {share(r.change(long_zero, 'spread'))}, at the end {points(r.gain(long_zero))}"),
        ("4a. The quality self-reward keeps LSP from that, over a run three times as long", verdict(kept),
         f"at its end, LSP less LSP-Zero: well-formed {share(kept)}, spread {share(r.change(long, 'spread', long_zero))}; LSP's own well-formed queries {share(r.change(long, 'valid'))} from the first tenth to the last"),
        ("4b. .. and LSP has the more right answers there", verdict(right), f"LSP less LSP-Zero there {points(right)}; LSP ends at {points(r.gain(long))}"),
        ("5. Self-play after GRPO adds to it", verdict(r.gain("GRPO, then LSP", over="GRPO on data")),
         f"{points(r.gain('GRPO, then LSP', over='GRPO on data'))}; the other way round, GRPO after LSP {points(r.gain('LSP, then GRPO', over='LSP'))}"),
        ("6a. SPIN improves, with shrinking gains", all_of(verdict(r.gain("SPIN")), verdict(shrink)),
         "gain of each iteration " + ", ".join(points(v) for v in spin) + f"; the first less the last {points(shrink)}"),
        ("6b. .. past where fine-tuning on the same answers stops", verdict(r.gain("SPIN", over=sft)), f"SPIN less fine-tuning {points(r.gain('SPIN', over=sft))}; fine-tuning itself {points(r.gain(sft))}"),
        ("7. Training longer inside iteration 0 does not replace iterations", verdict(r.gain("SPIN", over=one)), f"SPIN less one long iteration {points(r.gain('SPIN', over=one))}"),
        ("8. How diverse do the queries stay, by pay? (share of distinct ones in a step; of pieces that two have in common; last tenth)", "", f"distinct: {end('distinct')}; in common: {end('similarity')}"),
        ("9. Does paying for the frontier (r-zero) beat as hard as possible?", verdict(frontier),
         f"r-zero less minimax {points(frontier)}; spice less minimax {points(r.gain('LSP paid spice', over='LSP'))}; groups with spread at the end: {end('spread')}"),
        ("10. Self-play reaches chains one operation longer than any in training", verdict(r.gain("LSP", "longer")),
         f"LSP {points(r.gain('LSP', 'longer'))}, GRPO {points(r.gain('GRPO on data', 'longer'))}, SPIN {points(r.gain('SPIN', 'longer'))}, from {100 * r.items(None, 'longer').mean():.1f} %"),
    ]


def reproduce_table(r):
    """One Markdown table: every method's right answers by kind, greedy and sampled, pass@8, win rate, and what it cost."""
    cell = lambda v, sign="": ("{:" + sign + ".1f} [{:" + sign + ".1f}, {:" + sign + ".1f}]").format(*v)
    percent = lambda x: [100 * v for v in seeds_and_items(x)]
    kinds = {k: i for i, k in enumerate(language.KINDS)}
    kind = torch.tensor([kinds[k] for k in r.start[0]["kinds"]])
    lines = ["| method | sampled, % | gain | greedy, % | gain | pass@8, % | " + " | ".join(kinds) + " | win rate, % | games | tokens | minutes |", "|---" * (10 + len(kinds)) + "|"]
    for method in [None, *r.scores]:
        for iterate in [-1] if method is None else range(len(r.scores[method][0])):
            x = {key: r.items(method, key, iterate) for key in ("sampled", "greedy", "pass@8")}
            last = method is None or iterate == len(r.scores[method][0]) - 1
            name = "start" if method is None else method + (f", iteration {iterate}" if len(r.scores[method][0]) > 1 else "")
            # Ties as half, over all pairs of answers to an item with shares p and q of right ones: 1/2 + (p - q)/2.
            wins = [cell(percent(0.5 + 0.5 * (x["sampled"] - r.items(None, "sampled"))))] if method else ["50.0"]
            cost = [f"{v:,.{d}f}" for v, d in zip(r.cost(method), (0, 0, 1))] if method and last else ["", "", ""]
            gains = [cell(r.gain(method, key, iterate=iterate), "+") if method else "" for key in ("sampled", "greedy")]
            lines.append("| " + " | ".join([name, cell(percent(x["sampled"])), gains[0], cell(percent(x["greedy"])), gains[1], f"{100 * x['pass@8'].mean():.1f}",
                                            *(f"{100 * x['sampled'][:, kind == i].mean():.1f}" for i in kinds.values()), *wins, *cost]) + " |")
    return "\n".join(lines)


def reproduce_picture(r, path):
    """The gains of all methods with their intervals; SPIN by iteration; spread over the steps by what the Challenger is paid."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (bars, spin, spread) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained", width_ratios=[1.5, 1, 1.2])
    names = list(reversed(r.scores))
    for key, shift, color in (("sampled", 0.17, "C0"), ("greedy", -0.17, "C1")):
        g = torch.tensor([r.gain(m, key) for m in names]).numpy()
        bars.barh([i + shift for i in range(len(names))], g[:, 0], 0.32, xerr=[g[:, 0] - g[:, 1], g[:, 2] - g[:, 0]], color=color, label=key, ecolor="0.4")
    bars.set_yticks(range(len(names)), names, fontsize=8)
    bars.set_title("gain in right answers, points", fontsize=10)
    bars.legend(fontsize=8)
    for i, m in enumerate(("SPIN", "more fine-tuning")):
        points = torch.tensor([[0.0, 0.0, 0.0]] + [r.gain(m, iterate=t) for t in range(len(r.scores[m][0]))]).numpy()
        spin.errorbar([t + 0.05 * i for t in range(len(points))], points[:, 0], [points[:, 0] - points[:, 1], points[:, 2] - points[:, 0]], marker="o", capsize=3, label=m)
    one = r.gain("SPIN, one long iteration")
    spin.errorbar([len(points) - 1 + 0.1], one[:1], [[one[0] - one[1]], [one[2] - one[0]]], marker="s", capsize=3, label="one long iteration")
    spin.set_xticks(range(len(points)), ["start", *(f"iteration {t}" for t in range(len(points) - 1))], fontsize=7)
    spin.set_title("SPIN, gain sampled, points", fontsize=10)
    spin.legend(fontsize=8)
    for m in [m for m in r.scores if "spread" in r.metrics[m][0] and "then" not in m]:
        spread.plot(smooth([sum(column) / len(column) for column in zip(*(c["spread"] for c in r.metrics[m]))], 15), label=m)
    spread.set_title("groups with spread, by step", fontsize=10)
    spread.legend(fontsize=7)
    for axis in (bars, spin, spread):
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def reproduce(argv):
    """`python evaluate.py reproduce`: all games of both papers on the embedded default, and what they say of the papers' claims."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm
    parser = argparse.ArgumentParser(prog="evaluate.py reproduce", description=reproduce.__doc__.split(": ")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seeds", type=number(int), default=3, help="runs of each method")
    parser.add_argument("--steps", type=number(int), default=300, help="of each game of LSP and GRPO; SPIN's pairs an iteration go with them, 5000 for 300")
    parser.add_argument("--quick", action="store_true", help="one seed and 40 steps unless told, in reproduce-quick: the whole way in a few minutes, no figures to believe")
    parser.add_argument("--out", default="reproduce", help="folder of all runs; what is finished in it is kept, so that the same command goes on")
    parser.add_argument("--jobs", type=number(int), default=os.cpu_count(), help="runs at once, one thread each")
    if parser.parse_args(argv).quick:
        parser.set_defaults(seeds=1, steps=40, out="reproduce-quick")
    args = parser.parse_args(argv)
    seeds, start, out, commands = range(args.seeds), Path(__file__).resolve().parent / "tiny", Path(args.out).resolve(), method_commands(args.steps)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be made a folder ({error.strerror})") from None
    weights = hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()[:16]
    settings = {"commands": {m: list(c) for m, c in commands.items()}, "held_out": HELD_OUT, "items": ITEMS, "weights": weights}
    if (out / "settings.json").is_file() and json.loads((out / "settings.json").read_text()) != settings:
        raise UserError(f"{out} holds runs of other settings or another start: choose another --out")
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    for s in seeds:
        if not (out / f"start-s{s}.json").is_file():
            main([str(start), "--held-out", str(HELD_OUT), "--items", str(ITEMS), "--seed", str(1000 + s), "--json", str(out / f"start-s{s}.json"), "--device", "cpu"])
    # The longest first; what starts from another method's model, in a second round.
    rounds = [[(m, s) for s in seeds for m in sorted(commands, key=lambda m: "long" not in m) if bool(commands[m][1]) == later] for later in (False, True)]
    with tqdm(total=sum(map(len, rounds)), unit="run", dynamic_ncols=True) as bar, ThreadPoolExecutor(args.jobs) as pool:
        running, children = {}, set()

        def work(job):
            running[job] = f"{job[0]}, seed {job[1]}"
            bar.set_postfix_str("; ".join(running.values()))
            try:
                return run_method(out, *job, start, commands, children)
            finally:
                del running[job]
                bar.update()
        for jobs in rounds:
            try:
                errors = [e for e in pool.map(work, jobs) if e]
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(children):
                    child.kill()
                raise
            if errors:
                raise UserError(f"{len(errors)} of {len(jobs)} runs failed: {errors[0]}; the finished ones are kept, the same command goes on")
    results = Results(out, commands, seeds)
    reproduce_picture(results, out / "reproduce.png")
    answers = "\n".join(f"- **{claim}: {said}.** {figures}." if said else f"- **{claim}** {figures}." for claim, said, figures in claims(results))
    text = f"{reproduce_table(results)}\n\n{answers}\n"
    (out / "reproduce.md").write_text(text)
    print(f"\n{text}\nthe same in {out / 'reproduce.md'}, as a picture in {out / 'reproduce.png'}")


def open_duel(args):
    """evaluate.py MODEL --against BASE --instructions FILE: both answer greedily, the better answers are counted."""
    referee, judge = getattr(args, "reward", None), getattr(args, "judge", None)
    if len(args.model) != 1 or not hasattr(args, "against") or (referee is None) == (judge is None):
        raise UserError("--instructions needs one MODEL, --against, and either --reward or --judge")
    if referee in ("exact", "math"):
        raise UserError(f"--reward {referee} knows no answers to open instructions: name a reward model or file.py:function")
    if Path(args.outputs).exists():
        raise UserError(f"{args.outputs} exists already: choose another --outputs, nothing was touched")
    instructions, outputs = read_instructions(args.instructions), {}
    # The judge first: whatever is wrong with it shows before hours of answering.
    if referee:
        referee = load_referee(referee, args.device, dtype=DTYPES[args.dtype])
    else:
        judge = PairJudge(*load(model_folder(judge), args.device, DTYPES[args.dtype]))
    for name in (args.model[0], args.against):
        model, tokenizer = load(model_folder(name), args.device, DTYPES[args.dtype])
        outputs[name] = [group[0] for group in answer(model, tokenizer, [row["instruction"] for row in instructions], 1, 0, max_new_tokens=args.answer_tokens)]
        del model
        if name == args.model[0]:
            rows = [row | {"output": text, "generator": Path(name).name} for row, text in zip(instructions, outputs[name])]
            Path(args.outputs).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    wins = duel(outputs[args.model[0]], outputs[args.against], instructions, referee, judge)
    print(f"{args.model[0]} against {args.against}\n" + duel_table(wins, [row["dataset"] for row in instructions]))
    print(f"answers: {args.outputs}")


def main(argv=None):
    """The command line of the scoreboard: scores, a duel on open instructions, `report` or `reproduce`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["reproduce"]:
        return reproduce(argv[1:])
    if argv[:1] == ["report"]:
        return report(argv[1:])
    parser = argparse.ArgumentParser(description="How often is a model right, and how often does it beat another? `evaluate.py report` and `evaluate.py reproduce` are commands of their own.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", nargs="+", metavar="MODEL", help="folder in Hugging Face layout, hub name, or run folder")
    parser.add_argument("--against", default=argparse.SUPPRESS, metavar="MODEL", help="also score this one, and the win rate of each MODEL against it")
    parser.add_argument("--items", type=number(int), default=1000, help="held-out instructions")
    parser.add_argument("--seed", type=number(int, zero=True), default=0, help="seed of the sampling: each MODEL has its own, so one that stands elsewhere in the line has other luck")
    parser.add_argument("--picture", default=argparse.SUPPRESS, metavar="PNG", help="where to draw the curves of the runs; default: curves.png in a single run's folder, or here for several runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ..")
    parser.add_argument("--held-out", type=number(int, zero=True), default=0, metavar="K", help="which drawing of held-out instructions")
    parser.add_argument("--json", default=argparse.SUPPRESS, metavar="FILE", help="of one MODEL: write every instruction's figures there, and those on chains one operation longer than any in training")
    parser.add_argument("--instructions", default=argparse.SUPPRESS, metavar="FILE", help="open instructions in AlpacaEval's format (a JSON list): win rate of the MODEL against --against by --reward or --judge")
    parser.add_argument("--reward", default=argparse.SUPPRESS, help="with --instructions: file.py:function, or a reward model's folder or hub name")
    parser.add_argument("--judge", default=argparse.SUPPRESS, metavar="MODEL", help="with --instructions: a chat model that is shown both answers, in both orders")
    parser.add_argument("--answer-tokens", type=number(int), default=512, help="with --instructions: longest answer")
    parser.add_argument("--outputs", default="model_outputs.json", metavar="FILE", help="with --instructions: where the answers go, as alpaca_eval reads them")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="with --instructions: of all models")
    args = parser.parse_args(argv)
    check_device(args.device)
    if hasattr(args, "instructions"):
        return open_duel(args)
    against, picture = getattr(args, "against", None), getattr(args, "picture", None)
    runs = [m for m in args.model if (Path(m) / "metrics.jsonl").is_file()]
    if picture and not runs:
        raise UserError("--picture draws the curves of runs, and no MODEL is a run folder")
    if picture and (not picture.endswith(".png") or not Path(picture).resolve().parent.is_dir()):
        raise UserError(f"--picture {picture}: expected the path of a .png in a folder that exists")
    queries, file = language.evaluation_set(args.items, args.held_out), getattr(args, "json", None)
    if file and (len(args.model) > 1 or against or not Path(file).resolve().parent.is_dir()):
        raise UserError("--json writes the figures of one MODEL, without --against, to a file in a folder that exists")

    def score(name, number):
        model, tokenizer = load(model_folder(name), args.device)
        rates = rate(model, tokenizer, queries, 1000 * args.seed + number)
        print(f"\n{name}\n{table({'': summary(rates, queries)})}", flush=True)
        if file:
            longer = language.longer_set(300)
            items = {"sampled": rates["sampled"].mean(1), "greedy": rates["greedy"].mean(1), "pass@8": rates["sampled"].amax(1),
                     "longer": rate(model, tokenizer, longer, args.seed, ExactReward(longest=4))["sampled"].mean(1)}
            Path(file).write_text(json.dumps({"model": str(name), "scores": summary(rates, queries), "kinds": [language.kind(q) for q in queries],
                                              "items": {k: v.tolist() for k, v in items.items()}}) + "\n")
        return rates["sampled"]

    ours = [score(name, i + 1) for i, name in enumerate(args.model)]
    if against:
        theirs = score(against, 0)
        for name, sampled in zip(args.model, ours):
            print(f"\n{name}: " + win_line(win_rate(sampled, theirs), against))
    if runs:
        picture = picture or (Path(runs[0]) / "curves.png" if len(runs) == 1 else "curves.png")
        print(f"curves: {picture}" if draw(runs, picture) else "no step was finished, so there are no curves")


if __name__ == "__main__":
    sys.exit(run_command(main))
