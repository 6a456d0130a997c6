"""What is kept of a step: its figures, its games as text, and warnings when a run goes wrong.

A `step` here is what selfplay.step returns. Only its fields are read.
"""
from collections import Counter

import torch

from support import report
from support.learning import CLIP

WINDOW = 20  # steps whose mean decides whether a warning is given

# How a run looks that goes wrong: figure -> (is its mean bad?, what is wrong, what to try). What to
# try is one text, or one for each game: no advice names a flag that its game refuses.
WATCH = {
    "distinct": (lambda x: x < 0.5, "the queries repeat", {
        "lsp": "a larger --kl-challenger or a smaller --alpha-ch",
        "lsp-zero": "a larger --kl-challenger or a smaller --alpha-ch",
        "grpo": "more --data"}),
    "valid": (lambda x: x < 0.5, "most queries are no tasks any more", {
        "lsp": "a larger --quality or --kl-challenger, or a smaller --alpha-ch",
        "lsp-zero": "--game lsp, a larger --kl-challenger, or a smaller --alpha-ch",
        "grpo": "other --data"}),
    "spread": (lambda x: x < 0.1,
               "in hardly any group do the rewards differ, so they teach the Solver nothing", {
                   "lsp": "a smaller --alpha-ch, or for rewards of 0 and 1 --pay r-zero",
                   "lsp-zero": "a smaller --alpha-ch, or for rewards of 0 and 1 --pay r-zero",
                   "grpo": "easier or harder --data, or more --answers"}),
    "kl_solver": (lambda x: x > 1.0, "the Solver runs away from its start",
                  "a smaller --lr or a larger --kl"),
    "kl_challenger": (lambda x: x > 1.0, "the Challenger runs away from its start",
                      "a smaller --alpha-ch or a larger --kl-challenger"),
    "agreement": (lambda x: x < 0.4,
                  "of a right and a wrong answer the judge prefers the wrong one",
                  "a smaller --quality, or --game lsp-zero"),
    "answer_cut": (lambda x: x > 0.5, "most answers are cut at the limit",
                   "a larger --answer-tokens"),
    "query_cut": (lambda x: x > 0.5, "most queries are cut at the limit",
                  "a larger --query-tokens or a larger --kl-challenger"),
    "agreeing": (lambda x: x > 0.9,
                 "the answers to a query agree nearly always: --reward majority can only make the "
                 "model surer, be it right or wrong, and greedy accuracy may be falling",
                 "fewer steps, or a reward that knows the truth"),
    "unreadable": (lambda x: x > 0.5,
                   "in most answers --reward math finds nothing that it can read",
                   "a larger --answer-tokens, or questions that ask for a marked result"),
    "malformed": (lambda x: x > 0.5, "most verdicts of the judge have no score",
                  "--judge expected"),
}


def watch(rows, said, game):
    """New warnings, a list of sentences: what went wrong in the last WINDOW rows of metrics.jsonl.

    said: {figure: sentence} that were given before. The new ones are added to it. game: its name.
    A figure that half of the rows lack, or more, says too little, and is left alone.
    """
    found = []
    for key, (bad, problem, advice) in WATCH.items():
        values = [row[key] for row in rows if key in row]
        if len(rows) < WINDOW or len(values) <= WINDOW // 2 or key in said:
            continue
        mean = sum(values) / len(values)
        if bad(mean):
            advice = advice if isinstance(advice, str) else advice[game]
            of = f"the last {WINDOW} steps"
            if len(values) < WINDOW:
                of = f"{len(values)} of {of}"
            said[key] = (f"step {rows[-1]['step']}: {problem}: try {advice} ({key} is {mean:.2f} "
                         f"over {of})")
            found.append(said[key])
    return found


# --------------------------------------------------------------------------------------------------
# A step of LSP

def overlap(texts):
    """How alike texts are, 0 to 1: the share of three-letter pieces that two have in common.

    That is Jaccard's index, its mean over all pairs of texts.
    """
    pieces = [{text[i:i + 3] for i in range(max(1, len(text) - 2))} for text in texts]
    column = {piece: i for i, piece in enumerate(set().union(*pieces))}
    has = torch.zeros(len(texts), len(column))
    for row, own in zip(has, pieces):
        row[[column[piece] for piece in own]] = 1.0
    both, size = has @ has.T, has.sum(1)
    share = both / (size[:, None] + size - both)  # [N, N], 1 on the diagonal
    return ((share.sum() - len(texts)) / max(1, len(texts) * (len(texts) - 1))).item()


def agreement(reward, quality):
    """How often the judge prefers the right answer, of all pairs of a right and a wrong one.

    reward, quality [N, G]. Right means R > 0. Ties count half. One half is chance: the judge's
    quality then says nothing about the truth. None where there is no such pair.
    """
    pair = (reward[:, :, None] > 0) & (reward[:, None, :] <= 0)  # [N, G, G]
    prefers = ((quality[:, :, None] - quality[:, None, :]).sign() + 1) / 2
    return prefers[pair].mean().item() if pair.any() else None


def measure(step, valid):
    """A step's figures: one line of metrics.jsonl, without the step's number.

    valid: which queries have a right answer, [N] of bool, or None where the referee cannot tell.
    """
    reward, quality = step.reward, step.quality
    players = {"solver": step.solver, "challenger": step.challenger}
    row = {
        "reward": reward.mean().item(),
        "quality": None if quality is None else quality.mean().item(),
        "agreement": None if quality is None or valid is None else agreement(reward, quality),
        "valid": None if valid is None else sum(valid) / len(valid),
        "distinct": len(set(step.queries)) / len(step.queries),
        "similarity": overlap(step.queries),
        # The share of groups whose rewards differ.
        "spread": (reward.std(1, correction=0) > 0).float().mean().item(),
        "tokens": sum(token_count(player) for player in players.values() if player),
        "gradient_norm": step.norm,
        "clipped": float(step.norm > CLIP),  # was the gradient scaled down?
    }
    for name, text in (("solver", "answer"), ("challenger", "query")):
        player = players[name]
        if player:
            row |= {f"{term}_{name}": value for term, value in step.losses[name].items()}
            # Nats a token, as estimated from what was sampled: the mean of -log pi.
            row[f"entropy_{name}"] = -player.logprobs.mean().item()
            row[f"{text}_tokens"] = token_count(player) / len(player.finished)
            row[f"{text}_cut"] = 1 - sum(player.finished) / len(player.finished)
    return {key: value for key, value in row.items() if value is not None}


def token_count(player):
    """How many tokens a player has sampled."""
    return sum(len(ids) for group in player.completions for ids in group)


def game_records(step, valid):
    """A step's games for games.jsonl, rounded. Equal answers to a query are written once."""
    N = len(step.queries)
    quality = [None] * N if step.quality is None else step.quality.tolist()
    a_ch = [None] * N if step.a_ch is None else step.a_ch.tolist()
    records = []
    for i, (query, answers) in enumerate(zip(step.queries, step.answers)):
        rewards = [round(x, 3) for x in step.reward[i].tolist()]
        grades = [round(x, 3) for x in quality[i]] if quality[i] else [None] * len(answers)
        different = Counter(zip(answers, rewards, grades))
        records.append({
            "query": query,
            "valid": valid[i] if valid else None,
            "challenger_advantage": None if a_ch[i] is None else round(a_ch[i], 3),
            "answers": [{"answer": text, "times": times, "reward": r, "quality": q}
                        for (text, r, q), times in different.items()]})
    return records


def last_queries(folder, count):
    """The last different queries of a run, `count` at the most."""
    lines, _ = report.read_games(folder)
    found = [game["query"] for line in lines for game in line["games"] if game["query"].strip()]
    return list(dict.fromkeys(reversed(found)))[:count]


def game_text(number, step, valid):
    """The first game of a step as a person would want to read it. number: the step's."""
    mark = "   (no such task: it has no right answer)" if valid and not valid[0] else ""
    lines = [f"step {number}  query: {step.queries[0]}{mark}"]
    G = len(step.answers[0])
    quality = [None] * G if step.quality is None else step.quality[0].tolist()
    equal = Counter()
    for text, r, q, a in zip(step.answers[0], step.reward[0].tolist(), quality,
                             step.a_sol[0].tolist()):
        judged = "" if q is None else f"  quality {q:.2f}"
        equal[text, f"reward {r:.2f}{judged}", round(a, 2)] += 1
    for (text, judged, a), times in sorted(equal.items(), key=lambda item: -item[0][2]):
        shown = (text or "(nothing)") + (f" x{times}" if times > 1 else "")
        lines.append(f"    {shown:<32} {judged}  advantage {a:+.2f}")
    if step.a_ch is not None:
        lines.append(f"    the Challenger's advantage for this query: {step.a_ch[0].item():+.2f}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# An iteration of SPIN

def identical_line(pairs, lam, constant):
    """How many of an iteration's new pairs teach nothing, in one line.

    constant: the loss of a pair whose two answers are the same.
    """
    share = sum(p.answer == p.rival for p in pairs) / len(pairs)
    return (f"in {100 * share:.1f} % of the new pairs the opponent says what people say: they "
            f"teach nothing (loss {constant:.3f}, whatever the player); lambda {lam:g}")


def change_line(folder, iteration):
    """What an iteration changed: figures of its first update, and the mean of its last tenth."""
    figures = report.read_metrics(folder)
    own = [i for i, t in enumerate(figures["iteration"]) if t == iteration]
    names = {"loss": "loss of all pairs", "margin": "of differing ones: margin",
             "accuracy": "margin above 0",
             "logprob_answer": "log p of people's answers", "logprob_rival": "of the opponent's"}
    parts = []
    for key, name in names.items():
        if key in figures and own:
            curve = [figures[key][i] for i in own]
            parts.append(f"{name} {curve[0]:.3f} -> {report.tenth(curve, last=True):.3f}")
    return "  ".join(parts)


def pair_records(iteration, prompts, pairs, decode):
    """An iteration's own pairs for games.jsonl. prompts: their texts. decode: ids -> text."""
    return [{"iteration": iteration, "prompt": prompt, "answer": decode(pair.answer),
             "rival": decode(pair.rival)} for prompt, pair in zip(prompts, pairs)]


def pair_text(prompt, pair, lp, ref, margin, decode):
    """One pair as a person would want to read it.

    lp, ref [2]: log-probabilities of answer and rival under player and opponent.
    decode: ids -> text.
    """
    lines = [f"    {' '.join(prompt.split())[:100]}"]
    for who, ids, x, r in (("people  ", pair.answer, lp[0], ref[0]),
                           ("opponent", pair.rival, lp[1], ref[1])):
        text = decode(ids).replace("\n", " ")[:32] or "(nothing)"
        lines.append(f"      {who}  {text:<32}  log p_t {r:7.2f}   log p {x:7.2f}   "
                     f"difference {x - r:+6.2f}")
    return "\n".join([*lines, f"      margin {margin:+.2f}"])
