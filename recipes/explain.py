"""One step of either game as a lesson: every number, with the function that computes it beside it.

    python recipes/explain.py selfplay [flags of selfplay.py]    one step, 3 queries x 4 answers
    python recipes/explain.py spin [flags of spin.py]            one pair, of two batches of pairs

The numbers are real: the games' own functions compute them. Nothing is saved.

Both lessons train a little first, and print nothing of that. At the very start the policy equals
its reference, so every KL term is 0. In SPIN the player equals its opponent, so every margin is 0.
Therefore the selfplay lesson plays five unseen steps and shows the sixth. The spin lesson trains on
half of its pairs and shows a pair of the other half.
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

import selfplay
import spin
from model import logprobs, pack
from support import console, learning, machine


def token_logprobs(model, prompts, completions, micro_batch, temperature=1.0):
    """log p of every token: one tensor [tokens] for each completion, in order."""
    packs = pack(prompts, completions, micro_batch, model.cos.device)
    with torch.no_grad(), machine.resident(model):
        lp = torch.cat([logprobs(model, packed, temperature) for packed in packs])
    lp = lp.cpu().double()  # in this order: Apple's GPUs know no float64
    owner = torch.cat([packed.owner for packed in packs]).cpu()
    return [lp[owner == m] for m in range(sum(map(len, completions)))]


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

ANSWERS = """\
      answer                            R       R_Q        A_Sol     log pi     KL sum
                                  referee     judge   advantages   logprobs         KL"""
TOKENS = """\
  Slope of -ratio x A by this log pi: -A weight / M; the ratio pi/sg(pi) is 1, its gradient is not
      token                log pi   log pi_Ref    KL term      slope   beta weight KL / M"""


class Learner(NamedTuple):
    """A player of the step, and what its loss is made of. It wrote M texts."""
    name: str  # solver or challenger
    player: selfplay.Player
    advantage: torch.Tensor  # [N, G] or [N]
    beta: float
    alpha: float  # the weight of its loss in the sum
    weight: torch.Tensor  # [M], see selfplay.AGGREGATE
    lp: list  # M tensors [tokens]: log pi, before the step
    ref: list  # the same of log pi_Ref
    kl: list  # the same of the KL terms


def selfplay_lesson(flags):
    """Play a step, one part after the other as in selfplay.step, and print it."""
    args = selfplay.parse_args(["--queries", "3", "--answers", "4", *flags])
    game = selfplay.set_up(args, machine.check_device(args.device))
    learning.set_rate(game.optimizer, args.lr)  # the full rate: the step should change something
    for _ in range(5):
        check(selfplay.step(game, args).norm)
    print("(after five steps, unseen: else policy and reference would be the same, and every KL 0)")
    rows, answers, challenger, solver = selfplay.play(game, args)
    queries = [row.query for row in rows]
    reward, quality = selfplay.score(game, rows, answers)
    paid = selfplay.pay_of(game, args, queries, reward, quality)
    quality *= args.quality
    a_sol, a_ch = selfplay.advantages(reward + quality, paid, args.advantage)
    learners = [learner(game, args, "solver", solver, a_sol, args.kl, 1.0)]
    if challenger:  # grpo has none
        learners.append(learner(game, args, "challenger", challenger, a_ch, args.kl_challenger,
                                args.alpha_ch))
    show_play(game, args, queries, answers, reward, quality, paid, *learners)
    heading("UPDATE: of each player the text with the most to learn from, token by token",
            "selfplay.player_loss")
    for one in learners:
        show_update(game, args, one)
    take_step(game, args, learners)
    show_after(game, args, answers, learners[0])


def learner(game, args, name, player, advantage, beta, alpha):
    """The Learner of a player."""
    texts = player.prompts, player.completions, args.micro_batch, args.temperature
    lp, ref = token_logprobs(game.model, *texts), token_logprobs(game.reference, *texts)
    kl = [selfplay.KL[args.kl_form](r - x) for x, r in zip(lp, ref)]
    weight = selfplay.AGGREGATE[args.aggregate](torch.tensor([float(len(x)) for x in lp]))
    return Learner(name, player, advantage, beta, alpha, weight, lp, ref, kl)


def show_play(game, args, queries, answers, reward, quality, paid, solver, challenger=None):
    """Print every query with its answers, and what they are worth to each Learner."""
    heading("PLAY: one model, two players, told apart by the prompt alone", "selfplay.play")
    if challenger:
        print(f"  the Challenger is asked: {game.tokenizer.decode(game.prompt)[:70]!r}")
        print("  the Solver is asked each query as a plain user turn")
    for i, query in enumerate(queries):
        print(f"\n  q{i + 1}  {shown(query, 88)}\n{ANSWERS}")
        for j, answer in enumerate(answers[i]):
            lp, kl = (rows[i * args.answers + j].sum() for rows in (solver.lp, solver.kl))
            print(f"      {shown(answer, 24):<26}{reward[i, j]:9.3f}  {quality[i, j]:8.4f}   "
                  f"{solver.advantage[i, j]:+10.5f}  {lp:9.3f}  {kl:9.2e}")
        value, v_q = reward[i].mean(), quality[i].mean()
        print(f"      V = mean R = {value:.4f}, mean R_Q = {v_q:.4f}", end="")
        if challenger:
            what = "-V + V_Q" if args.pay == "minimax" else f"--pay {args.pay}"
            lp = challenger.lp[i].sum()
            print(f"; the Challenger gets {what} = {paid[i]:+.4f}")
            print(f"      A_Ch = {challenger.advantage[i]:+.5f} (selfplay.advantages)")
            print(f"      log pi(q) = {lp:.3f} (model.logprobs)   "
                  f"KL sum = {challenger.kl[i].sum():.2e} (selfplay.KL)", end="")
        print()


def show_update(game, args, one):
    """Print the text of largest advantage, token by token, and then the loss over all texts."""
    texts = [ids for group in one.player.completions for ids in group]
    M, advantage = len(texts), one.advantage.flatten()
    # A text of a single token, or of one token again and again, shows too little.
    m = max(range(M), key=lambda m: (len(set(texts[m])) > 1, abs(advantage[m])))
    A, weight = advantage[m], one.weight[m]
    print(f"\n  {one.name}: a text of advantage {A:+.4f}; weight {weight:.3f} (AGGREGATE), "
          f"beta {one.beta:g}, M = {M} texts.\n{TOKENS}")
    for token, x, r, k in list(zip(texts[m], one.lp[m], one.ref[m], one.kl[m]))[:16]:
        text = shown(game.tokenizer.text.id_to_token(token), 16)
        print(f"      {text:<17}{x:10.5f}   {r:10.5f}  {k:9.2e}   {-A * weight / M:+8.5f}   "
              f"{one.beta * weight * k / M:18.2e}")
    if len(texts[m]) > 16:
        print(f"      .. and {len(texts[m]) - 16} more tokens")

    terms = selfplay.gradients(game, one.player, one.advantage, one.beta, args, one.alpha)
    norm = get_total_norm([w.grad for w in learning.weights_of(game.optimizer)])
    game.optimizer.zero_grad()
    name = {"solver": "L_Sol", "challenger": "L_Ch"}[one.name]
    kl = (one.weight * torch.stack([k.sum() for k in one.kl])).mean()
    print("  policy = 1/M sum weight (-A) and KL = 1/M sum weight (KL sum) make the loss:")
    print(f"  {name} = policy + beta KL = {terms['policy']:+.6f} + {one.beta:g} x {kl:.6f} = "
          f"{terms['loss']:+.6f}; in the sum times {one.alpha:g},")
    print(f"  with a gradient of norm {norm:.5f} there; KL of a token {terms['kl']:.2e} on average "
          "(selfplay.gradients)")


def take_step(game, args, learners):
    """Take the step on the sum of the losses, and print that sum."""
    terms = [selfplay.gradients(game, one.player, one.advantage, one.beta, args, one.alpha)
             for one in learners]
    total = sum(one.alpha * term["loss"] for one, term in zip(learners, terms))
    norm = check(learning.take(game.optimizer))
    name = "L_Sol + alpha_Ch L_Ch" if len(learners) == 2 else "L_Sol"
    print(f"\n  {name} of the step itself: {total:+.6f}; gradient norm {norm:.4f}, cut to "
          f"at most {learning.CLIP:g}\n  (learning.take)")


def show_after(game, args, answers, solver):
    """Print how probable each answer was before the step, and how probable it is now."""
    heading("AFTER: what the step changed", "model.logprobs")
    after = token_logprobs(game.model, solver.player.prompts, solver.player.completions,
                           args.micro_batch, args.temperature)
    for i, group in enumerate(answers):
        print(f"  q{i + 1}")
        for j, answer in enumerate(group):
            old, new = (rows[i * args.answers + j].sum() for rows in (solver.lp, after))
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
    it = spin.opponent_plays(game, args, spin.new_iteration(game, args, 0, [], 0))
    half, different = len(it.pairs) // 2, [pair.answer != pair.rival for pair in it.pairs]
    if not any(different[half:]):
        raise console.UserError("the opponent answers as people do, so no pair of this lesson "
                                "teaches anything: try more --pairs")
    i = different.index(True, half)
    pair, ref = it.pairs[i], it.ref[i:i + 1]  # ref [1, 2]
    texts = [pair.prompt], [[pair.answer, pair.rival]], args.micro_batch
    opponent = token_logprobs(game.player, *texts)  # the player still is the opponent
    train(game, args, it, slice(half))
    print(f"(first trained on {half} other pairs, unseen: else the player were its opponent, "
          "and the margin 0)")
    heading("THE PAIR: the opponent answered too", "spin.opponent_plays")
    print(f"  {shown(game.data[it.chosen[i]].query, 96)}")
    print(f"  {different.count(False)} of {len(different)} such pairs have two equal answers, "
          "and teach nothing")
    show_pair_tokens(game, pair, opponent, token_logprobs(game.player, *texts))
    before = show_pair_loss(game, args, pair, ref)
    train(game, args, it, slice(half, None))
    heading(f"AFTER training on these {len(it.pairs) - half} pairs, {args.epochs} epochs",
            "spin.player_trains")
    show_pair_after(game, args, pair, ref, before)


def train(game, args, it, part):
    """Train on a part of an iteration's pairs as on a whole iteration."""
    some = it._replace(pairs=it.pairs[part], ref=it.ref[part])
    for row in spin.player_trains(game, args, some, spin.rmsprop(game.player)):
        check(row["gradient_norm"])


def show_pair_tokens(game, pair, opponent, player):
    """Print a pair token by token. opponent, player: their log p of the answer and of the rival."""
    heading("TOKENS: under the player p and the opponent p_t", "model.logprobs")
    for who, ids, ref, lp in zip(("y   people's answer", "y'  the opponent's"),
                                 (pair.answer, pair.rival), opponent, player):
        print(f"  {who}\n      token              log p   log p_t     log p / p_t")
        for token, x, r in list(zip(ids, lp, ref))[:24]:
            text = shown(game.tokenizer.text.id_to_token(token), 14)
            print(f"      {text:<15}{x:9.4f} {r:9.4f}   {x - r:+9.4f}")
        print(f"      {'sum':<15}{lp.sum():9.4f} {ref.sum():9.4f}   {(lp - ref).sum():+9.4f}")


def show_pair_loss(game, args, pair, ref):
    """Print a pair's margin and loss, and where the loss moves the player. Returns its figures."""
    lam = spin.of_iteration(args.lam, 0)
    row = spin.spin_gradients(game.player, [pair], ref, lam, args)
    norm = get_total_norm([w.grad for w in game.player.parameters()])
    game.player.zero_grad()
    margin = torch.tensor(row["margin"], requires_grad=True)
    slope = lam * torch.autograd.grad(spin.LOSS[args.loss](margin), margin)[0]
    answer, rival = row["logprob_answer"] - ref[0, 0], row["logprob_rival"] - ref[0, 1]
    print(f"\nLOSS\n  margin = {lam:g} ({answer:+.4f} - {rival:+.4f}) = {margin:+.4f}   "
          "(spin.spin_margin)")
    print(f"  loss = {args.loss}(margin) = {row['loss']:.5f}   (spin.spin_loss)")
    print(f"  its slope by log p(y|x) is {slope:+.4f}, by log p(y'|x) {-slope:+.4f}: only the\n"
          "  difference is trained, so both may fall")
    print(f"  the gradient of this pair has norm {norm:.4f}   (spin.spin_gradients)")
    return row


def show_pair_after(game, args, pair, ref, before):
    """Print what became of a pair's figures. before: as spin_gradients returned them."""
    lp = spin.all_logprobs(game.player, [pair], args.micro_batch)  # [1, 2], of the player now
    margin = spin.spin_margin(lp, ref, spin.of_iteration(args.lam, 0)).item()
    print(f"  margin {before['margin']:+.4f} -> {margin:+.4f}   (spin.spin_margin)\n"
          f"  log p(y|x) {before['logprob_answer']:.4f} -> {lp[0, 0]:.4f}   "
          f"log p(y'|x) {before['logprob_rival']:.4f} -> {lp[0, 1]:.4f}")


LESSONS = {"selfplay": selfplay_lesson, "spin": spin_lesson}


def main(argv=None):
    """Give the lesson that the first word names. All other words are flags of that game."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in ("-h", "--help"):
        print(f"usage: explain.py {{selfplay,spin}} [flags of that game]\n\n{__doc__.strip()}")
        return
    if not words or words[0] not in LESSONS:
        raise console.UserError("the first word names the game, selfplay or spin; its flags follow")
    for word in words[1:]:
        if word.partition("=")[0] in ("--resume", "--run", "--dry-run"):
            raise console.UserError(f"{word}: a lesson is no run and saves nothing: leave it out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise console.UserError("a lesson is for one process: start it without torchrun")
    LESSONS[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(console.run_command(main))
