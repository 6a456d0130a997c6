"""R-Zero: a Challenger and a Solver, two models from one start, that train each other in turns.

    python recipes/r_zero.py                 a minute on the embedded default
    python recipes/r_zero.py --penalty 0     without the penalty for repetition
    python recipes/r_zero.py --model FOLDER  a chat model; no data, no reward

After "R-Zero: Self-Evolving Reasoning LLM from Zero Data" (arXiv 2508.05004). Nobody is told what
is right. One step:

    1. Challenger, --updates updates, Solver frozen: N queries q, G answers to each;
           s   = share of the most frequent answer to q
           r_q = max(0, 1 - 2 |s - 1/2| - penalty * share of the N queries that equal q)
       and 0 for a query that was cut.
    2. The new Challenger writes --questions; the Solver answers each G times. The most frequent
       answer is the label; kept is what has --low <= s <= --high: neither sure nor lost.
    3. Solver, --updates updates, Challenger frozen: answers to kept queries; R = 1 for the label.

Both learn by GRPO: advantages divided by the deviation of the group (the Challenger's group is its
N queries), one gradient step a batch, and beta times the KL to the start.
The paper does, and this does not: alike queries are found by BLEU clusters, here they are equal
texts; 10 % of the Solver's reward is for format; its questions number 8,000 an iteration. The form
of r_q is the paper's; the authors' code has min(s, 1 - s) minus the share. Equal answers are equal
texts, or equal numbers (rewards.Majority). The check of memory counts one trained model, not two.
"""
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import selfplay
from model import save
from rewards import Majority
from support import console, forks, learning, referees, report, runs
from tiny import language

NUMBER, COUNT = console.positive(float), console.positive(int)
ZERO_TOO = console.positive(float, zero=True)
SETTINGS = forks.table([
    forks.FIGURES_ONLY,
    ("--steps", COUNT, 3, 3, "turns: the Challenger learns, then the Solver"),
    ("--updates", COUNT, 15, 5, "of each player in a step"),
    ("--queries", COUNT, 32, 8, "N, queries an update"),
    ("--answers", COUNT, 16, 10, "G, answers to each query"),
    ("--questions", COUNT, 512, 256, "that the new Challenger writes for the Solver to learn from"),
    ("--penalty", ZERO_TOO, 1.0, 1.0, "weight of the penalty for repeated queries"),
    ("--low", ZERO_TOO, 0.3, 0.3, "a question is kept if its majority's share is so large"),
    ("--high", NUMBER, 0.8, 0.8, "and not larger than this"),
    ("--kl", ZERO_TOO, 0.005, 0.01, "beta, weight of the KL to the start"),
    ("--lr", NUMBER, 1.5e-4, 1e-6, "learning rate of AdamW, falling linearly towards 0"),
], selfplay.SETTINGS, *forks.CHALLENGER)


def uncertainty(share, queries, whole, penalty):
    """What the Challenger is paid, [N]: max(0, 1 - 2|s - 1/2| - penalty * repetition).

    share [N]: s, of the majority's answer. queries: N texts. whole: N bools, False for a query that
    was cut, which is paid nothing. Example: s = 1/2 for all of a, a, b, c gives 1/2, 1/2, 3/4, 3/4.
    """
    times = Counter(queries)
    repeated = torch.tensor([times[query] / len(queries) for query in queries])  # [N]
    paid = 1 - 2 * (share - 0.5).abs() - penalty * repeated
    return paid.clamp(min=0) * torch.tensor(whole).float()


def majority(texts):
    """(label, share) of each group of answers: the most frequent one, and how frequent it is.

    texts: N lists of G texts. What comes to nothing has no vote. Of equally frequent ones the first
    is taken; a group without any vote has the label None and the share 0.
    """
    votes = [Counter(end for end in map(Majority.comes_to, group) if end) for group in texts]
    found = [(counts.most_common(1) or [(None, 0)])[0] for counts in votes]
    return [label for label, _ in found], torch.tensor([n for _, n in found]) / len(texts[0])


def matches(labels, texts):
    """[N, G]: 1 for each answer that comes to its query's label, else 0."""
    return torch.tensor([[float(Majority.comes_to(text) == label) for text in group]
                         for label, group in zip(labels, texts)])


def update(player, prompts, completions, reward, args):
    """One GRPO update of a player. completions: a list for each prompt; reward [prompts, group]."""
    advantage, _ = selfplay.advantages(reward, torch.zeros(1), "std")
    played = selfplay.Player(prompts, completions, None, None)
    selfplay.gradients(player, played, advantage, args.kl, args)
    forks.check(learning.take(player.optimizer))


def step(challenger, solver, args, number):
    """One turn of both. challenger, solver: selfplay.Games that differ in model and optimizer."""
    for player in (challenger, solver):
        learning.set_rate(player.optimizer, args.lr * (1 - (number - 1) / args.steps))
    paid = right = tokens = 0

    def says(player, asked, count, longest):
        return evaluate.ask(player.model, player.tokenizer, asked, count, 1.0, player.generator,
                            longest)

    def write(count):
        wrote = says(challenger, [challenger.prompt] * count, 1, args.query_tokens)
        return [ids for ids, in wrote.ids], [text for text, in wrote.texts]

    def answer(queries):
        return says(solver, queries, args.answers, args.answer_tokens)
    for _ in range(args.updates):  # 1. the Challenger learns
        ids, queries = write(args.queries)
        whole = [query[-1] in challenger.model.end_ids for query in ids]
        said = answer(queries)
        _, share = majority(said.texts)
        pay = uncertainty(share, queries, whole, args.penalty)  # [N]
        update(challenger, [challenger.prompt], [ids], pay[None], args)
        paid += pay.mean().item() / args.updates
        tokens += forks.tokens([ids], said.ids)

    ids, queries = write(args.questions)  # 2. questions and labels
    said = answer(queries)
    tokens += forks.tokens([ids], said.ids)
    labels, share = majority(said.texts)
    chosen = [i for i, s in enumerate(share.tolist()) if args.low <= s <= args.high]
    truth = referees.judged(solver.referee, queries, said.texts)  # [N, G], for the figures alone
    matching = matches(labels, said.texts)  # [N, G]
    correct = [truth[i, matching[i].argmax()].item() for i in chosen]  # is the label right?

    for _ in range(args.updates if chosen else 0):  # 3. the Solver learns
        batch = [solver.rng.choice(chosen) for _ in range(args.queries)]
        tried = answer([queries[i] for i in batch])
        reward = matches([labels[i] for i in batch], tried.texts)  # [N, G]
        update(solver, tried.prompts, tried.ids, reward, args)
        right += reward.mean().item() / args.updates
        tokens += forks.tokens(tried.ids)
    valid = referees.which_valid(solver.referee, queries)
    found = {"paid": paid, "share": share.mean().item(), "kept": len(chosen) / len(queries),
             "label_right": sum(correct) / max(1, len(correct)), "matches": right}
    return (forks.figures(truth, said.ids) | forks.valid(valid, queries) | found
            | {"tokens": tokens}, forks.games(queries, said.texts, truth))


def main(argv=None):
    """R-Zero into a run's folder, and then the scoreboard of the Solver."""
    args = forks.parse(SETTINGS, selfplay.SETTINGS, argv, "r_zero", __doc__, language.spoken_by)
    solver = selfplay.set_up(args, args.device)
    challenger = forks.twin(solver)
    with runs.open_run(args, solver.start) as run:
        print(f"R-Zero on {args.model}, seed {args.seed}, into {run.folder}")
        forks.play(run, args.steps, lambda number: step(challenger, solver, args, number))
        save(solver.model, run.folder / "model")
        save(challenger.model, run.folder / "challenger")
        selfplay.compare(solver, run, args)
        report.show_run(run.folder)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
