"""The scoreboard: how often a model is right, how often it beats another, and what a run looked like.

    python evaluate.py tiny                              accuracy by kind: greedy, at temperature 1, pass@8
    python evaluate.py runs/lsp-1 --against tiny         the same for both, and the win rate
    python evaluate.py runs/lsp-1 runs/grpo-1 --picture curves.png
    python evaluate.py MODEL --against BASE --instructions alpaca_eval.json --reward REWARD_MODEL

MODEL is a folder in Hugging Face layout, a hub name, or the folder of a run (then its model, and its curves are drawn).
Held-out instructions of the embedded language; 95 % intervals.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

from model import UserError, check_device, generate, groups, load, number, run_command
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


def rate(model, tokenizer, queries, seed=0):
    """{"sampled": R [n, SAMPLES], "greedy": R [n, 1]}: right or wrong, for every query and answer."""
    sampled = answer(model, tokenizer, queries, SAMPLES, 1.0, seed)
    greedy = answer(model, tokenizer, queries, 1, 0)
    return {"sampled": judged(ExactReward(), queries, sampled), "greedy": judged(ExactReward(), queries, greedy)}


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


def report(rates, queries):
    """{"scores": {name: summary}, "win_rate": {name: [share, low, high]}} from {name: rates}: wins against the first name."""
    start, *others = rates
    return {"scores": {name: summary(r, queries) for name, r in rates.items()},
            "win_rate": {name: win_rate(rates[name]["sampled"], rates[start]["sampled"]) for name in others}}


def short(rates):
    """A player's rates as half a sentence."""
    return f"{100 * rates['sampled'].mean():.1f} % at temperature 1, {100 * rates['greedy'].mean():.1f} % greedy"


def table(summaries):
    """A text table of several models' summaries, {name: summary}: a line for each kind and model, in percent."""
    cell = lambda share: "{:5.1f} [{:4.1f}, {:4.1f}]".format(*(100 * x for x in share))
    columns, first = ("sampled", "greedy", "pass@8"), next(iter(summaries.values()))
    width = max(map(len, summaries))
    lines = [f"{'right answers, %':<18}{'':<{width}}" + "".join(f"{c:>21}" for c in columns)]
    for kind in first:
        for i, (name, rows) in enumerate(summaries.items()):
            label = "" if i else f"{kind} (n={rows[kind]['n']})"
            lines.append(f"{label:<18}{name:<{width}}" + "".join(f"{cell(rows[kind][c]):>21}" for c in columns))
    return "\n".join([*lines, "95 % intervals; sampled: 8 answers at temperature 1; greedy tells learning from sharpening"])


def win_line(win, against="the start"):
    """The win rate as one sentence."""
    return f"win rate against {against}, ties as half: {100 * win[0]:.1f} % [{100 * win[1]:.1f}, {100 * win[2]:.1f}]"


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
    return [{"instruction": row["instruction"], "dataset": str(row.get("dataset", "all"))} for row in rows]


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
        lines = Path(path).read_text(encoding="utf-8").splitlines()
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

def new_run(name, game, settings):
    """Make runs/<name> and write settings.json; without a name, runs/<game>-<next free number>. Never an existing folder."""
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise UserError(f"--run {name!r} is not a plain folder name")
    number = 1
    while True:
        folder = Path("runs") / (name or f"{game}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if name:
                raise UserError(f"{folder} exists already: choose another --run, nothing was touched") from None
            number += 1
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror}") from None
    (folder / "settings.json").write_text(json.dumps(settings | {"torch": torch.__version__}, indent=2) + "\n")
    return folder


def read_metrics(run):
    """A run's metrics.jsonl as {name: [value a step]}, with "step" among the names."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {k: [r[k] for r in rows] for k in (rows[0] if rows else {})}


PANELS = {  # of a run's picture: name in metrics.jsonl -> title
    "reward": "reward", "quality": "quality (judge)", "valid": "well-formed queries", "spread": "groups with spread",
    "distinct": "distinct queries", "kl_solver": "KL of the Solver", "kl_challenger": "KL of the Challenger",
    "loss": "loss", "margin": "margin", "logprob_answer": "log p of people's answers", "logprob_rival": "log p of the opponent's",
    "answer_tokens": "tokens an answer"}


def draw(runs, path):
    """Draw the curves of one or several runs into one PNG, smoothed over a twentieth of the run; False if there are none.

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
    figure, axes = plt.subplots(2, (count + 1) // 2, figsize=(2.6 * ((count + 1) // 2), 5.5), layout="constrained", squeeze=False)
    for axis, key in zip(axes.flat, panels):
        for i, (name, d) in enumerate(data.items()):
            if key not in d:
                continue
            window = max(1, len(d[key]) // 20)
            smooth = [sum(d[key][max(0, j - window + 1):j + 1]) / len(d[key][max(0, j - window + 1):j + 1]) for j in range(len(d[key]))]
            axis.plot(d["step"], d[key], color=f"C{i}", alpha=0.18, linewidth=0.8)
            axis.plot(d["step"], smooth, color=f"C{i}", label=name)
        axis.set_title(PANELS[key], fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        if key in ("valid", "spread", "distinct"):
            axis.set_ylim(-0.03, 1.03)
    for i, name in enumerate(data):
        if name in scores:
            axis, rows = axes.flat[len(panels)], [100 * torch.tensor(s["all"]["sampled"]) for s in scores[name].values()]
            points = torch.stack(rows).T  # [share, low, high] of each iterate, the start first
            axis.errorbar(range(len(rows)), points[0], [points[0] - points[1], points[2] - points[0]], color=f"C{i}", marker="o", capsize=3)
            axis.plot([100 * s["all"]["greedy"][0] for s in scores[name].values()], color=f"C{i}", linestyle=":", marker=".")
            axis.set_title("right answers, % (greedy: dots)", fontsize=10)
            axis.set_xticks(range(max(map(len, scores.values()))), max(scores.values(), key=len), fontsize=7, rotation=20)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    for axis in axes.flat[count:]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def model_folder(name):
    """Where a run folder's model is: model/, or the last whole iterate of SPIN. Anything else is a model's own name."""
    if not (Path(name) / "metrics.jsonl").is_file():
        return name
    if (Path(name) / "model").is_dir():
        return Path(name) / "model"
    iterates = [p for p in Path(name).glob("iteration-*") if p.name.removeprefix("iteration-").isdigit()]
    if not iterates:
        raise UserError(f"{name}: this run has no finished model")
    return max(iterates, key=lambda p: int(p.name.removeprefix("iteration-")))


def open_duel(args):
    """evaluate.py MODEL --against BASE --instructions FILE: both answer greedily, the better answers are counted."""
    referee, judge = getattr(args, "reward", None), getattr(args, "judge", None)
    if len(args.model) != 1 or not hasattr(args, "against") or (referee is None) == (judge is None):
        raise UserError("--instructions needs one MODEL, --against, and either --reward or --judge")
    if Path(args.outputs).exists():
        raise UserError(f"{args.outputs} exists already: choose another --outputs, nothing was touched")
    instructions, outputs = read_instructions(args.instructions), {}
    referee = load_referee(referee, check_device(args.device)) if referee else None
    for name in (args.model[0], args.against):
        model, tokenizer = load(model_folder(name), args.device)
        outputs[name] = [group[0] for group in answer(model, tokenizer, [row["instruction"] for row in instructions], 1, 0, max_new_tokens=args.answer_tokens)]
        if name == args.model[0]:
            rows = [row | {"output": text, "generator": Path(name).name} for row, text in zip(instructions, outputs[name])]
            Path(args.outputs).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    judge = PairJudge(*load(model_folder(judge), args.device)) if judge else None
    wins = duel(outputs[args.model[0]], outputs[args.against], instructions, referee, judge)
    print(f"{args.model[0]} against {args.against}\n" + duel_table(wins, [row["dataset"] for row in instructions]))
    print(f"answers: {args.outputs}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="How often is a model right, and how often does it beat another?",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", nargs="+", metavar="MODEL", help="folder in Hugging Face layout, hub name, or run folder")
    parser.add_argument("--against", default=argparse.SUPPRESS, metavar="MODEL", help="also score this one, and the win rate of each MODEL against it")
    parser.add_argument("--items", type=number(int), default=1000, help="held-out instructions")
    parser.add_argument("--seed", type=number(int, zero=True), default=0, help="seed of the sampling")
    parser.add_argument("--picture", default=argparse.SUPPRESS, metavar="PNG", help="where to draw the curves of the runs; default: curves.png in a single run's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ..")
    parser.add_argument("--instructions", default=argparse.SUPPRESS, metavar="FILE", help="open instructions in AlpacaEval's format (a JSON list): win rate of the MODEL against --against by --reward or --judge")
    parser.add_argument("--reward", default=argparse.SUPPRESS, help="with --instructions: file.py:function, or a reward model's folder or hub name")
    parser.add_argument("--judge", default=argparse.SUPPRESS, metavar="MODEL", help="with --instructions: a chat model that is shown both answers, in both orders")
    parser.add_argument("--answer-tokens", type=number(int), default=512, help="with --instructions: longest answer")
    parser.add_argument("--outputs", default="model_outputs.json", metavar="FILE", help="with --instructions: where the answers go, as alpaca_eval reads them")
    args = parser.parse_args(argv)
    if hasattr(args, "instructions"):
        return open_duel(args)
    check_device(args.device)
    against, picture = getattr(args, "against", None), getattr(args, "picture", None)
    runs = [m for m in args.model if (Path(m) / "metrics.jsonl").is_file()]
    if picture and not runs:
        raise UserError("--picture draws the curves of runs, and no MODEL is a run folder")
    if picture and (not picture.endswith(".png") or not Path(picture).resolve().parent.is_dir()):
        raise UserError(f"--picture {picture}: expected the path of a .png in a folder that exists")
    queries = language.evaluation_set(args.items)

    def score(name, number):
        model, tokenizer = load(model_folder(name), args.device)
        rates = rate(model, tokenizer, queries, 1000 * args.seed + number)
        print(f"\n{name}\n{table({'': summary(rates, queries)})}", flush=True)
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
