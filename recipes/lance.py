"""LANCE: one model makes, cleans, reviews and labels its own data, and learns from it.

    python recipes/lance.py                  two minutes on the embedded default
    python recipes/lance.py --gap 2          without preferences: no pair is so far apart
    python recipes/lance.py --model FOLDER   a chat model; no data, no reward

After "Language Models as Continuous Self-Evolving Data Engineers" (arXiv 2412.15151). The paper's
text was not at hand, but the authors' code was (github.com/Control-derek/LANCE, without the file
that sorts reviewed data; its thresholds stand in run_iter1.sh). One step:

    make     the model writes N queries, and G answers to each
    review   it grades each exchange: r_ij in 0..1, the expected grade of its judge's prompt
    clean    a query goes that is cut, a repetition, or whose mean grade lies below --clean
    label    y, an answer with r >= --good, is an example; the best and the worst answer to a
             query, y+ and y-, are a pair where r+ - r- >= --gap
    learn    L = - mean log p(y | x)                                         fine-tuning, and then
             L = mean log(1 + exp(-beta (log p(y+)/p_t(y+) - log p(y-)/p_t(y-))))      DPO (SPIN's
             loss), p_t the model after the fine-tuning

Of several good answers the example is the first that was sampled: a fair draw. The best one would
be a worse choice here: among answers that the review hardly tells apart it is a rare one.
The reviewer is the model as it is, so it drifts with the model (LSP's judge is the frozen start).
In metrics.jsonl "agreement" says how often the review prefers the right answer: one half is chance.
The authors do, and this does not: they begin with 3,000 chats of people. Of a chat with more than 7
of 10 points the model is asked for worse answers, as the rejected ones; of another one for four new
queries alike. A grade is the mean of three written verdicts, on ten points. Queries and answers
that share much (ROUGE-L above 0.7) are thrown away, and what was made joins the chats of the next
step. Their thresholds, 8 points for an example and 2 between a pair, are --good and --gap; --clean
is ours.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import selfplay
import spin
from model import save
from rewards import QualityReward
from support import console, forks, learning, record, referees, report, runs
from tiny import language

NUMBER, COUNT = console.positive(float), console.positive(int)
ZERO_TOO = console.positive(float, zero=True)
SETTINGS = forks.table([
    forks.FIGURES_ONLY,
    ("--steps", COUNT, 16, 3, "turns of making, reviewing, cleaning, labelling and learning"),
    ("--queries", COUNT, 512, 256, "N, queries that it writes in a step"),
    ("--answers", COUNT, 8, 8, "G, answers to each"),
    ("--clean", ZERO_TOO, 0.6, 0.4, "smallest mean grade of a query that stays, 0 to 1"),
    ("--good", ZERO_TOO, 0.8, 0.8, "smallest grade of an answer to learn from"),
    ("--gap", NUMBER, 0.2, 0.2, "smallest difference in grades of a pair"),
    ("--beta", NUMBER, 0.1, 0.1, "of the preferences' loss"),
    ("--epochs", COUNT, 1, 1, "over examples, and over pairs"),
    ("--batch", COUNT, 32, 32, "examples or pairs an update"),
    ("--lr", NUMBER, 1e-4, 1e-5, "learning rate of fine-tuning (AdamW)"),
    ("--lr-pairs", NUMBER, 2e-5, 1e-6, "the same of preferences; both fall linearly towards 0"),
], selfplay.SETTINGS, *forks.CHALLENGER)


def step(game, args, review, number):
    """One turn. review: (queries, answers) -> grades [N, G]. Returns (figures, games)."""
    model, tokenizer = game.model, game.tokenizer
    made = evaluate.ask(model, tokenizer, [game.prompt] * args.queries, 1, 1.0, game.generator,
                        args.query_tokens)
    queries = list(dict.fromkeys(text for (text,), (ids,) in zip(made.texts, made.ids)
                                 if ids[-1] in model.end_ids))
    forks.check_some(queries)
    said = evaluate.ask(model, tokenizer, queries, args.answers, 1.0, game.generator,
                        args.answer_tokens)
    grades = referees.judged(review, queries, said.texts)  # [N, G]
    examples, pairs = label(said, grades, args)

    fall = 1 - (number - 1) / args.steps
    learning.set_rate(game.optimizer, args.lr * fall)
    learnt = forks.learn(game.optimizer, examples, lambda batch: spin.sft_gradients(
        model, batch, args), args, game.rng)
    ref = spin.all_logprobs(model, pairs, args.micro_batch)  # [M, 2]: of p_t
    learning.set_rate(game.optimizer, args.lr_pairs * fall)
    preferred = forks.learn(game.optimizer, range(len(pairs)), lambda batch: spin.spin_gradients(
        model, [pairs[i] for i in batch], ref[batch], args.beta, args), args, game.rng)
    preferred = {name: preferred[name] for name in ("margin", "accuracy") if name in preferred}

    truth = referees.judged(game.referee, queries, said.texts)  # [N, G], for the figures alone
    found = {"quality": grades.mean().item(), "examples": len(examples), "pairs": len(pairs),
             "tokens": forks.tokens(made.ids, said.ids)}
    if (agreement := record.agreement(truth, grades)) is not None:
        found["agreement"] = agreement
    valid = referees.which_valid(game.referee, queries)
    return (forks.figures(truth, said.ids) | forks.valid(valid, queries) | preferred | learnt
            | found, forks.games(queries, said.texts, truth, grades))


def label(said, grades, args):
    """(examples to learn from, pairs of a better and a worse answer): lists of spin.Pair.

    said: N prompts and N groups of G answers; grades [N, G]. Example, one query, --clean .5,
    --good .6, --gap .1, grades .3 .7 .9: its mean .63 stays, the second answer is an example, and
    the last and the first are a pair.
    """
    examples, pairs = [], []
    for prompt, group, own in zip(said.prompts, said.ids, grades):
        if own.mean() < args.clean:
            continue
        best, worst = own.argmax().item(), own.argmin().item()
        good = [ids for ids, grade in zip(group, own.tolist()) if grade >= args.good]
        examples += [spin.Pair(prompt, ids, []) for ids in good[:1]]
        if own[best] - own[worst] >= args.gap:
            pairs.append(spin.Pair(prompt, group[best], group[worst]))
    return examples, pairs


def main(argv=None):
    """LANCE into a run's folder, and then the scoreboard."""
    args = forks.parse(SETTINGS, selfplay.SETTINGS, argv, "lance", __doc__, language.spoken_by)
    game = selfplay.set_up(args, args.device)
    review = QualityReward(game.model, game.tokenizer, args.micro_batch)
    with runs.open_run(args, game.start) as run:
        print(f"LANCE on {args.model}, seed {args.seed}, into {run.folder}")
        forks.play(run, args.steps, lambda number: step(game, args, review, number))
        save(game.model, run.folder / "model")
        selfplay.compare(game, run, args)
        report.show_run(run.folder)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
