"""ReverseGen: a proposer learns which queries a target fails on; the target then learns from them.

    python recipes/reverse_gen.py                   two minutes on the embedded default
    python recipes/reverse_gen.py --beta 0          baseline: the proposer does not learn
    python recipes/reverse_gen.py --model FOLDER --reward REWARD    label by the reward

After "Forewarned is Forearmed: Leveraging LLMs for Data Synthesis through Failure-Inducing
Exploration" (arXiv 2410.16736). Both are copies of one start. All steps but the last:

    1. The proposer writes N queries; the target, frozen, gives G answers to each.
    2. q fails where V(q) = mean_j R(q, a_ij) < 1/2, and is solved elsewhere.
    3. Pairs (q+ failing, q- solved), shuffled independently and put together: DPO on the proposer,
           L = mean log(1 + exp(-beta (log p(q+)/p_t(q+) - log p(q-)/p_t(q-))))
       with p_t the proposer as it was when it wrote them.

The last step: the proposer writes --proposals queries, and the target is fine-tuned on them.
The paper's labels come from a stronger model. Here --labels solver lets the exact solver of the
embedded language give them, and --labels own takes what the reward calls right among the target's
own answers. A query counts once. Where the reward knows which queries have a right answer
(referees.which_valid), the others are left out: else they would all count as failures.
The paper does, and this does not: a warm-up that teaches the proposer to write a fourth query after
three examples (the embedded default writes queries already); safety and honesty as failures;
filters by meaning. The check of memory counts one trained model, not
two.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import selfplay
import spin
from model import save
from support import console, forks, learning, referees, report, runs
from tiny import language

NUMBER, COUNT = console.positive(float), console.positive(int)
ZERO_TOO = console.positive(float, zero=True)
SETTINGS = forks.table([
    ("--steps", COUNT, 9, 4, "the proposer's steps, and the target's one at the end"),
    ("--queries", COUNT, 512, 256, "N, queries of a step"),
    ("--answers", COUNT, 8, 10, "G, answers to each"),
    ("--proposals", COUNT, 16384, 2048, "queries that the target learns from at the end"),
    ("--labels", ("solver", "own"), "solver", "own",
     "who labels them: the exact solver of the embedded language, or the target: own answers that "
     "the reward calls right"),
    ("--beta", ZERO_TOO, 0.1, 0.1, "of the proposer's DPO; 0: it does not learn"),
    ("--lr-proposer", NUMBER, 3e-5, 5e-6, "its learning rate (AdamW)"),
    ("--lr", NUMBER, 1.5e-4, 2e-5, "the target's"),
    ("--epochs", COUNT, 1, 1, "over pairs, and over labelled queries"),
    ("--batch", COUNT, 32, 32, "examples an update"),
], selfplay.SETTINGS, *forks.CHALLENGER)


def propose(proposer, args, count):
    """{query: its ids} of `count` samples: those that were finished and can have an answer."""
    wrote = evaluate.ask(proposer.model, proposer.tokenizer, [proposer.prompt] * count, 1, 1.0,
                         proposer.generator, args.query_tokens)
    texts = [text for text, in wrote.texts]
    fine = referees.which_valid(proposer.referee, texts)
    proposed = {text: ids for text, (ids,), ok in zip(texts, wrote.ids, fine or [True] * count)
                if ok and ids[-1] in proposer.model.end_ids}
    forks.check_some(proposed)
    return proposed, forks.valid(fine, texts) | {"tokens": forks.tokens(wrote.ids)}


def target_answers(game, args, queries):
    """(what the target says to queries, R [N, G])."""
    said = evaluate.ask(game.model, game.tokenizer, queries, args.answers, 1.0, game.generator,
                        args.answer_tokens)
    return said, referees.judged(game.referee, queries, said.texts)


def preferences(prompt, proposed, value, rng):
    """Pairs (failing, solved) of proposed {query: ids}, as spin.Pairs. value [N]: V of each."""
    failing = [ids for ids, v in zip(proposed.values(), value.tolist()) if v < 0.5]
    solved = [ids for ids, v in zip(proposed.values(), value.tolist()) if v >= 0.5]
    rng.shuffle(failing)
    rng.shuffle(solved)
    return [spin.Pair(prompt, *both) for both in zip(failing, solved)]


def proposer_learns(game, proposer, args):
    """Steps 1 to 3. Returns (figures, games)."""
    proposed, found = propose(proposer, args, args.queries)
    queries = [*proposed]
    said, reward = target_answers(game, args, queries)
    value = reward.mean(1)  # [N]
    pairs = preferences(game.prompt, proposed, value, game.rng) if args.beta else []
    ref = spin.all_logprobs(proposer.model, pairs, args.micro_batch)  # [M, 2]: of p_t
    learnt = forks.learn(proposer.optimizer, range(len(pairs)), lambda batch: spin.spin_gradients(
        proposer.model, [pairs[i] for i in batch], ref[batch], args.beta, args), args, game.rng)
    found["tokens"] += forks.tokens(said.ids)
    found["failing"] = (value < 0.5).float().mean().item()
    return (forks.figures(reward, said.ids) | found | learnt,
            forks.games(queries, said.texts, reward))


def target_learns(game, proposer, args):
    """The last step. Returns (figures, games)."""
    proposed, found = propose(proposer, args, args.proposals)
    queries, answers = [*proposed], [language.solve(query) for query in proposed]
    if args.labels == "own":
        said, reward = target_answers(game, args, queries)
        found["tokens"] += forks.tokens(said.ids)
        best = reward.max(1)
        answers = [group[j] if right > 0.5 else None for group, j, right in zip(
            said.texts, best.indices.tolist(), best.values.tolist())]
    labelled = {query: answer for query, answer in zip(queries, answers) if answer is not None}
    pairs = []
    for query, answer in labelled.items():
        asked = [{"role": "user", "content": query}]
        reply = game.tokenizer.reply(asked, answer, game.model.end_ids)
        pairs.append(spin.Pair(game.tokenizer.chat(asked), reply, []))
    learnt = forks.learn(game.optimizer, pairs, lambda batch: spin.sft_gradients(
        game.model, batch, args), args, game.rng)
    ones = torch.ones(len(pairs), 1)
    return (found | learnt | {"kept": len(pairs)},
            forks.games(labelled, [[answer] for answer in labelled.values()], ones))


def main(argv=None):
    """ReverseGen into a run's folder, and then the scoreboard of the target."""
    args = forks.parse(SETTINGS, selfplay.SETTINGS, argv, "reverse_gen", __doc__,
                       language.spoken_by)
    if args.labels == "solver" and not language.spoken_by(args.model):
        raise console.UserError("--labels solver knows the embedded language alone: --labels own")
    game = selfplay.set_up(args, args.device)
    proposer = forks.twin(game)
    learning.set_rate(proposer.optimizer, args.lr_proposer)
    with runs.open_run(args, game.start) as run:
        print(f"ReverseGen on {args.model}, seed {args.seed}, into {run.folder}")
        forks.play(run, args.steps, lambda number: (
            proposer_learns(game, proposer, args) if number < args.steps
            else target_learns(game, proposer, args)))
        save(game.model, run.folder / "model")
        save(proposer.model, run.folder / "proposer")
        selfplay.compare(game, run, args)
        report.show_run(run.folder)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
