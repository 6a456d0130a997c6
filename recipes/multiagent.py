"""Multiagent finetuning: generators and critics debate, and each learns from its own part.

    python recipes/multiagent.py              three minutes on the embedded default
    python recipes/multiagent.py --agents 1   one generator and one critic: nobody to differ from
    python recipes/multiagent.py --model FOLDER --data gsm8k.jsonl --reward math

After "Multiagent Finetuning: Self Improvement with Diverse Reasoning Chains" (arXiv 2501.05707).
A generators and A critics, all from one start, each with weights of its own. Nobody is told what is
right. One step:

    1. Generator a answers each query alone, G times; y_a is its first answer.
    2. Critic a reads the query and what all generators said, its own generator last, and answers.
    3. y^ is the most frequent answer of the whole debate.
    4. Generator a learns its own answers that came to y^.
    5. Critic a learns to end at y^: from debates in which its generator was wrong (D-), and with
       probability 1/2 from those in which it was right (D+).

All learn by fine-tuning, L = - mean log p(y | x). model/ in the run's folder is generator 1, and
the scoreboard asks it alone. metrics.jsonl has what a debate adds: "alone", "critic" and "vote",
the shares of first answers, of critics' answers and of y^ that are right, and "diversity", the
share of pairs of generators whose first answers differ. --agents 1 with three times the --answers
is the paper's baseline of a single agent.
The paper does, and this does not: it takes y^ from the last round alone, and a critic learns what
it said itself. The embedded default cannot read a debate at first (2 % of its critics' answers are
right), so the first answers vote, too, and a critic that did not come to y^ learns an answer of a
generator that did. There is one round of criticism; the paper summarises long debates. The check of
memory counts one trained model, not 2 A of them.
"""
import itertools
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import selfplay
import spin
from model import save
from rewards import Majority
from support import console, data, forks, learning, referees, report, runs
from tiny import language

NUMBER, COUNT = console.positive(float), console.positive(int)
SETTINGS = forks.table([
    forks.FIGURES_ONLY,
    ("--steps", COUNT, 10, 3, "debates, and learning from them"),
    ("--agents", COUNT, 3, 3, "A, generators and as many critics"),
    ("--queries", COUNT, 512, 256, "queries a step"),
    ("--answers", COUNT, 4, 1, "G, answers of each generator to a query; all of them vote"),
    ("--epochs", COUNT, 1, 1, "over what each keeps"),
    ("--batch", COUNT, 32, 32, "examples an update"),
    ("--lr", NUMBER, 1e-4, 1e-5, "learning rate of AdamW, falling linearly towards 0"),
], selfplay.SETTINGS, *forks.DATA)

# The debate as a user turn. The embedded language has its own words for it.
DEBATE = ("{query}\n\nThese are answers of others and, last, your own:\n\n{answers}\n\n"
          "Use them to give an answer of yours.")
TINY_DEBATE = "Query: {query}\nAnswer: {answers}"


def debate(row, firsts, own, embedded):
    """The Row that critic `own` answers: row's query and the generators' first answers, its last.

    firsts: A texts.
    """
    texts = [text for a, text in enumerate(firsts) if a != own] + [firsts[own]]
    form, between = (TINY_DEBATE, "\nAnswer: ") if embedded else (DEBATE, "\n\n")
    text = form.format(query=row.query, answers=between.join(texts))
    return row._replace(messages=[*row.messages[:-1], {"role": "user", "content": text}])


def vote(texts):
    """What most of the texts come to (rewards.Majority); None where none comes to anything."""
    votes = Counter(end for end in map(Majority.comes_to, texts) if end)
    return votes.most_common(1)[0][0] if votes else None


def generator_data(said, ends):
    """What a generator learns, as spin.Pairs: of its own answers one that came to y^.

    said: N prompts, N groups of G answers. ends: N times y^, or None.
    """
    return [spin.Pair(said.prompts[i], said.ids[i][j], []) for i, end in enumerate(ends)
            if (j := index_of(end, said.texts[i])) is not None]


def critic_data(a, first, final, ends, rng):
    """What critic a learns, as spin.Pairs: how a debate ends at y^.

    first: what the A generators said; final: what the critic said. A debate in which its generator
    was wrong at first is taken (D-), one in which that was right with probability 1/2 (D+).
    """
    found = []
    for i, end in enumerate(ends):
        if Majority.comes_to(first[a].texts[i][0]) == end and rng.random() < 0.5:
            continue
        for said in (final, first[a], *first):  # its own words where they will do
            if (j := index_of(end, said.texts[i])) is not None:
                found.append(spin.Pair(final.prompts[i], said.ids[i][j], []))
                break
    return found


def index_of(end, texts):
    """Which of the texts is the first to come to `end`; None where none does."""
    return next((j for j, text in enumerate(texts)
                 if end is not None and Majority.comes_to(text) == end), None)


def diversity(firsts):
    """The share of pairs of generators that answer differently. firsts: N lists of A texts."""
    pairs = [a != b for texts in firsts for a, b in itertools.combinations(texts, 2)]
    return sum(pairs) / max(1, len(pairs))


def step(generators, critics, args, number):
    """One debate, and what all learn from it. Both are A selfplay.Games. Returns figures, games."""
    game, embedded = generators[0], language.spoken_by(generators[0].tokenizer)
    rows = [game.ask() for _ in range(args.queries)]

    def says(agent, asked, count):
        return evaluate.ask(agent.model, agent.tokenizer, asked, count, 1.0, agent.generator,
                            args.answer_tokens)
    first = [says(generator, rows, args.answers) for generator in generators]  # 1.
    firsts = [[said.texts[i][0] for said in first] for i in range(len(rows))]  # [N][A]
    final = [says(critic, [debate(*both, a, embedded) for both in zip(rows, firsts)], 1)  # 2.
             for a, critic in enumerate(critics)]
    ends = [vote([text for said in first + final for text in said.texts[i]])  # 3.
            for i in range(len(rows))]

    lessons = [generator_data(said, ends) for said in first]  # 4.
    lessons += [critic_data(a, first, said, ends, game.rng) for a, said in enumerate(final)]  # 5.
    learnt = []
    for agent, pairs in zip(generators + critics, lessons):
        learning.set_rate(agent.optimizer, args.lr * (1 - (number - 1) / args.steps))
        learnt.append(forks.learn(agent.optimizer, pairs, lambda batch: spin.sft_gradients(
            agent.model, batch, args), args, game.rng))

    def right(texts):  # for the figures alone: [N, number of texts a query]
        return referees.judged(game.referee, [row.query for row in rows], texts, data.columns(rows))
    last = [[said.texts[i][0] for said in final] for i in range(len(rows))]  # [N][A]
    reward = right(first[0].texts)
    found = {"alone": right(firsts).mean().item(), "critic": right(last).mean().item(),
             "vote": right([[end or ""] for end in ends]).mean().item(),
             "diversity": diversity(firsts), "kept": len(lessons[0]),
             "tokens": forks.tokens(*(said.ids for said in first + final))}
    return (forks.figures(reward, first[0].ids) | learnt[0] | found,
            forks.games([row.query for row in rows], first[0].texts, reward))


def main(argv=None):
    """Debates into a run's folder, and then the scoreboard of generator 1."""
    args = forks.parse(SETTINGS, selfplay.SETTINGS, argv, "multiagent", __doc__,
                       language.spoken_by)
    game = selfplay.set_up(args, args.device)
    generators = [game, *(forks.twin(game) for _ in range(args.agents - 1))]
    critics = [forks.twin(game) for _ in range(args.agents)]
    with runs.open_run(args, game.start) as run:
        print(f"multiagent finetuning of {args.model}, seed {args.seed}, into {run.folder}")
        forks.play(run, args.steps, lambda number: step(generators, critics, args, number))
        save(game.model, run.folder / "model")
        for a, (generator, critic) in enumerate(zip(generators, critics), 1):
            save(generator.model, run.folder / f"generator-{a}")
            save(critic.model, run.folder / f"critic-{a}")
        selfplay.compare(game, run, args)
        report.show_run(run.folder)


if __name__ == "__main__":
    sys.exit(console.run_command(main))
