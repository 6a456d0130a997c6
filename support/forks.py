"""What the recipes of neighbouring papers share: settings, the loop of a run, its files.

It is plumbing only: each recipe's method stands in the recipe's own file. The settings are rows of
selfplay.SETTINGS and rows of the recipe's own, so a flag means the same everywhere.
"""
import copy
import json
import math
import time
from collections import Counter

import torch

from support import console, data, learning, machine, record, runs

# The rooms' flags that every recipe has, and those for data to learn from.
SHARED = ("--eval-data", "--eval-split", "--answer-tokens", "--template-args", "--seed", "--run",
          "--eval-items", "--micro-batch", "--dtype", "--low-memory", "--device")
DATA = ("--data", "--split", "--skip-bad-rows")
CHALLENGER = ("--task", "--template", "--query-tokens")  # where the model writes queries
# For a recipe that learns without knowing what is right.
FIGURES_ONLY = ("--reward", {str}, "exact", "majority",
                "who knows what is right, for figures and the scoreboard alone: nothing is learnt "
                "from it; see selfplay.py -h")


def table(own, room, *flags):
    """A recipe's settings: its own rows, and then those rows of the table `room` that it needs.

    flags: of the rows that it takes besides SHARED.
    """
    rows = {row[0]: row for row in room if not isinstance(row, str)}
    taken = {row[0] for row in own}
    return ["the method", *own, "the run", rows["--model"],
            *(rows[flag] for flag in ("--reward", *flags, *SHARED) if flag not in taken)]


def parse(settings, room, argv, name, about, speaks):
    """The settings of a recipe's command line. Raises UserError, or exits with 2.

    settings: of `table`. name: the recipe's, which names its runs. about: its docstring, whose
    first line becomes the text of -h. speaks: does a model speak the embedded language?
    """
    words = f"recipes/{name}.py", about.split("\n")[0]
    args = console.parse(settings, argv, *words)
    real = not speaks(runs.model_folder(args.model))
    shown = {row[0] for row in settings if not isinstance(row, str)}
    # The rooms read other settings, too. What a recipe does not show has its default.
    hidden = {row[0].removeprefix("--").replace("-", "_"): row[3 if real else 2] for row in room
              if not isinstance(row, str) and row[0] not in shown}
    hidden |= {"game": name.replace("_", "-"), "resume": None, "loss": "logistic"}
    args = console.parse(settings, argv, *words, real=real, **hidden)
    args.model = str(runs.model_folder(args.model))  # a run's folder stands for its model
    if args.run is not None:
        runs.check_name(args.run)
    console.assignments(args.template_args)
    data.refuse_splits(args)
    for refused, why in (
            (real and "--data" in shown and not args.data,
             f"{args.model} does not speak the embedded language: name --data for it to answer"),
            (real and (not args.reward or "exact" in dict(console.specs(args.reward))),
             f"{args.model} does not speak the embedded language, so --reward exact cannot judge "
             "it: name another one"),
            (not real and (args.task or args.template),
             "--task and --template are for models that do not speak the embedded language: this "
             "one has its own Challenger's prompt"),
            (args.skip_bad_rows and not (args.data or args.eval_data),
             "--skip-bad-rows is about --data: name one"),
            ("math" in dict(console.specs(args.reward)) and not args.data,
             "--reward math knows the right answers from --data alone")):
        if refused:
            raise console.UserError(why)
    machine.check_device(args.device)
    return args


def play(run, steps, step):
    """Step after step, from 1 to `steps`; each step's figures and games go into the run's files.

    step: a function of the number that returns (figures, games): {name: number}, and a list for
    games.jsonl. Ctrl-C ends a run after a step. Returns the number of the last step.
    """
    with runs.stop_asked() as asked:
        for number in range(1, steps + 1):
            began = time.perf_counter()
            figures, games = step(number)
            row = {"step": number} | figures | {"seconds": time.perf_counter() - began}
            run.metrics.write(json.dumps(row) + "\n")
            run.games.write(json.dumps({"step": number, "games": games}) + "\n")
            shown = (f"{name} {value:,.0f}" if isinstance(value, int) else f"{name} {value:.3f}"
                     for name, value in row.items() if name != "step")
            print(f"step {number} of {steps}   " + "  ".join(shown), flush=True)
            if asked and number < steps:
                print(f"stopped after step {number}: what was learnt so far is saved; a recipe "
                      "does not resume")
                break
    return number


def twin(game):
    """Another player like a selfplay.Game's: a copy of its start, with an optimizer of its own."""
    model = copy.deepcopy(game.reference).requires_grad_(True)
    return game._replace(model=model, optimizer=adamw(model))


def adamw(model):
    """A new AdamW; its learning rate is set later (learning.set_rate)."""
    return learning.optimizer_for(model, torch.optim.AdamW, weight_decay=0.0)


def learn(optimizer, examples, gradient, args, rng):
    """--epochs over the examples, shuffled anew, --batch at a time. Returns mean figures.

    gradient: a function of a list of examples: it adds the gradient of their mean loss, and returns
    {name: figure}. No examples, no figures. Raises UserError where a gradient is not finite.
    """
    found = []
    for _ in range(args.epochs):
        order = rng.sample(examples, len(examples))
        for i in range(0, len(order), args.batch):
            found.append(gradient(order[i:i + args.batch]))
            check(learning.take(optimizer))
    return {name: sum(row[name] for row in found if name in row)
            / sum(name in row for row in found) for name in (found[0] if found else ())}


def check(norm):
    """Raise UserError for a gradient's norm that is not finite. Returns the norm."""
    if not math.isfinite(norm):
        raise console.UserError(f"the gradient's norm is {norm}; the step was not taken; try a "
                                "smaller --lr in a new run")
    return norm


def check_some(queries):
    """Raise UserError where no query is left to answer."""
    if not queries:
        raise console.UserError("no query of this step can be used: all are cut, or none has an "
                                "answer; try a larger --query-tokens or a smaller learning rate")


def figures(reward, ids):
    """{"reward", "spread", "answer_tokens"} of rewards [N, G] and answers, N lists of G id lists.

    As in support/record.py: spread is the share of groups whose rewards differ.
    """
    lengths = [len(answer) for group in ids for answer in group]
    return {"reward": reward.mean().item(), "answer_tokens": sum(lengths) / len(lengths),
            "spread": (reward.std(1, correction=0) > 0).float().mean().item()}


def tokens(*sampled):
    """How many tokens lists of completions have, N lists of lists of ids each."""
    return sum(len(ids) for groups in sampled for group in groups for ids in group)


def games(queries, answers, reward, quality=None):
    """A step's games for games.jsonl, as support/record.py writes them. Equal answers once.

    answers: N lists of G texts. reward, and quality where there is a judge: [N, G].
    """
    quality = [[None] * len(group) for group in answers] if quality is None else quality.tolist()
    found = []
    for query, texts, rewards, grades in zip(queries, answers, reward.tolist(), quality):
        equal = Counter(zip(texts, rewards, (q and round(q, 3) for q in grades)))
        found.append({"query": query, "answers": [
            {"answer": text, "times": times, "reward": round(r, 3), "quality": q}
            for (text, r, q), times in equal.items()]})
    return found


def valid(referee_says, queries):
    """{"valid", "distinct", "similarity"} of queries. referee_says: see referees.which_valid."""
    found = {"distinct": len(set(queries)) / len(queries), "similarity": record.overlap(queries)}
    if referee_says is not None:
        found["valid"] = sum(referee_says) / len(referee_says)
    return found
