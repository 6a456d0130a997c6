"""The scoreboard: how often a model is right, how often it beats another, what a run looked like.

    python evaluate.py score tiny                        right answers, by kind of instruction
    python evaluate.py score runs/lsp-1 --against tiny   the same for both, and the win rate
    python evaluate.py duel MODEL --against BASE --instructions alpaca_eval.json --reward REWARD
    python evaluate.py report runs/lsp-1                 a run as a page: curves, games, answers

MODEL is a folder in Hugging Face layout, a hub name, or the folder of a run.
`score` asks held-out instructions of the embedded language. `duel` takes open instructions, as both
papers do: of two models' answers a reward or a judge says which is better. Intervals are of 95 %.
"""
import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import groups, load, read_config, sample_all
from rewards import ExactReward, last_states, load_referee
from support import console, data, files, machine, referees, report, runs
from support.text import Tokenizer
from tiny import language

SAMPLES = 8  # answers at temperature 1 to each instruction: their mean is sampled, the best pass@8
LONGER = 1000  # chains of four operations that `score --json` asks
Z = 1.959964  # the normal distribution holds 95 % within so many deviations


# --------------------------------------------------------------------------------------------------
# Right answers

def answer(model, tokenizer, queries, samples=1, temperature=1.0, seed=0, max_new_tokens=32):
    """`samples` answers to each query: N lists of text. queries: texts, or Rows of the data."""
    found = answer_ids(model, tokenizer, queries, samples, temperature, seed, max_new_tokens)
    return [[tokenizer.decode(ids) for ids in group] for group in found]


def answer_ids(model, tokenizer, queries, samples, temperature, seed, max_new_tokens):
    """`answer` as ids: N lists of lists. One without an end token was cut."""
    generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
    return ask(model, tokenizer, queries, samples, temperature, generator, max_new_tokens).ids


class Asked(NamedTuple):
    """What a model was asked, and what it said."""
    prompts: list  # N lists of ids
    ids: list  # N lists of `samples` lists of ids: what can be trained on
    texts: list  # the same as texts, without thoughts: what can be judged


def ask(model, tokenizer, queries, samples, temperature, generator, max_new_tokens):
    """`samples` answers to each of N queries, as an Asked.

    queries: texts, or Rows of the data, or prompts as lists of ids, such as the Challenger's.
    """
    room = model.config.context - max_new_tokens  # what is too long is cut from behind
    prompts = [query if isinstance(query, list) else
               tokenizer.chat(as_rows([query])[0].messages, room=room) for query in queries]
    ids = sample_all(model, prompts, samples, max_new_tokens, temperature, generator)
    texts = [[tokenizer.spoken(tokenizer.decode(answer)) for answer in group] for group in ids]
    return Asked(prompts, ids, texts)


def as_rows(queries):
    """Rows of texts. Rows stay as they are."""
    return [query if isinstance(query, data.Row)
            else data.Row([{"role": "user", "content": query}]) for query in queries]


def rate(model, tokenizer, queries, seed=0, referee=ExactReward(), max_new_tokens=32,
         samples=SAMPLES):
    """{"sampled": R [n, samples], "greedy": R [n, 1]}: each answer's reward, mostly 1 for right.

    queries: texts, or Rows of the data.
    """
    rows, found = as_rows(queries), {}
    for name, count, temperature in (("sampled", samples, 1.0), ("greedy", 1, 0)):
        said = answer(model, tokenizer, rows, count, temperature, seed, max_new_tokens)
        said = [[tokenizer.spoken(text) for text in group] for group in said]
        asked = [row.query for row in rows]
        found[name] = referees.judged(referee, asked, said, data.columns(rows))
    return found


def wilson(p, n):
    """95 % interval (low, high) of a share p of n items (Wilson 1927)."""
    middle = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def normal(values, low=0.0, high=1.0):
    """[mean, lower, upper] of values [n] between low and high, with a 95 % interval.

    The interval is the normal one of the values and of two more, one at each end (after Agresti and
    Min 2005): ten wins of ten do not prove that there will never be a loss.
    """
    mean = values.mean().item()
    more = torch.cat([values.float(), torch.tensor([low, high])])
    half = Z * more.std().item() / math.sqrt(len(more))
    middle = more.mean().item()
    return [mean, max(low, min(mean, middle - half)), min(high, max(mean, middle + half))]


def gains(ours, theirs):
    """{"sampled", "greedy", "pass@8"}: what `ours` gained over `theirs`, [gain, lower, upper].

    ours, theirs: two models' rates on the same instructions. The gain is paired: the mean of the
    differences, instruction by instruction. That is more exact than two separate intervals.
    """
    change = {"greedy": ours["greedy"].mean(1) - theirs["greedy"].mean(1),
              "sampled": ours["sampled"].mean(1) - theirs["sampled"].mean(1),
              f"pass@{SAMPLES}": ours["sampled"].amax(1) - theirs["sampled"].amax(1)}
    every = torch.cat([R.flatten() for rates in (ours, theirs) for R in rates.values()])
    most = 1.0 if right_or_wrong(every) else (every.max() - every.min()).item()
    return {name: normal(values, -most, most) for name, values in change.items()}


def summary(rates, queries):
    """{kind or "all": {"n", "greedy", "sampled", "pass@8"}}, each figure [mean, low, high].

    Where all rewards are 0 or 1, the intervals are Wilson's over the instructions. For the sampled
    share, a mean of SAMPLES answers to each, that is wider than need be, never narrower. Of other
    rewards they are normal ones. pass@8 is the best of the SAMPLES. Only the embedded language has
    kinds.
    """
    every = torch.cat([R.flatten() for R in rates.values()])
    low, high = every.min().item(), every.max().item()

    def interval(values):
        if right_or_wrong(every):
            return [values.mean().item(), *wilson(values.mean().item(), len(values))]
        return normal(values, low, high)
    kinds, found = [language.kind(row.query) for row in as_rows(queries)], {}
    for name in [*language.KINDS, "all"]:
        pick = torch.tensor([name in ("all", kind) for kind in kinds])
        n = int(pick.sum())
        if n:
            sampled, greedy = rates["sampled"][pick], rates["greedy"][pick]
            each = {"greedy": greedy.mean(1), "sampled": sampled.mean(1),
                    "pass@8": sampled.amax(1)}
            found[name] = {"n": n} | {key: interval(values) for key, values in each.items()}
    return found


def right_or_wrong(rewards):
    """Are all rewards 0 or 1, so that their mean is a share of right answers?"""
    return bool(((rewards == 0) | (rewards == 1)).all())


def win_rate(ours, theirs):
    """[win rate, low, high] of R [n, a] against R [n, b], over all pairs of answers to a query.

    A tie counts half. The interval is over the n queries.
    """
    wins = (ours[:, :, None] > theirs[:, None, :]).float()  # [n, a, b]
    ties = (ours[:, :, None] == theirs[:, None, :]).float()
    return normal((wins + 0.5 * ties).mean((1, 2)))


def short(rates):
    """A player's rates as half a sentence."""
    return (f"{100 * rates['sampled'].mean():.1f} % at temperature 1, "
            f"{100 * rates['greedy'].mean():.1f} % greedy")


def percent(share):
    """[share, low, high] as a cell of a table, in percent."""
    return "{:5.1f} [{:4.1f}, {:4.1f}]".format(*(100 * x for x in share))


def gain_line(gain, against="the start", right=True):
    """The gains as one sentence: in points of a hundred right answers, or as they are."""
    scale, unit = (100, ", in points") if right else (1, "")
    form = "{} {:+.1f} [{:+.1f}, {:+.1f}]" if right else "{} {:+.3g} [{:+.3g}, {:+.3g}]"
    parts = [form.format(name, *(scale * x for x in gain[name]))
             for name in ("sampled", "greedy", f"pass@{SAMPLES}")]
    return f"gain over {against}{unit}, paired by instruction: {', '.join(parts)}"


def table(summaries, right=True):
    """A text table of {name: summary}: a line for each kind and model.

    right: the rewards are 0 and 1, so their mean is a share, in percent. Else it stands as it is.
    """
    columns, kinds = ("sampled", "greedy", "pass@8"), next(iter(summaries.values()))
    width = max(map(len, summaries))
    heads = "".join(f"{column:>21}" for column in columns)
    lines = [f"{'right answers, %' if right else 'mean reward':<22}{'':<{width}}{heads}"]
    cell = percent if right else "{0[0]:.3g} [{0[1]:.3g}, {0[2]:.3g}]".format
    for kind in kinds:
        for i, (name, rows) in enumerate(summaries.items()):
            label = "" if i else f"{kind} (n={rows[kind]['n']})"
            cells = "".join(f" {cell(rows[kind][column]):>20}" for column in columns)
            lines.append(f"{label:<22}{name:<{width}}{cells}")
    best = f"one of the {SAMPLES} is right" if right else f"the best of the {SAMPLES}"
    return "\n".join([*lines, f"sampled: {SAMPLES} answers at temperature 1; greedy: the likeliest "
                      f"one; pass@{SAMPLES}: {best}; with 95 % intervals"])


def win_line(win, against="the start"):
    """The win rate as one sentence."""
    share, low, high = (100 * x for x in win)
    return f"win rate against {against}, ties as half: {share:.1f} % [{low:.1f}, {high:.1f}]"


def scoreboard(rates, queries, path):
    """Print the table, the gains and the win rates of {name: rates}, and write a JSON file.

    The first name is the start: the others' gains and win rates are against it. In the file:
    {"scores": {name: summary}, "gain": {name: gains}, "win_rate": {name: [share, low, high]},
    "right": are all rewards 0 or 1?}.
    """
    start, *others = rates
    right = all(right_or_wrong(R) for own in rates.values() for R in own.values())
    scores = {name: summary(own, queries) for name, own in rates.items()}
    wins = {name: win_rate(rates[name]["sampled"], rates[start]["sampled"]) for name in others}
    gain = {name: gains(rates[name], rates[start]) for name in others}
    found = {"scores": scores, "gain": gain, "win_rate": wins, "right": right}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(scores, right))
    for name in others:
        print((f"{name}: " if len(wins) > 1 else "") + gain_line(gain[name], right=right))
        print((f"{name}: " if len(wins) > 1 else "") + win_line(wins[name]))


def people_table(rates):
    """What SPIN changed on held-out rows, of {name: {"people": log p a token [n]}}, as text."""
    start, *others = rates
    lines = [f"log p of people's held-out answers (n={len(rates[start]['people'])}), nats a token; "
             "the change since the start is paired:"]
    for name in others:
        change = rates[name]["people"] - rates[start]["people"]
        gain = normal(change, change.min().item(), change.max().item())
        lines.append("    {:<14}{:9.4f}   {:+.4f} [{:+.4f}, {:+.4f}]".format(
            name, rates[name]["people"].mean(), *gain))
    return "\n".join(lines)


def compare(players, tokenizer, queries, referee, limit, seed, path):
    """The scoreboard of {name: model}: see `rate` and `scoreboard`."""
    # Each has a seed of its own: with one seed both would answer with the same luck.
    rates = {name: rate(model, tokenizer, queries, 2 * seed + i, referee, limit)
             for i, (name, model) in enumerate(players.items())}
    scoreboard(rates, queries, path)


# --------------------------------------------------------------------------------------------------
# A duel: open instructions, one model's answer against another's

class PairJudge:
    """A chat model that says which of two answers is better. It is asked in both orders."""

    QUESTION = ("Which answer to the query is better?\n\nQuery:\n{query}\n\nAnswer A:\n{a}\n\n"
                "Answer B:\n{b}\n\nReply with one letter, A or B.")

    def __init__(self, model, tokenizer):
        """Raises UserError where the two letters are not single tokens."""
        self.model, self.tokenizer, self.cut = model, tokenizer, 0
        question = [{"role": "user", "content": "A or B?"}]
        # lead: what a template or a tokenizer puts between a prompt and the letter; mostly nothing.
        self.lead, letters = tokenizer.choices(question, "AB")
        self.letters = torch.tensor(letters, device=model.embed.weight.device)

    @torch.no_grad()
    def __call__(self, queries, ours, theirs):
        """[n]: 1 where our answer is better, 0 where theirs is, 1/2 where the orders disagree.

        Afterwards `cut` says of how many pairs the answers were too long for the judge.
        """
        pairs = [self.fitting(*pair) for pair in zip(queries, ours, theirs)]
        self.cut = sum(x != a or y != b for (x, y), a, b in zip(pairs, ours, theirs))
        texts = [self.ids(query, *order)
                 for query, (x, y) in zip(queries, pairs) for order in ((x, y), (y, x))]
        logits = F.linear(last_states(self.model, texts), self.model.head[self.letters])
        says_a = logits.argmax(-1).view(-1, 2) == 0  # [n, 2]
        return (says_a[:, 0].float() + (~says_a[:, 1]).float()).cpu() / 2

    def ids(self, query, a, b):
        """What the judge is asked."""
        question = self.QUESTION.format(query=query, a=a, b=b)
        return self.tokenizer.chat([{"role": "user", "content": question}]) + self.lead

    def fitting(self, query, a, b):
        """Both answers, cut to the same length where the judge's context is too short for them."""
        context = self.model.config.context  # in either order: the ids at a seam may differ
        while a + b and (over := max(len(self.ids(query, a, b)), len(self.ids(query, b, a)))
                         - context) > 0:
            left = max(0, (len(a) + len(b) - over) // 2)
            a, b = a[:left], b[:left]
        return a, b


def duel(ours, theirs, queries, referee=None, judge=None):
    """wins [n]: 1 where our answer is better, 1/2 for a tie, 0 else.

    By a referee's two rewards, or by a PairJudge.
    """
    if judge:
        return judge(queries, ours, theirs)
    # Some at a time: a user's function has a time limit for each call.
    rows, pairs = groups(as_rows(queries), 64), groups(list(map(list, zip(ours, theirs))), 64)
    rewards = torch.cat([referees.judged(referee, [row.query for row in part], both,
                                         data.columns(part)) for part, both in zip(rows, pairs)])
    ties = (rewards[:, 0] == rewards[:, 1]).float()
    return (rewards[:, 0] > rewards[:, 1]).float() + 0.5 * ties


def duel_table(wins, sets):
    """A text table of wins [n] by set and overall: ties as half, and as losses (LSP's paper)."""
    lines = [f"{'win rate, %':<24}{'ties as half':>20}{'ties as losses':>22}{'ties':>8}"]
    each = {name: wins[torch.tensor([name == s for s in sets])] for name in dict.fromkeys(sets)}
    for name, own in [*each.items(), ("overall", wins)]:
        half, lost = percent(normal(own)), percent(normal((own == 1).float()))
        ties = 100 * (own == 0.5).float().mean()
        lines.append(f"{f'{name} (n={len(own)})':<24}{half:>20}{lost:>22}{ties:7.1f}%")
    return "\n".join([*lines, "95 % intervals over the instructions"])


# --------------------------------------------------------------------------------------------------
# The commands

def score_command(args):
    """`evaluate.py score MODEL ..`: right answers on held-out instructions of the language."""
    if args.json and (len(args.model) > 1 or args.against
                      or not Path(args.json).resolve().parent.is_dir()):
        raise console.UserError("--json writes the figures of one MODEL, without --against, to a "
                                "file in a folder that exists")
    names = [*args.model, *([args.against] if args.against else [])]
    for name in names:
        if not language.spoken_by(runs.model_folder(name)):
            raise console.UserError(f"{name} does not speak the embedded language, whose questions "
                                    "`score` asks: compare it by `evaluate.py duel`")
    queries = language.evaluation_set(args.items, args.held_out)
    found = []
    variables = console.assignments(args.template_args)
    for i, name in enumerate(names):
        model, tokenizer = load(runs.model_folder(name), args.device, variables=variables)
        # Each has a seed of its own: with one seed all would answer with the same luck.
        luck = 0 if i == len(args.model) else i + 1
        rates = rate(model, tokenizer, queries, 1000 * args.seed + luck)
        print(f"\n{name}\n{table({'': summary(rates, queries)})}", flush=True)
        found.append(rates)
        if args.json:
            write_items(args.json, name, model, tokenizer, queries, rates, args.seed)
    if args.against:
        for name, ours in zip(args.model, found):
            win = win_rate(ours["sampled"], found[-1]["sampled"])
            print(f"\n{name}: " + gain_line(gains(ours, found[-1]), args.against))
            print(f"{name}: " + win_line(win, args.against))


def write_items(path, name, model, tokenizer, queries, rates, seed):
    """Write a model's figures on every instruction to a JSON file, for recipes/claims.py.

    "longer": those on chains one operation longer than any in training.
    """
    def items(rates):
        return {"sampled": rates["sampled"].mean(1).tolist(),
                "greedy": rates["greedy"].mean(1).tolist(),
                f"pass@{SAMPLES}": rates["sampled"].amax(1).tolist()}
    beyond = rate(model, tokenizer, language.longer_set(LONGER), seed, ExactReward(longest=4))
    figures = {"model": str(name), "samples": SAMPLES, "scores": summary(rates, queries),
               "kinds": [language.kind(query) for query in queries],
               "items": items(rates), "longer": items(beyond)}
    Path(path).write_text(json.dumps(figures) + "\n", encoding="utf-8")


def duel_command(args):
    """`evaluate.py duel MODEL --against BASE --instructions FILE`: who answers better?"""
    if {"exact", "math", "majority"} & dict(console.specs(args.reward)).keys():
        raise console.UserError(f"--reward {args.reward} knows no answers to open instructions: "
                                "name a reward model or file.py:function")
    if not Path(args.outputs).resolve().parent.is_dir():
        raise console.UserError(f"--outputs {args.outputs}: expected a file's path in a folder "
                                "that exists")
    if Path(args.outputs).exists():
        raise console.UserError(f"{args.outputs} exists already: choose another --outputs, nothing "
                                "was touched")
    queries, rows = zip(*data.read_instructions(args.instructions))
    asked = [row._replace(line=i, source=f"--instructions {args.instructions}, entry")
             for i, row in enumerate(as_rows(queries), 1)]
    dtype, referee, judge = machine.DTYPES[args.dtype], None, None
    template = None, console.assignments(args.template_args)
    # The judge first: whatever is wrong with it shows before hours of answering.
    if args.reward:
        referee = load_referee(args.reward, args.device, dtype, template)
        for part in referees.parts_of(referee):  # is all at hand that they ask for?
            console.asked_for(part, data.columns(asked))
    else:
        judge = PairJudge(*load(runs.model_folder(args.judge), args.device, dtype, *template))
    for name in (args.model, args.against):  # what does not fit shows before hours of answering
        folder = files.find(runs.model_folder(name))
        tokenizer = Tokenizer(folder, *template)
        reads = [(lambda row: tokenizer.chat(row.messages), read_config(folder)[0].context)]
        for part in referees.parts_of(referee):
            if hasattr(part, "ids"):  # a reward model
                reads.append((lambda row, part=part: part.ids(row.messages, ""),
                              part.model.config.context))
        if judge:
            reads.append((lambda row: judge.ids(row.query, "", ""), judge.model.config.context))
        data.measured(asked, reads, args.answer_tokens)
    outputs, spoken, cut = [], [], {}
    for name in (args.model, args.against):
        model, tokenizer = load(runs.model_folder(name), args.device, dtype, *template)
        answers = answer_ids(model, tokenizer, queries, 1, 0, 0, args.answer_tokens)
        cut[name] = sum(ids[-1] not in model.end_ids for ids, in answers) / len(answers)
        outputs.append([tokenizer.decode(ids) for ids, in answers])
        spoken.append([tokenizer.spoken(text) for text in outputs[-1]])  # without its thoughts
        del model
        if len(outputs) == 1:  # as alpaca_eval reads it
            written = [row | {"output": text, "generator": Path(name).name}
                       for row, text in zip(rows, outputs[0])]
            text = json.dumps(written, indent=2, ensure_ascii=False)
            Path(args.outputs).write_text(text + "\n", encoding="utf-8")
    wins = duel(*spoken, queries, referee, judge)
    print(f"{args.model} against {args.against}")
    print(duel_table(wins, [row["dataset"] for row in rows]))
    print(f"answers cut at --answer-tokens {args.answer_tokens}: "
          + ", ".join(f"{100 * share:.1f} % of {name}" for name, share in cut.items()))
    if judge and judge.cut:
        print(f"pairs of answers that were too long for the judge, and cut: {judge.cut}")
    print(f"answers: {args.outputs}")


def report_command(args):
    """`evaluate.py report RUN ..`: runs as one HTML page; in the terminal, how curves changed."""
    for run in args.run:
        if not all((Path(run) / name).is_file() for name in ("metrics.jsonl", "settings.json")):
            raise console.UserError(f"{run}: no run's folder (it has no metrics.jsonl and "
                                    "settings.json)")
    single = Path(args.run[0]) / "report.html" if len(args.run) == 1 else "report.html"
    path = Path(args.out or single)
    for flag, file in (("--out", path), ("--picture", Path(args.picture or path))):
        if file.is_dir() or not file.resolve().parent.is_dir():
            raise console.UserError(f"{flag} {file}: expected a file's path in a folder that "
                                    "exists")
    report.write_page(args.run, path, asked_alike(args.run, args.ask) if args.ask else None)
    print("means of the first and of the last tenth of the steps (at least ten steps):\n")
    print(report.first_and_last({run: report.read_metrics(run) for run in args.run}))
    if args.picture:
        drawn = report.picture(args.run, args.picture)
        print(f"\ncurves: {args.picture}" if drawn else "\nno step was finished, so no curves")
    print(f"\nopen it in a browser: {path} ({path.stat().st_size / 2**20:.1f} MiB)")


def asked_alike(names, count):
    """The same instructions answered greedily by the start and every checkpoint of runs.

    Returns (columns, rows): columns [(run, checkpoint's name)], rows [(query, right answer or None,
    [answer of each column])]. None where there is nothing to ask.
    """
    columns, folders, answers, queries = [], [], [], None
    for run in names:
        settings = files.read_json(Path(run) / "settings.json")
        found = [("start", Path(settings["model"])), *((f.name, f) for f in runs.iterates(run))]
        for name, folder in found:
            # A start that is not here from where we stand, or one that another run began from, too.
            if name == "start" and (not folder.is_dir() or folder in folders):
                continue
            model, tokenizer = load(folder, date=settings.get("date"))
            if queries is None:
                queries = questions(run, tokenizer, count)
            if not queries:
                return None
            said = answer(model, tokenizer, queries, 1, 0, max_new_tokens=settings["answer_tokens"])
            columns.append((run, name))
            folders.append(folder)
            answers.append([text for text, in said])
    if not columns:
        return None
    return columns, [(query, language.solve(query), [said[i] for said in answers])
                     for i, query in enumerate(queries)]


def questions(run, tokenizer, count):
    """What to ask a run's checkpoints: held-out instructions, or the queries of its first step."""
    if language.spoken_by(tokenizer):
        return language.evaluation_set(count)
    lines, _ = report.read_games(run)
    first = lines[0]["games"] if lines else []
    return list(dict.fromkeys(game.get("query", game.get("prompt")) for game in first))[:count]


COUNT, ZERO_TOO = console.positive(int), console.positive(int, zero=True)


def parse_args(argv=None):
    """The settings of a command line, with `run_it`, the command's function. Exits with 2."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="{score,duel,report}")

    def command(name, function):
        words = function.__doc__.split("`: ")[1].split("\n")[0]
        own = commands.add_parser(name, help=words, description=words, formatter_class=form,
                                  allow_abbrev=False)
        own.set_defaults(run_it=function)
        return own.add_argument
    add = command("score", score_command)
    add("model", nargs="+", metavar="MODEL", help="model folder, hub name, or run folder")
    add("--against", metavar="MODEL", default=argparse.SUPPRESS,
        help="also score this one, and the win rate of each MODEL against it")
    add("--items", type=COUNT, default=1000, help="how many instructions")
    add("--held-out", type=int, choices=range(language.DRAWINGS), default=0,
        help="which drawing of them; no two drawings share one")
    add("--seed", type=ZERO_TOO, default=0, help="seed of the sampling")
    add("--json", metavar="FILE", default=argparse.SUPPRESS,
        help="of one MODEL: write the figures of every instruction there")
    add("--template-args", nargs="+", default=[], metavar="NAME=VALUE",
        help="variables of the chat template, with values in JSON")
    add("--device", default=machine.DEVICE, help="cpu, cuda, mps, ..")

    add = command("duel", duel_command)
    add("model", metavar="MODEL", help="model folder, hub name, or run folder")
    add("--against", metavar="MODEL", required=True, default=argparse.SUPPRESS,
        help="the other model")
    add("--instructions", metavar="FILE", required=True, default=argparse.SUPPRESS,
        help="a JSON list or JSONL, as AlpacaEval and MT-Bench have them")
    add("--reward", default=argparse.SUPPRESS,
        help="who judges: file.py:function, or a reward model's folder or hub name")
    add("--judge", metavar="MODEL", default=argparse.SUPPRESS,
        help="who judges, instead: a chat model that is shown both answers, in both orders")
    add("--answer-tokens", type=COUNT, default=512, help="longest answer")
    add("--outputs", default="model_outputs.json", metavar="FILE",
        help="where MODEL's answers go, as alpaca_eval reads them")
    add("--dtype", choices=list(machine.DTYPES), default="float32", help="of all models")
    add("--template-args", nargs="+", default=[], metavar="NAME=VALUE",
        help="variables of the chat template, with values in JSON")
    add("--device", default=machine.DEVICE, help="cpu, cuda, mps, ..")

    add = command("report", report_command)
    add("run", nargs="+", metavar="RUN", help="run folders; several are laid over each other")
    add("--out", metavar="HTML", default=argparse.SUPPRESS, help="where to write; without it: "
        "report.html in a single run's folder, or here for several runs")
    add("--picture", metavar="PNG", default=argparse.SUPPRESS, help="also draw the curves there")
    add("--ask", type=ZERO_TOO, default=12, metavar="N",
        help="instructions that every checkpoint answers anew; 0 loads no model")

    args = parser.parse_args(argv)
    absent = {"against": None, "json": None, "reward": None, "judge": None, "out": None,
              "picture": None}
    args = argparse.Namespace(**absent | vars(args))
    if args.run_it is duel_command and (args.reward is None) == (args.judge is None):
        raise console.UserError("a duel needs either --reward or --judge")
    return args


def main(argv=None):
    """The scoreboard's command line: score, duel or report."""
    args = parse_args(argv)
    if hasattr(args, "device"):
        machine.check_dtype(machine.check_device(args.device), getattr(args, "dtype", "float32"))
    args.run_it(args)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
