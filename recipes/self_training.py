"""Self-training: answer, keep what is right, learn from it, repeat (expert iteration).

    python recipes/self_training.py                      a minute on the embedded default
    python recipes/self_training.py --restart            each time anew from the start
    python recipes/self_training.py --learn dpo          learn from right and wrong ones, as pairs
    python recipes/self_training.py --model FOLDER --data gsm8k.jsonl --reward math

After "Self-training Language Models for Arithmetic Reasoning" (arXiv 2407.08400), and its family:
STaR (2203.14465) and ReST-EM (2312.06585). One step, in ReST-EM's words:

    E   y_ij ~ p(. | x_i),  j = 1..G       G answers of the model as it is
    M   L = - E[ R(x, y) log p(y | x) ]    fine-tuning on those that are right, R = 1

--learn dpo is the preference variant of 2407.08400: a right and a wrong answer y+, y- to the same
x, and SPIN's loss with a reference that never changes, which is DPO's (2305.18290):

    L = mean log(1 + exp(-beta (log p(y+|x)/p_ref(y+|x) - log p(y-|x)/p_ref(y-|x))))

One step with many --queries is offline self-training; many steps are online.
The papers do, and this does not: the calculator inside answers, choosing problems by how often
they were solved, and a buffer of old answers (2407.08400); a second try with the answer as a hint
(STaR). Where all samples of a group are right, 2407.08400 over-samples; here each different right
answer counts once, up to --keep.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import selfplay
import spin
from model import save
from support import console, data, forks, learning, referees, report, runs
from tiny import language

NUMBER, COUNT = console.positive(float), console.positive(int)
SETTINGS = forks.table([
    ("--steps", COUNT, 10, 10, "how often the model answers, and learns from its answers"),
    ("--queries", COUNT, 512, 256, "queries a step"),
    ("--answers", COUNT, 16, 8, "G, answers to each"),
    ("--keep", COUNT, 4, 4, "different right answers to a query (dpo: pairs) at the most"),
    ("--learn", ("sft", "dpo"), "sft", "sft", "fine-tuning on right answers, or dpo on pairs"),
    ("--restart", bool, False, False,
     "learn from the start again in each step, as STaR and ReST-EM do"),
    ("--epochs", COUNT, 1, 1, "over what was kept"),
    ("--batch", COUNT, 32, 32, "examples an update"),
    ("--beta", NUMBER, 0.1, 0.1, "of dpo: how closely the model is tied to the start"),
    ("--lr", NUMBER, 1.5e-4, 2e-5, "learning rate of AdamW, falling linearly towards 0"),
], selfplay.SETTINGS, *forks.DATA)


def step(game, args, number):
    """One step: answer, keep, learn. Returns (figures, games)."""
    rows = [game.ask() for _ in range(args.queries)]
    said = evaluate.ask(game.model, game.tokenizer, rows, args.answers, 1.0, game.generator,
                        args.answer_tokens)
    queries = [row.query for row in rows]
    reward = referees.judged(game.referee, queries, said.texts, data.columns(rows))  # R [N, G]
    right, pairs = kept(said, reward, game.model.end_ids, args.keep)
    optimizer = game.optimizer
    if args.restart:
        game.model.load_state_dict(game.reference.state_dict())
        optimizer = forks.adamw(game.model)
    learning.set_rate(optimizer, args.lr * (1 - (number - 1) / args.steps))
    if args.learn == "sft":
        learnt = forks.learn(optimizer, right, lambda batch: spin.sft_gradients(
            game.model, batch, args), args, game.rng)
    else:
        ref = spin.all_logprobs(game.reference, pairs, args.micro_batch)  # [M, 2]
        learnt = forks.learn(optimizer, range(len(pairs)), lambda batch: spin.spin_gradients(
            game.model, [pairs[i] for i in batch], ref[batch], args.beta, args), args, game.rng)
    found = {"kept": len(right if args.learn == "sft" else pairs), "tokens": forks.tokens(said.ids)}
    return (forks.figures(reward, said.ids) | learnt | found,
            forks.games(queries, said.texts, reward))


def kept(said, reward, end_ids, most):
    """(right answers, pairs of a right and a wrong one), lists of spin.Pair. reward [N, G].

    Of each query: its different finished answers, `most` right ones and `most` pairs at the most.
    Right is a reward above 1/2. The rival of a right answer alone is empty: sft never reads it.
    """
    right, pairs = [], []
    for prompt, group, rewards in zip(said.prompts, said.ids, reward.tolist()):
        paid = {tuple(ids): r for ids, r in zip(group, rewards) if ids[-1] in end_ids}
        good = [[*ids] for ids, r in paid.items() if r > 0.5]
        bad = [[*ids] for ids, r in paid.items() if r <= 0.5]
        right += [spin.Pair(prompt, ids, []) for ids in good[:most]]
        both = itertools.islice(itertools.product(good, bad), most)
        pairs += [spin.Pair(prompt, *two) for two in both]
    return right, pairs


def main(argv=None):
    """Self-training into a run's folder, and then the scoreboard."""
    args = forks.parse(SETTINGS, selfplay.SETTINGS, argv, "self_training", __doc__,
                       language.spoken_by)
    game = selfplay.set_up(args, args.device)
    with runs.open_run(args, game.start) as run:
        print(f"self-training on {args.model}, seed {args.seed}, into {run.folder}")
        forks.play(run, args.steps, lambda number: step(game, args, number))
        save(game.model, run.folder / "model")
        selfplay.compare(game, run, args)
        report.show_run(run.folder)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
