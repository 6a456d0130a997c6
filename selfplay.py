"""Language Self-Play (LSP, arXiv 2509.07414): one Llama writes queries, answers them, and learns from both.

    python selfplay.py --steps 500                 LSP on the embedded default
    python selfplay.py --game lsp-zero             without the quality self-reward
    python selfplay.py --game grpo                 the baseline: the same loss on instructions drawn from data

One step, with N queries q_i of the Challenger and G answers a_ij of the Solver to each:

    V(q_i)          = mean_j R(q_i, a_ij)                                       how well the query was answered
    A_Sol(q_i,a_ij) = R(q_i, a_ij) - V(q_i)                                     better than the group?
    A_Ch(q_i)       = mean_k V(q_k) - V(q_i)                                    harder than the other queries?
    L_Sol = -1/(NG) sum_ij [ pi/sg(pi) A_Sol ] + beta KL(pi_Sol, pi_Ref)
    L_Ch  = -1/N    sum_i  [ pi/sg(pi) A_Ch  ] + beta KL(pi_Ch, pi_Ref)
    L     = L_Sol + alpha_Ch L_Ch

LSP adds the judge's quality R_Q to every R of the Solver and its mean V_Q to the Challenger's pay, before the centring.
One gradient step a batch, so the ratio pi/sg(pi) is 1 and only its gradient counts.

What the paper leaves open, and what stands here: G 16; alpha_Ch 0.005 (more, and the Challenger runs ahead to what nobody
can answer); advantages centred, not divided by their deviation; log-probabilities summed over tokens; temperature 1 for
both; AdamW, learning rate falling to 0; a stronger KL for the Challenger. `-h` says how to change each.
"""
import argparse
import copy
import json
import math
import os
import random
import sys
import time
from collections import Counter
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

import evaluate
from model import (DTYPES, Crew, Llama, Tokenizer, UserError, check_memory, clip, fingerprint, generate, groups, join, leave, load, logprobs, memory_plan,
                   number, offload, optimizer_for, pack, parameter_count, read_config, resident, run_command, save, set_rate, shard)
from rewards import QualityReward, WrittenQuality, judged, load_referee, names_model
from tiny import language

# The Challenger's prompt for a model that does not speak the embedded language; both variables are optional (LSP section 2.2).
CHALLENGER_PROMPT = """Write one input that puts another assistant to the test.
{task}{template}Write exactly one valid input{of_task}. It may be easy, hard or noisy, whatever tests the assistant best. \
Write nothing else: no answer, no hint, no comment. Stop as soon as the input is complete."""

# What the Challenger is paid for a query, by V [N], its mean reward: p, the share of right answers, if rewards are 0 or 1.
# All but LSP's pay least for a query that nobody answers: it teaches nothing.
PAY = {
    "minimax": lambda p: -p,  # LSP, 2509.07414: as hard as possible
    "r-zero": lambda p: 1 - 2 * (p - 0.5).abs(),  # R-Zero, 2508.05004, without its penalty for repetition
    "absolute-zero": lambda p: torch.where((p == 0) | (p == 1), 0.0, 1 - p),  # Absolute Zero, 2505.03335
    "sqlm": lambda p: ((p > 0) & (p < 1)).float(),  # SQLM, 2508.03682
    "spice": lambda p: torch.exp(-((p * (1 - p) - 0.25) ** 2) / (2 * 0.01)),  # SPICE, 2510.24684
}

# How a completion's token terms are weighted, by its length T [M], before the mean over completions.
AGGREGATE = {
    "sum": lambda T: torch.ones_like(T),  # the paper's: a text's log-probability is the sum over its tokens
    "mean": lambda T: 1 / T,  # GRPO's: long wrong answers are punished less for each token
    "token": lambda T: (len(T) / T.sum()).expand_as(T),  # DAPO's: every token of the batch counts the same
}

# The KL term of a token, from d = log pi_Ref - log pi.
KL = {
    "k3": lambda d: d.expm1() - d,  # exp(d) - d - 1, without its rounding near 0: never negative, and its gradient pulls pi towards pi_Ref
    "literal": lambda d: -d,  # as the paper prints it: on-policy, its expected gradient is 0; it only adds noise
}


# Defaults for a model that does not speak the embedded language. The paper states queries, lr (1e-6 for GRPO), kl and at least
# so many steps; the rest is ours.
REAL = {"queries": 8, "answers": 8, "lr": 3e-6, "kl": 0.05, "kl_challenger": 0.05, "steps": 1500, "alpha_ch": 0.1, "aggregate": "token",
        "query_tokens": 256, "answer_tokens": 256, "micro_batch": 4096}


class Game(NamedTuple):
    """What a run is played with: `set_up` makes it from the settings."""
    model: Llama  # both players
    reference: Llama  # the starting model, frozen: KL anchor, judge, and opponent at the end
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # all sampling
    rng: random.Random  # which instructions of the data
    prompt: list  # the Challenger's, ids; None in GRPO
    draw: Callable  # () -> a conversation from the data, in GRPO
    referee: Callable  # (queries, answers) -> R
    judge: Callable  # (queries, answers) -> R_Q, or None
    start: int  # fingerprint of the starting model and the data
    crew: Crew  # the processes that play together


class Player(NamedTuple):
    """One player's part in a step: what it was given, what it sampled, and how well that went."""
    prompts: list  # lists of ids
    completions: list  # a list of lists of ids for each prompt
    finished: list  # bool for each completion
    advantage: torch.Tensor = None  # [M], M completions in order
    entropy: float = None  # nats a token, as estimated from what was sampled: the mean of -log pi


# ---------------------------------------------------------------------------------------------------------------------
# play -> score -> update

def challenger_prompt(tokenizer, task=None, template=None):
    """Ids of the Challenger's prompt: the embedded language's own, or LSP's with its two variables, a task and a template."""
    text = language.CHALLENGER_PROMPT if language.spoken_by(tokenizer) else CHALLENGER_PROMPT.format(
        task=f"Task: {task}\n" if task else "", template=f"Template, every placeholder of which you fill in: {template}\n" if template else "",
        of_task=" for this task" if task else "")
    return tokenizer.chat([{"role": "user", "content": text}])


def play(model, tokenizer, prompt, draw, args, generator, crew=Crew()):
    """Both players' moves: (queries, answers, challenger or None, solver). One prompt for the Challenger, N for the Solver.

    prompt: the Challenger's ids; or None, for GRPO: then each query is the last message of a conversation that draw() gives.
    crew: of several processes, each plays its share of the N queries.
    """
    entropy = lambda out: -torch.cat(out.logprobs).mean().item()
    challenger = None
    with resident(model):
        if prompt is None:
            conversations = crew.share([draw() for _ in range(args.queries)])  # all draw alike
            queries = [messages[-1]["content"] for messages in conversations]
        else:
            out = generate(model, [prompt], args.queries // crew.size, args.query_tokens, args.temperature, generator)
            challenger = Player([prompt], [out.ids], out.finished, entropy=entropy(out))
            queries = [tokenizer.decode(ids) for ids in out.ids]
            # The query goes in as plain text of a user turn: nothing the Challenger wrote can become a special token.
            conversations = [[{"role": "user", "content": q}] for q in queries]
        prompts = [tokenizer.chat(messages) for messages in conversations]
        out = generate(model, prompts, args.answers, args.answer_tokens, args.temperature, generator)
    answers = groups([tokenizer.decode(ids) for ids in out.ids], args.answers)
    return queries, answers, challenger, Player(prompts, groups(out.ids, args.answers), out.finished, entropy=entropy(out))


def advantages(reward, quality, pay, normalise="centre"):
    """(A_Sol [N, G], A_Ch [N]) from rewards R [N, G] and qualities R_Q [N, G] (already weighted; 0 for LSP-Zero).

    pay: one of PAY's functions. LSP section 2: both players' sums are formed first, then centred; A_Sol over each group,
    A_Ch over the batch. normalise "std" divides by the deviation, as GRPO does: then, where all answers are wrong, the
    judge's small noise is the whole signal.
    """
    solver = reward + quality  # R + R_Q
    challenger = pay(reward.mean(1)) + quality.mean(1)  # -V + V_Q for LSP
    a_sol = solver - solver.mean(1, keepdim=True)
    a_ch = challenger - challenger.mean()
    if normalise == "std":
        a_sol = a_sol / (solver.std(1, keepdim=True, correction=0) + 1e-4)
        a_ch = a_ch / (challenger.std(correction=0) + 1e-4)
    return a_sol, a_ch


def player_loss(lp, ref, owner, advantage, count, weight, beta, kl="k3"):
    """L_Sol or L_Ch over the completions of one micro-batch: (loss, sum of the tokens' KL terms). LSP section 2.

    lp, ref: log-probabilities [n] under policy and reference. owner [n]: whose token. For each of the player's U different
    completions, in this micro-batch or not: advantage [U], summed over its count [U] copies, and weight [U] (AGGREGATE).
    The mean is over all copies of all completions, so the micro-batches' losses add up to the whole.
    """
    U = len(advantage)
    total = torch.zeros(U, device=lp.device).index_add(0, owner, lp)  # log pi(text) = sum over its tokens
    ratio = (total - total.detach()).exp()  # pi / sg(pi): 1, with the gradient of log pi
    term = KL[kl](ref - lp)  # [n]
    penalty = torch.zeros(U, device=lp.device).index_add(0, owner, term)
    here = owner.unique()  # the others' tokens are in other micro-batches
    loss = (weight * (beta * count * penalty - ratio * advantage))[here].sum() / count.sum()
    return loss, (count * penalty)[here].detach().sum()


def score(queries, answers, referee, judge, args, crew=Crew()):
    """(R [N, G], weighted R_Q [N, G], A_Sol [N, G], A_Ch [N]) of a step's texts. judge None: R_Q is 0 (LSP-Zero).

    crew: of several processes, each scores its share, and the Challenger's mean is taken over all N.
    """
    reward = judged(referee, queries, answers)
    quality = judged(judge, queries, answers) * args.quality if judge else torch.zeros_like(reward)
    a_sol, a_ch = advantages(torch.cat(crew.all(reward)), torch.cat(crew.all(quality)), PAY[args.pay], args.advantage)
    return reward, quality, crew.share(a_sol), crew.share(a_ch)


def sides(solver, challenger, a_sol, a_ch, args):
    """Who is trained on what: {name: (Player with its advantages, weight of its loss, beta)}. GRPO has no Challenger."""
    players = {"solver": (solver._replace(advantage=a_sol.flatten()), 1.0, args.kl)}
    if challenger:
        players["challenger"] = (challenger._replace(advantage=a_ch), args.alpha_ch, args.kl_challenger)
    return players


def gradients(model, reference, players, args, crew=Crew()):
    """Gradients of L_Sol + alpha_Ch L_Ch, added to what there is: {name: (loss, KL a token)}.

    players: what `sides` returns. Answers that a group gave several times are computed once, with their advantages summed:
    the same loss and gradient for less work. A completion lies in one micro-batch, so the split changes nothing.
    crew: of several processes, each computes its share, equal in number; the gradients are averaged on their way (shard).
    """
    device, report = model.embed.weight.device, {}
    for name, (player, alpha, beta) in players.items():
        different = [list(dict.fromkeys(map(tuple, group))) for group in player.completions]  # each group's, in order
        number = {(i, ids): u for u, (i, ids) in enumerate((i, ids) for i, group in enumerate(different) for ids in group)}
        which = torch.tensor([number[i, tuple(ids)] for i, group in enumerate(player.completions) for ids in group], device=device)  # [M]
        lengths = torch.tensor([float(len(ids)) for group in player.completions for ids in group], device=device)  # [M]
        fold = lambda values: torch.zeros(len(number), device=device).index_add(0, which, values)  # [M] -> [U]
        count, advantage = fold(torch.ones_like(lengths)), fold(player.advantage.to(device))
        weight = fold(crew.share(AGGREGATE[args.aggregate](torch.cat(crew.all(lengths.cpu())))).to(device)) / count
        loss_sum, kl_sum = 0.0, 0.0
        batches = pack(player.prompts, different, args.micro_batch, device)
        with torch.no_grad(), resident(reference):
            references = [logprobs(reference, packed, args.temperature) for packed in batches]
        for i in range(max(crew.all(len(batches)))):  # all gather weights together, so all go as often: one that is done, for nothing
            packed, ref, real = (*((batches[i], references[i]) if i < len(batches) else (batches[0], references[0])), i < len(batches))
            lp = logprobs(model, packed, args.temperature)
            loss, kl = player_loss(lp, ref, packed.owner, advantage, count, weight, beta, args.kl_form)
            (real * alpha * loss).backward()
            loss_sum, kl_sum = loss_sum + real * loss.item(), kl_sum + real * kl.item()
        loss, kl, tokens = map(sum, zip(*crew.all((loss_sum / crew.size, kl_sum, lengths.sum().item()))))
        report[name] = (loss, kl / tokens)
    return report


def update(model, reference, optimizer, players, args, crew=Crew()):
    """One optimizer step on L_Sol + alpha_Ch L_Ch: {name: (loss, KL a token)}, gradient norm before clipping."""
    report = gradients(model, reference, players, args, crew)
    norm = clip(optimizer, args.clip)
    optimizer.step()
    optimizer.zero_grad()
    return report, norm


def one_step(game, args):
    """A whole step without a record: play, score, update. `train` keeps the record, too."""
    queries, answers, challenger, solver = play(game.model, game.tokenizer, game.prompt, game.draw, args, game.generator)
    _, _, a_sol, a_ch = score(queries, answers, game.referee, game.judge, args)
    update(game.model, game.reference, game.optimizer, sides(solver, challenger, a_sol, a_ch, args), args)


# ---------------------------------------------------------------------------------------------------------------------
# For people

def similarity(texts):
    """How alike texts are, 0 to 1: the share of three-letter pieces that two of them have in common (Jaccard), mean over all pairs."""
    pieces = [{text[i:i + 3] for i in range(max(1, len(text) - 2))} for text in texts]
    number = {piece: i for i, piece in enumerate(set().union(*pieces))}
    has = torch.zeros(len(texts), len(number))
    for row, own in zip(has, pieces):
        row[[number[piece] for piece in own]] = 1.0
    both, size = has @ has.T, has.sum(1)
    share = both / (size[:, None] + size - both)  # [N, N], 1 on the diagonal
    return ((share.sum() - len(texts)) / max(1, len(texts) * (len(texts) - 1))).item()


def agreement(reward, quality):
    """Of all pairs of a right and a wrong answer (R > 0, R = 0) to one query, the share in which the judge prefers the right one, ties half.

    One half is chance: the judge's quality then says nothing of the truth. None where there is no such pair.
    """
    pair = (reward[:, :, None] > 0) & (reward[:, None, :] <= 0)  # [N, G, G]
    prefers = ((quality[:, :, None] - quality[:, None, :]).sign() + 1) / 2
    return prefers[pair].mean().item() if pair.any() else None


def together(parts):
    """The shares of all processes as one: of texts, tensors and Players; None stays None."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Player):
        tokens = [sum(len(ids) for group in p.completions for ids in group) for p in parts]
        return Player(*([item for p in parts for item in p[i]] for i in range(3)), entropy=sum(p.entropy * n for p, n in zip(parts, tokens)) / sum(tokens))
    return torch.cat(parts) if isinstance(first, torch.Tensor) else [item for part in parts for item in part]


def measure(queries, solver, challenger, reward, quality, valid, losses, norm):
    """A step's figures: one line of metrics.jsonl. quality None: no judge; valid None: the referee cannot tell."""
    row = {"reward": reward.mean().item(),
           "quality": None if quality is None else quality.mean().item(),
           "agreement": None if quality is None or valid is None else agreement(reward, quality),
           "valid": None if valid is None else sum(valid) / len(valid),  # share of queries that have a right answer
           "distinct": len(set(queries)) / len(queries),
           "similarity": similarity(queries),
           "spread": (reward.std(1, correction=0) > 0).float().mean().item(),  # share of groups whose rewards differ
           "tokens": sum(len(ids) for player in (solver, challenger) if player for group in player.completions for ids in group),  # sampled in this step
           "gradient_norm": norm}
    for name, text, player in (("solver", "answer", solver), ("challenger", "query", challenger)):
        if player:
            loss, kl = losses[name]
            row |= {f"loss_{name}": loss, f"kl_{name}": kl, f"entropy_{name}": player.entropy,
                    f"{text}_tokens": sum(len(ids) for group in player.completions for ids in group) / len(player.finished),
                    f"{text}_cut": 1 - sum(player.finished) / len(player.finished)}  # share that the length limit cut
    return {k: v for k, v in row.items() if v is not None}


# How a run looks that goes wrong: a figure's mean over the last WINDOW steps, when it is bad, and what to say, once.
WINDOW = 20
WATCH = {
    "distinct": (lambda x: x < 0.5, "the queries repeat: a larger --kl-challenger or a smaller --alpha-ch keeps them apart"),
    "valid": (lambda x: x < 0.5, "most queries are no tasks any more: try --game lsp, a larger --quality or --kl-challenger, or a smaller --alpha-ch"),
    "spread": (lambda x: x < 0.1, "hardly a group has spread, so the rewards teach the Solver nothing: try a smaller --alpha-ch, or --pay r-zero"),
    "kl_solver": (lambda x: x > 1.0, "the Solver runs away from its start: try a smaller --lr or a larger --kl"),
    "kl_challenger": (lambda x: x > 1.0, "the Challenger runs away from its start: try a smaller --alpha-ch or a larger --kl-challenger"),
    "agreement": (lambda x: x < 0.4, "of a right and a wrong answer the judge prefers the wrong one: try a smaller --quality, or --game lsp-zero"),
    "answer_cut": (lambda x: x > 0.5, "most answers are cut at the limit: try a larger --answer-tokens"),
    "query_cut": (lambda x: x > 0.5, "most queries are cut at the limit: try a larger --query-tokens, or a larger --kl-challenger"),
    "malformed": (lambda x: x > 0.5, "most verdicts of the judge have no score: try --judge expected"),
}


def watch(rows, said):
    """What has gone wrong in the last WINDOW rows of metrics.jsonl and is not in `said` {key: sentence} yet: a list of sentences."""
    found = []
    for key, (bad, sentence) in WATCH.items():
        values = [row[key] for row in rows if key in row]
        if len(rows) == WINDOW and values and key not in said and bad(sum(values) / len(values)):
            said[key] = f"step {rows[-1]['step']}: {sentence} ({key} is {sum(values) / len(values):.2f} over the last {WINDOW} steps)"
            found.append(said[key])
    return found


def game_records(queries, answers, reward, quality, a_ch, valid):
    """A step's games for games.jsonl, rounded to what a reader needs; equal answers to a query are written once. quality, a_ch: None without a judge, a Challenger."""
    records, missing = [], [None] * len(queries)
    listed = lambda values: missing if values is None else values.tolist()
    for q, a, r, rq, c, v in zip(queries, answers, reward.tolist(), listed(quality), listed(a_ch), valid or missing):
        different = Counter(zip(a, (round(x, 3) for x in r), (round(x, 3) for x in rq) if rq else [None] * len(a)))
        records.append({"query": q, "valid": v, "challenger_advantage": None if c is None else round(c, 3), "answers": [
            {"answer": text, "times": times, "reward": r, "quality": rq} for (text, r, rq), times in different.items()]})
    return records


def game_text(step, query, answers, reward, quality, a_sol, pay, valid):
    """One game as a person would want to read it. quality, pay: None without a judge, a Challenger."""
    mark = {True: "", False: "   (no such task: it has no right answer)", None: ""}[valid]
    lines = [f"step {step}  query: {query}{mark}"]
    rows = {}
    for a, r, rq, adv in zip(answers, reward.tolist(), [None] * len(answers) if quality is None else quality.tolist(), a_sol.tolist()):
        judged = "" if rq is None else f"  quality {rq:.2f}"
        rows.setdefault((a, r, judged, round(adv, 2)), []).append(a)
    for (a, r, judged, adv), same in sorted(rows.items(), key=lambda item: -item[0][3]):
        times = f" x{len(same)}" if len(same) > 1 else ""
        lines.append(f"    {(a or '(nothing)') + times:<32} reward {r:.2f}{judged}  advantage {adv:+.2f}")
    return "\n".join(lines + ([] if pay is None else [f"    the Challenger's advantage for this query: {pay:+.2f}"]))


def token_logprobs(model, player, args):
    """log pi of every token of a player's completions: M lists, in order."""
    out = [[] for group in player.completions for _ in group]
    with torch.no_grad(), resident(model):
        for packed in pack(player.prompts, player.completions, args.micro_batch, model.cos.device):
            for owner, lp in zip(packed.owner.tolist(), logprobs(model, packed, args.temperature).tolist()):
                out[owner].append(lp)
    return out


def explain(game, args):
    """--explain: one step as a lesson, number by number, each with the function that computed it. The numbers are the step's own.

    A few steps are played before it, unseen: at the very start policy and reference are the same, and every KL is 0.
    """
    model, reference, tokenizer, optimizer = game.model, game.reference, game.tokenizer, game.optimizer
    set_rate(optimizer, args.lr)  # no rising: a step should show
    for _ in range(5):
        one_step(game, args)
    queries, answers, challenger, solver = play(model, tokenizer, game.prompt, game.draw, args, game.generator)
    reward, quality, a_sol, a_ch = score(queries, answers, game.referee, game.judge, args)
    players = sides(solver, challenger, a_sol, a_ch, args)
    print("(after five steps, unseen: else policy and reference would be the same, and every KL 0)\n")
    print("PLAY: one model, two players, told apart by the prompt alone                        selfplay.play")
    if challenger:
        print(f"  the Challenger is asked: {tokenizer.decode(game.prompt)[:70]!r}\n  the Solver is asked each query as a plain user turn")
    before, lessons = {}, {}
    for name, (player, alpha, beta) in players.items():
        lp, ref = token_logprobs(model, player, args), token_logprobs(reference, player, args)
        kl = [[KL[args.kl_form](torch.tensor(r - x, dtype=torch.float64)).item() for x, r in zip(*rows)] for rows in zip(lp, ref)]
        before[name], lessons[name] = lp, (lp, ref, kl)
    number = 0
    for i, (query, group) in enumerate(zip(queries, answers)):
        print(f"\n  q{i + 1}  {query[:88] or '(nothing)'}")
        print("      answer                            R       R_Q        A_Sol     log pi     KL sum")
        print("                                  referee     judge   advantages   logprobs         KL")
        for j, answer in enumerate(group):
            lp, _, kl = (part[number] for part in lessons["solver"])
            print(f"      {(answer or '(nothing)')[:24]:<26}{reward[i, j]:9.3f}  {quality[i, j]:8.4f}   {a_sol[i, j]:+10.5f}  {sum(lp):9.3f}  {sum(kl):9.2e}")
            number += 1
        print(f"      V = mean R = {reward[i].mean():.4f}, mean R_Q = {quality[i].mean():.4f}" + (
            f"; the Challenger is paid {args.pay}(V) + V_Q = {PAY[args.pay](reward[i].mean()[None]).item() + quality[i].mean():+.4f}" if challenger else ""))
        if challenger:
            lp, _, kl = (part[i] for part in lessons["challenger"])
            print(f"      A_Ch = {a_ch[i]:+.5f} (advantages)   log pi(q) = {sum(lp):.3f} (logprobs)   KL sum = {sum(kl):.2e} (KL)")

    print("\nUPDATE: of each player the text with the most to learn from, token by token    selfplay.player_loss")
    for name, (player, alpha, beta) in players.items():
        lp, ref, kl = lessons[name]
        M, flat = len(lp), [ids for group in player.completions for ids in group]
        lengths = torch.tensor([float(len(ids)) for ids in flat])
        weight = AGGREGATE[args.aggregate](lengths)
        m = max(range(M), key=lambda m: (len(set(flat[m])) > 1, abs(player.advantage[m])))  # the text with the most to learn from
        print(f"\n  {name}: a text of advantage {player.advantage[m]:+.4f}; weight {weight[m]:.3f} (AGGREGATE), beta {beta:g}, M = {M} texts.")
        print("  Slope of -ratio x A by this log pi: -A weight / M; the ratio pi/sg(pi) is 1, its gradient is not")
        print("      token                log pi   log pi_Ref    KL term      slope   beta weight KL / M")
        for token, x, r, k in list(zip(flat[m], lp[m], ref[m], kl[m]))[:16]:
            text = repr(tokenizer.text.id_to_token(token))[1:-1][:16]
            print(f"      {text:<17}{x:10.5f}   {r:10.5f}  {k:9.2e}   {-(player.advantage[m] * weight[m] / M):+8.5f}   {beta * weight[m] * k / M:18.2e}")
        if len(flat[m]) > 16:
            print(f"      .. and {len(flat[m]) - 16} more tokens")
        loss = sum((weight[m] * (beta * sum(kl[m]) - player.advantage[m])).item() for m in range(M)) / M
        gradients(model, reference, {name: players[name]}, args)
        norm = clip(optimizer, float("inf"))
        optimizer.zero_grad()
        print(f"  L_{'Sol' if name == 'solver' else 'Ch'} = 1/M sum weight (beta KL sum - A) = {loss:+.6f}; in the sum times {alpha:g},\n  with a gradient of norm {norm:.5f} there (gradients)")
    report, norm = update(model, reference, optimizer, players, args)
    total = sum(players[name][1] * loss for name, (loss, _) in report.items())
    print(f"\n  L_Sol + alpha_Ch L_Ch of the step itself: {total:+.6f}; gradient norm {norm:.4f}, cut to {args.clip:g} (update)")

    print("\nAFTER: what the step changed                                                         token_logprobs")
    after, number = token_logprobs(model, solver, args), 0
    for i, group in enumerate(answers):
        lines = {}
        for j, answer in enumerate(group):
            lines[answer] = f"      {(answer or '(nothing)')[:26]:<28}A {a_sol[i, j]:+.3f}   log pi {sum(before['solver'][number]):9.4f} -> {sum(after[number]):9.4f}   p times {math.exp(sum(after[number]) - sum(before['solver'][number])):.3f}"
            number += 1
        print(f"  q{i + 1}\n" + "\n".join(lines.values()))


def parse_args(argv=None):
    """The command line's settings; the defaults depend on whether the model speaks the embedded language. Exits with 2 if refused."""
    parser = argparse.ArgumentParser(description="Language Self-Play: a Llama that learns by asking itself ever harder questions.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
                                     epilog="A model that does not speak the embedded language has these defaults instead: "
                                            + ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in REAL.items()))
    g = parser.add_argument_group("the game")
    g.add_argument("--game", choices=["lsp", "lsp-zero", "grpo"], default="lsp", help="lsp-zero: no quality self-reward; grpo: instructions from data, no Challenger")
    g.add_argument("--model", default="tiny", help="folder in Hugging Face layout, a run's folder, or a hub name")
    g.add_argument("--revision", default=None, help="branch, tag or commit of a hub model")
    g.add_argument("--reward", default="exact", help="who judges answers: exact (the embedded language's solver), math (the last number of an answer, against --data's), file.py:function, or a reward model's folder or hub name")
    g.add_argument("--reward-timeout", type=number(float), default=600.0, help="seconds after which a reward of your own (file.py:function) is given up")
    g.add_argument("--data", default=None, metavar="FILE", help='for grpo: instructions from JSONL with "prompt" or "question", and "answer"; none: the embedded language\'s')
    g.add_argument("--task", default=None, help="what the Challenger is to write an input for (only for a model that does not speak the embedded language); none: its own judgement")
    g.add_argument("--template", default=None, help="a form with placeholders for the Challenger to fill in (only for a model that does not speak the embedded language)")
    g.add_argument("--pay", choices=list(PAY), default="minimax", help="what the Challenger is paid for a query (not in grpo)")
    g.add_argument("--steps", type=number(int), default=500, help="optimizer steps, one batch of games each")
    g.add_argument("--queries", type=number(int), default=32, metavar="N", help="queries a step")
    g.add_argument("--answers", type=number(int), default=16, metavar="G", help="answers to each query; equal ones are computed once, so more of them cost little where answers are short")
    g.add_argument("--temperature", type=number(float), default=1.0, help="of sampling and of training alike")
    g.add_argument("--query-tokens", type=number(int), default=48, help="longest query (not in grpo)")
    g.add_argument("--answer-tokens", type=number(int), default=32, help="longest answer")
    g = parser.add_argument_group("the loss")
    g.add_argument("--lr", type=number(float), default=1.5e-4, help="learning rate: it falls linearly from here to 0, after 20 steps of rising, as Adam's first ones are its noisiest")
    g.add_argument("--alpha-ch", type=number(float, zero=True), default=0.005, help="weight of the Challenger's loss (not in grpo)")
    g.add_argument("--quality", type=number(float, zero=True), default=1.0, help="weight of the quality self-reward (lsp only)")
    g.add_argument("--judge", choices=["expected", "written"], default="expected", help="the quality self-reward: expected score of one forward pass, or a written verdict that is parsed (lsp only)")
    g.add_argument("--kl", type=number(float, zero=True), default=0.005, help="beta of the Solver's KL to the starting model")
    g.add_argument("--kl-challenger", type=number(float, zero=True), default=0.1, help="beta of the Challenger's, not in grpo; the paper uses one for both")
    g.add_argument("--kl-form", choices=list(KL), default="k3", help="literal: as printed in the paper; its mean gradient is zero")
    g.add_argument("--advantage", choices=["centre", "std"], default="centre", help="std: also divide by the deviation, as GRPO does")
    g.add_argument("--aggregate", choices=list(AGGREGATE), default="sum", help="how a text's tokens add up: sum (LSP), mean of its own (GRPO), mean of all (DAPO)")
    g.add_argument("--clip", type=number(float), default=1.0, help="largest gradient norm")
    g = parser.add_argument_group("the run")
    g.add_argument("--seed", type=number(int, zero=True), default=0, help="seed of everything random")
    g.add_argument("--run", default=argparse.SUPPRESS, help="name of the run's folder below runs/; default: the game and the next free number")
    g.add_argument("--resume", default=argparse.SUPPRESS, metavar="RUN", help="go on with a run that was stopped or killed, by its own settings: no other flag beside it")
    g.add_argument("--save-every", type=number(int), default=50, help="steps between checkpoints, which --resume goes on from; there is one every ten minutes, too, and on Ctrl-C")
    g.add_argument("--games-every", type=number(int), default=1, help="of how many steps one has its games written to games.jsonl")
    g.add_argument("--show-every", type=number(int), default=100, help="print one game every so many steps")
    g.add_argument("--eval-items", type=number(int), default=1000, help="held-out instructions for the score before and after (with --reward exact)")
    g.add_argument("--micro-batch", type=number(int), default=512, help="token positions computed at once; changes memory and speed only")
    g.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of all models; what is trained keeps its weights in float32 beside it")
    g.add_argument("--recompute", action="store_true", help="compute each layer again in the backward pass: less memory, more time")
    g.add_argument("--offload", action="store_true", help="keep the reference and the reward model in CPU memory while they are not asked: less GPU memory, more time (not on the CPU)")
    g.add_argument("--cuda-graphs", action="store_true", help="record the sampler's steps as CUDA graphs and replay them (on one GPU; not measured yet)")
    g.add_argument("--explain", action="store_true", help="play one step, of 3 queries x 4 answers unless told, and print it as a lesson; save nothing")
    g.add_argument("--dry-run", action="store_true", help="only say what memory these settings need and how long a step takes; save nothing")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ..")
    args = parser.parse_args(argv)
    if hasattr(args, "resume"):
        return evaluate.resumed(parser, argv, ("lsp", "lsp-zero", "grpo"))
    real = evaluate.is_real(args.model)
    if real:
        parser.set_defaults(**REAL | ({"lr": 1e-6} if args.game == "grpo" else {}))
        args = parser.parse_args(argv)
        if args.game == "grpo" and not args.data:
            parser.error(f"{args.model} does not speak the embedded language: name --data for it to answer")
        if args.reward == "exact":
            parser.error(f"{args.model} does not speak the embedded language, so --reward exact cannot judge it: name a reward model, file.py:function, or math")
    if args.explain:
        parser.set_defaults(queries=3, answers=4)
        args = parser.parse_args(argv)
    args.model = str(evaluate.model_folder(args.model))  # a run's folder stands for its model
    if hasattr(args, "run"):
        evaluate.check_name(args.run)
    if args.judge == "written" and not real:
        parser.error("--judge written is for models that do not speak the embedded language: that one's judge can only say a digit")
    if not real and (args.task or args.template):
        parser.error("--task and --template are for models that do not speak the embedded language: this one has its own Challenger's prompt")
    if args.game == "grpo" and args.pay != "minimax":
        parser.error("--pay is the Challenger's, and --game grpo has none")
    if args.offload and args.device.startswith("cpu"):
        parser.error("--offload frees a GPU's memory: on the CPU there is nothing to free")
    if args.cuda_graphs and not args.device.startswith("cuda"):
        parser.error(f"--cuda-graphs needs a GPU: --device is {args.device}")
    if args.data and args.game != "grpo":
        parser.error("--data is for --game grpo: in the other games the Challenger writes the queries")
    if args.reward == "math" and not args.data:
        parser.error("--reward math knows the right answers from --data alone")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# A run

def plan(args):
    """The memory_plan of these settings, before any weights are loaded."""
    config = read_config(args.model, args.revision)
    frozen = [config] + ([read_config(args.reward)] if names_model(args.reward) else [])
    return memory_plan(config, DTYPES[args.dtype], 2, args.queries * args.answers, args.query_tokens + args.answer_tokens + 64, args.micro_batch,
                       args.recompute, frozen=frozen, offloaded=args.offload)


def set_up(args, device, crew=Crew()):
    """The Game of these settings: models loaded, referee and judge at hand, nothing played yet. Raises UserError."""
    dtype = DTYPES[args.dtype]
    if crew.size == 1:
        check_memory(plan(args), device, args.dry_run)
    model, tokenizer = load(args.model, *((device, dtype) if crew.size == 1 else ("cpu", torch.float32)), args.revision)
    reference = copy.deepcopy(model).requires_grad_(False)
    data = evaluate.read_data(args.data) if args.data else None
    referee = load_referee(args.reward, device, data, dtype, args.reward_timeout)
    start = fingerprint(model, data)
    if crew.size > 1:
        shard(model, device, dtype)
        shard(reference, device, dtype)
    if args.offload:
        for one in [reference] + ([referee.model] if names_model(args.reward) else []):
            offload(one)
    judge = None
    if args.game == "lsp" and args.quality > 0:
        judge = (QualityReward if args.judge == "expected" else WrittenQuality)(reference, tokenizer)
    model.recompute = args.recompute
    model.replay = reference.replay = args.cuda_graphs  # the reference samples, too, where it writes its verdicts
    seed = random.Random(f"{args.seed} {crew.rank}").getrandbits(32) if crew.rank else args.seed  # no two play the same games
    rng = random.Random(args.seed)
    return Game(model, reference, tokenizer, optimizer_for(model, torch.optim.AdamW, lr=args.lr, weight_decay=0.0, fused=True),
                torch.Generator(device).manual_seed(seed), rng,
                None if args.game == "grpo" else challenger_prompt(tokenizer, args.task, args.template),
                (lambda: rng.choice(data)[0]) if data else lambda: [{"role": "user", "content": language.draw(rng)}],
                referee, judge, start, crew)


def dry_run(game, args):
    """--dry-run: how long a step takes (set_up has shown the memory). Nothing is saved."""
    for name in ("first", "second"):
        began = time.perf_counter()
        one_step(game, args)
        print(f"{name} step: {time.perf_counter() - began:.2f} seconds")
    print(f"{args.steps} steps like the second: {args.steps * (time.perf_counter() - began) / 60:.1f} minutes; nothing was saved")


def train(game, run, args):
    """Play, score, update, step by step, from where the run stands, and keep the record. Returns the number of the last step made."""
    model, crew, done, recent, said = game.model, game.crew, run.facts["step"], run.facts["recent"], run.facts["said"]
    with evaluate.stop_asked() as asked, tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, unit="step", disable=True if crew.rank else None, dynamic_ncols=True) as bar:
        for step in bar:
            began = time.perf_counter()
            set_rate(game.optimizer, args.lr * min(step / 20, 1 - (step - 1) / args.steps))
            queries, answers, challenger, solver = play(model, game.tokenizer, game.prompt, game.draw, args, game.generator, crew)
            reward, quality, a_sol, a_ch = score(queries, answers, game.referee, game.judge, args, crew)
            players = sides(solver, challenger, a_sol, a_ch, args)
            # From here on, for the record, what all processes played.
            queries, answers, challenger, solver, reward, quality, a_sol, a_ch = map(together, zip(*crew.all((queries, answers, challenger, solver, reward, quality, a_sol, a_ch))))
            valid = game.referee.valid(queries) if hasattr(game.referee, "valid") else None
            quality, a_ch = quality if game.judge else None, a_ch if challenger else None
            games = json.dumps({"step": step, "games": game_records(queries, answers, reward, quality, a_ch, valid)}) + "\n"
            try:
                losses, norm = update(model, game.reference, game.optimizer, players, args, crew)
            except FloatingPointError as error:
                if not crew.rank:
                    (run.folder / "not-finite.json").write_text(games)
                raise UserError(f"step {step}: {error}; the step was not taken, its games are in {run.folder / 'not-finite.json'}; try a smaller --lr in a new run") from None

            row = {"step": step} | measure(queries, solver, challenger, reward, quality, valid, losses, norm)
            if hasattr(game.judge, "malformed"):
                row["malformed"] = sum(crew.all(game.judge.malformed)) / crew.size  # share of verdicts without a score
            row["seconds"] = time.perf_counter() - began
            run.metrics.write(json.dumps(row) + "\n")
            if step % args.games_every == 0 or step == 1:
                run.games.write(games)
            done, recent = step, [*recent, row][-WINDOW:]
            for sentence in watch(recent, said):
                bar.write(sentence)
                if not crew.rank:
                    (run.folder / "warnings.txt").write_text("".join(line + "\n" for line in said.values()))
            bar.set_postfix_str("  ".join(f"{k} {row[k]:.2f}" for k in ("reward", "quality", "malformed", "valid", "kl_solver") if k in row))
            if step % args.show_every == 0 or step == 1:
                bar.write("\n" + game_text(step, queries[0], answers[0], reward[0], None if quality is None else quality[0], a_sol[0], None if a_ch is None else a_ch[0].item(), valid[0] if valid else None))
            stop = any(crew.all(bool(asked)))
            if run.due(step) or stop or step == args.steps:
                run.checkpoint(game.optimizer, game.generator, {"step": step, "rng": game.rng.getstate(), "said": said, "recent": recent})
            if stop:
                break
    return done


def compare(game, run, args):
    """The scoreboard: the start and the trained model on held-out instructions of the embedded language."""
    with resident(game.model), resident(game.reference):
        if not game.crew.rank:
            queries = language.evaluation_set(args.eval_items)
            # Independent samples for the two: with one seed they would answer with the same luck.
            rates = {name: evaluate.rate(m, game.tokenizer, queries, 2 * args.seed + i) for i, (name, m) in enumerate([("start", game.reference), ("now", game.model)])}
            evaluate.scoreboard(rates, queries, run.folder / "evaluation.json")


def main(argv=None):
    """Play, score, update, step by step, into a run's folder; then the scoreboard."""
    args = parse_args(argv)
    crew, device = join(args.device)
    if crew.size > 1 and (args.offload or args.cuda_graphs or args.explain or args.dry_run or args.queries % crew.size):
        raise UserError(f"{crew.size} processes play together without --offload, --cuda-graphs, --explain and --dry-run, and share --queries out evenly")
    if crew.rank:
        sys.stdout = open(os.devnull, "w")  # the first one speaks for all
    if args.dry_run:
        print(f"{args.game} on {args.model}: {parameter_count(read_config(args.model, args.revision)):,} parameters, {args.dtype}")
    game = set_up(args, device, crew)
    if args.dry_run:
        return dry_run(game, args)
    if args.explain:
        return explain(game, args)
    with evaluate.open_run(args, game.start, crew, step=0, said={}, recent=[]) as run:
        first = run.facts["step"]
        if run.tensors:
            run.restore(game.model, game.optimizer, game.generator, game.rng)
        print(f"{args.game} on {args.model}: {sum(p.numel() for p in game.model.parameters()):,} parameters, "
              f"{args.queries} queries x {args.answers} answers a step, seed {args.seed}, " + (f"on from step {first} of {run.folder}" if first else f"into {run.folder}"))
        print("a loss near 0 in metrics.jsonl is normal: advantages are centred, so only the KL is left in it; its gradient is not 0")
        began = time.perf_counter()
        done = train(game, run, args)
        save(game.model, run.folder / "model")
        if done < args.steps:
            print(f"stopped after step {done}; saved what there is: python selfplay.py --resume {run.folder} goes on")
        print(f"\n{done - first} steps in {(time.perf_counter() - began) / 60:.1f} minutes; the model is in {run.folder / 'model'}", flush=True)
        if done and args.reward == "exact":  # the scoreboard speaks of the embedded language
            compare(game, run, args)
        leave(crew)
        if not crew.rank:
            evaluate.show_run(run.folder)
            if done == args.steps:
                run.end()


if __name__ == "__main__":
    sys.exit(run_command(main))
