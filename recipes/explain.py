"""One step of either game as a lesson: every number, with the function that computes it beside it.

    python recipes/explain.py selfplay [flags of selfplay.py]    one step, 3 queries x 4 answers
    python recipes/explain.py spin [flags of spin.py]            one pair, of two batches of pairs

The numbers are real: the games' own functions compute them. Nothing is saved.

Both lessons train a little first, unseen. At the very start policy and reference are the same, so
every KL term is 0. The player of SPIN is its own opponent, so every margin is 0. The selfplay lesson
therefore plays five steps unseen and shows the sixth. The spin lesson trains on half of its pairs
unseen and shows a pair of the other half.
"""
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils import get_total_norm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import selfplay  # noqa: E402 (the repository's own, found through the line above)
import spin  # noqa: E402
from model import logprobs, pack  # noqa: E402
from support import console, learning, machine  # noqa: E402


def token_logprobs(model, prompts, completions, micro_batch, temperature=1.0):
    """log p of every token: one tensor [tokens] for each completion, in order."""
    packs = pack(prompts, completions, micro_batch, model.cos.device)
    with torch.no_grad(), machine.resident(model):
        lp = torch.cat([logprobs(model, packed, temperature) for packed in packs]).double()
    owner = torch.cat([packed.owner for packed in packs])
    return [lp[owner == m].cpu() for m in range(sum(map(len, completions)))]


def check(norm):
    """Return a step's gradient norm. Raises UserError where it is not finite."""
    if not math.isfinite(norm):
        raise console.UserError(f"the gradient's norm is {norm}: the step was not taken, and the "
                                "lesson ends here; try a smaller --lr")
    return norm


def heading(title, function):
    """Print the title of a part, and on the right the function that computes it."""
    print(f"\n{title}{function:>{99 - len(title)}}")


def shown(text, width):
    """The beginning of a text, on one line."""
    return repr(text)[1:-1][:width] or "(nothing)"


# --------------------------------------------------------------------------------------------------
# The selfplay lesson

class Learner(NamedTuple):
    """A player, and what its loss is made of. A list has a tensor [tokens] for each of its M texts."""
    name: str  # Sol or Ch, as in L_Sol and L_Ch
    player: selfplay.Player
    advantage: torch.Tensor  # [N, G] or [N]
    beta: float
    alpha: float  # the weight of this loss in the sum
    weight: torch.Tensor  # [M], see selfplay.AGGREGATE
    lp: list  # log pi, before the step
    ref: list  # log pi_Ref
    kl: list  # the KL terms


def selfplay_lesson(flags):
    """Play a step, one part after the other as in selfplay.step, and print it."""
    args = selfplay.parse_args(["--queries", "3", "--answers", "4", *flags])
    game = selfplay.set_up(args, machine.check_device(args.device))
    learning.set_rate(game.optimizer, args.lr)  # the full rate: the step should change something
    for _ in range(5):
        check(selfplay.step(game, args).norm)
    print("(after five steps, unseen: else policy and reference would be the same, and every KL 0)")
    queries, answers, challenger, solver = selfplay.play(game, args)
    reward, quality = selfplay.score(game, queries, answers, args)
    a_sol, a_ch = selfplay.advantages(reward, quality, selfplay.PAY[args.pay], args.advantage)
    learners = [learner(game, args, "Sol", solver, a_sol, args.kl, 1.0)]
    if challenger:
        learners.append(learner(game, args, "Ch", challenger, a_ch, args.kl_challenger,
                                args.alpha_ch))
    show_play(game, args, queries, answers, reward, quality, *learners)
    show_update(game, args, learners)
    show_after(game, args, answers, learners[0])


def learner(game, args, name, player, advantage, beta, alpha):
    """The Learner of a player."""
    texts = player.prompts, player.completions, args.micro_batch, args.temperature
    lp, ref = token_logprobs(game.model, *texts), token_logprobs(game.reference, *texts)
    kl = [selfplay.KL[args.kl_form](r - x) for x, r in zip(lp, ref)]
    weight = selfplay.AGGREGATE[args.aggregate](torch.tensor([float(len(x)) for x in lp]))
    return Learner(name, player, advantage, beta, alpha, weight, lp, ref, kl)


def show_play(game, args, queries, answers, reward, quality, solver, challenger=None):
    """Print every query with its answers, and what they are worth to each Learner."""
    heading("PLAY: one model, two players, told apart by the prompt alone", "selfplay.play")
    if challenger:
        print(f"  the Challenger is asked: {game.tokenizer.decode(game.prompt)[:70]!r}")
        print("  the Solver is asked each query as a plain user turn")
    lp, kl = [[x.sum() for x in texts] for texts in (solver.lp, solver.kl)]
    for i, query in enumerate(queries):
        print(f"\n  q{i + 1}  {shown(query, 88)}")
        print("      answer                            R       R_Q        A_Sol     log pi     KL sum")
        print("                                  referee     judge   advantages   logprobs         KL")
        for j, answer in enumerate(answers[i]):
            m = i * args.answers + j
            print(f"      {shown(answer, 24):<26}{reward[i, j]:9.3f}  {quality[i, j]:8.4f}   "
                  f"{solver.advantage[i, j]:+10.5f}  {lp[m]:9.3f}  {kl[m]:9.2e}")
        value, v_q = reward[i].mean(), quality[i].mean()
        line = f"      V = mean R = {value:.4f}, mean R_Q = {v_q:.4f}"
        if challenger:
            paid = selfplay.PAY[args.pay](value[None]).item() + v_q
            line += (f"; the Challenger is paid {args.pay}(V) + V_Q = {paid:+.4f}\n"
                     f"      A_Ch = {challenger.advantage[i]:+.5f} (selfplay.advantages)   log pi(q) = "
                     f"{challenger.lp[i].sum():.3f}   KL sum = {challenger.kl[i].sum():.2e}")
        print(line)


def show_update(game, args, learners):
    """Print both losses and take the step."""
    heading("UPDATE: of each player the text with the most to learn from, token by token",
            "selfplay.player_loss")
    for one in learners:
        show_tokens(game, one)
        show_loss(game, args, one)
    total = 0.0
    for one in learners:
        total += one.alpha * add_gradient(game, args, one)["loss"]
    norm = check(learning.take(game.optimizer))
    losses = "L_Sol + alpha_Ch L_Ch" if len(learners) == 2 else "L_Sol"
    print(f"\n  {losses} of the step itself: {total:+.6f}; gradient norm {norm:.4f}, "
          f"cut to {learning.CLIP:g} (learning.take)")


def add_gradient(game, args, one):
    """Add the gradient of alpha times the loss of a Learner. Returns the terms of that loss."""
    return selfplay.gradients(game, one.player, one.advantage, one.beta, args, one.alpha)


def show_tokens(game, one):
    """Print the text with the largest advantage token by token. A single token shows too little."""
    texts = [ids for group in one.player.completions for ids in group]
    M, advantage = len(texts), one.advantage.flatten()
    m = max(range(M), key=lambda m: (len(set(texts[m])) > 1, abs(advantage[m])))
    A, weight = advantage[m], one.weight[m]
    name = {"Sol": "solver", "Ch": "challenger"}[one.name]
    print(f"\n  {name}: a text of advantage {A:+.4f}; weight {weight:.3f} (AGGREGATE), "
          f"beta {one.beta:g}, M = {M} texts.")
    print("  Slope of -ratio x A by this log pi: -A weight / M; the ratio pi/sg(pi) is 1, its "
          "gradient is not")
    print("      token                log pi   log pi_Ref    KL term      slope   beta weight KL / M")
    for token, x, r, k in list(zip(texts[m], one.lp[m], one.ref[m], one.kl[m]))[:16]:
        text = shown(game.tokenizer.text.id_to_token(token), 16)
        print(f"      {text:<17}{x:10.5f}   {r:10.5f}  {k:9.2e}   {-A * weight / M:+8.5f}   "
              f"{one.beta * weight * k / M:18.2e}")
    if len(texts[m]) > 16:
        print(f"      .. and {len(texts[m]) - 16} more tokens")


def show_loss(game, args, one):
    """Print the loss over all texts of a Learner, its two parts, and the norm of its gradient."""
    terms = add_gradient(game, args, one)
    norm = get_total_norm([w.grad for w in learning.weights_of(game.optimizer)])
    game.optimizer.zero_grad()
    kl = (one.weight * torch.stack([k.sum() for k in one.kl])).mean()
    print("  policy = 1/M sum weight (-A) and KL = 1/M sum weight (KL sum), so")
    print(f"  L_{one.name} = policy + beta KL = {terms['policy']:+.6f} + {one.beta:g} x {kl:.6f} = "
          f"{terms['loss']:+.6f}; in the sum times {one.alpha:g},")
    print(f"  with a gradient of norm {norm:.5f} there (selfplay.gradients)")


def show_after(game, args, answers, solver):
    """Print how probable each answer was before the step, and how probable it is now."""
    heading("AFTER: what the step changed", "model.logprobs")
    after = token_logprobs(game.model, solver.player.prompts, solver.player.completions,
                           args.micro_batch, args.temperature)
    for i, group in enumerate(answers):
        print(f"  q{i + 1}")
        for j, answer in enumerate(group):
            old, new = (lp[i * args.answers + j].sum() for lp in (solver.lp, after))
            if answer not in group[:j]:  # equal ones once
                print(f"      {shown(answer, 26):<28}A {solver.advantage[i, j]:+.3f}   log pi "
                      f"{old:9.4f} -> {new:9.4f}   p times {(new - old).exp():.3f}")


# --------------------------------------------------------------------------------------------------
# The spin lesson

def spin_lesson(flags):
    """Train on one half of an iteration's pairs, print a pair of the other, and train on that."""
    args = spin.parse_args(["--pairs", str(2 * spin.parse_args(flags).batch), *flags])
    if args.game != "spin" or args.dtype != "float32":
        raise console.UserError("the lesson is of --game spin in --dtype float32: leave both out")
    args.iterations = 1
    game = spin.set_up(args)
    it = spin.opponent_plays(game, args, 0, [], 0)
    half, different = len(it.pairs) // 2, [pair.answer != pair.rival for pair in it.pairs]
    if not any(different[half:]):
        raise console.UserError("the opponent answers as people do, so no pair of this lesson teaches "
                                "anything: try more --pairs")
    number = different.index(True, half)
    pair, ref = it.pairs[number], it.ref[number][None]  # [1, 2]
    texts = [pair.prompt], [[pair.answer, pair.rival]], args.micro_batch
    opponent = token_logprobs(game.player, *texts)  # the player still is the opponent
    train(game, args, it, slice(half))

    print(f"(first trained on {half} other pairs, unseen: else the player were its opponent, "
          "and the margin 0)")
    heading("THE PAIR: the opponent answered too", "spin.opponent_plays")
    print(f"  {shown(game.data[it.chosen[number]][0][-1]['content'], 96)}")
    print(f"  {different.count(False)} of {len(different)} such pairs have two equal answers, "
          "and teach nothing")
    show_pair_tokens(game, pair, token_logprobs(game.player, *texts), opponent)
    before = show_pair_loss(game, args, pair, ref)
    train(game, args, it, slice(half, None))
    heading(f"AFTER training on these {len(it.pairs) - half} pairs, {args.epochs} epochs",
            "spin.player_trains")
    after = figures(game, args, pair, ref)
    names = {"margin": "margin", "log p(y|x)": "logprob_answer", "log p(y'|x)": "logprob_rival"}
