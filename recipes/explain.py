"""One step of either game as a lesson: every number, with the function that computes it beside it.

    python recipes/explain.py selfplay [flags of selfplay.py]    one step, 3 queries x 4 answers
    python recipes/explain.py spin [flags of spin.py]            one pair, of two batches of pairs

The numbers are real: the games' own functions compute them. Nothing is saved. With --html FILE the
lesson is a page, too: whoever points at a number there sees its formula, and the file and the line
that made it.

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

import model
import rewards
import selfplay
import spin
from model import logprobs, pack
from support import console, learning, lesson, machine
from support.lesson import Made, fit, number


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


# What made a number: formula, module, and the line there that computes it.
LOG_P = "sum over its tokens of log {}(token given all before), the end token included"
MADE = {
    "R": Made("R(q, a): the referee's reward, here 1 for the right answer, else 0", rewards,
              "known is not None and answer == known"),
    "R, another": Made("R(q, a): the reward of the referee that --reward names", selfplay,
                       "reward = referees.judged(game.referee"),
    "R_Q": Made("R_Q(q, a) = expected grade of the frozen start, 0 to 7, / 7, times --quality",
                rewards, "p @ torch.arange(8.0, device=p.device)"),
    "R_Q, another": Made("R_Q(q, a), times --quality; 0 in a game without a judge", selfplay,
                         "quality = torch.zeros_like(reward)"),
    "V": Made("V(q) = mean_j R(q, a_j), over the group", selfplay,
              '"minimax": lambda queries, R, R_Q: '),
    "V_Q": Made("V_Q(q) = mean_j R_Q(q, a_j), over the group", selfplay,
                '"minimax": lambda queries, R, R_Q: '),
    "paid": Made("-V + V_Q", selfplay, '"minimax": lambda queries, R, R_Q: '),
    "paid, another": Made("what --pay names, of R and R_Q", selfplay, "paid = game.pay("),
    "A_Sol": Made("A_Sol = R + R_Q - mean over the group", selfplay,
                  "a_sol = solver - solver.mean(1, keepdim=True)"),
    "A_Ch": Made("A_Ch = -V + V_Q - mean over the queries of the step", selfplay,
                 "a_ch = challenger - challenger.mean()"),
    "log pi": Made(f"log pi(text given prompt) = {LOG_P.format('pi')}", selfplay,
                   "log_pi = zeros.index_add(0, owner, lp)"),
    "token": Made("log pi(token given all before it) = log softmax(logits)[token]", model,
                  "out[part] = logits.gather(1, target[part, None])[:, 0] - lse[part]"),
    "token, ref": Made("the same under pi_Ref, the frozen start", selfplay,
                       "refs = [logprobs(game.reference, packed, args.temperature)"),
    "KL": Made("exp(d) - d - 1, d = log pi_Ref - log pi (k3)", selfplay,
               '"k3": lambda d: d.expm1() - d'),
    "KL, another": Made("the KL term that --kl-form names, of d = log pi_Ref - log pi", selfplay,
                        "kl = zeros.index_add(0, owner, KL[kl_form](ref - lp))"),
    "slope": Made("dL / d log pi = -A weight / M, as d ratio / d log pi = ratio = 1", selfplay,
                  "policy = -ratio * advantage"),
    "loss": Made("L = 1/M sum weight (-ratio A + beta KL)", selfplay,
                 "loss = weight * (policy + beta * kl)"),
    "policy": Made("1/M sum weight (-A): the loss without its KL; A is centred", selfplay,
                   "policy = -ratio * advantage"),
    "weight": Made("weight of a text in the loss, by its length", selfplay,
                   "weight = crew.share(AGGREGATE[args.aggregate](lengths))"),
    "norm": Made("square root of the sum of squares of dL/dw, over all weights w", learning,
                 "norm = whole(torch.nn.utils.clip_grad_norm_"),
    "after": Made("log pi(text given prompt) anew, after the optimizer's step", learning,
                  "        optimizer.step()"),
    "times": Made("exp(log pi after - log pi before)", learning, "        optimizer.step()"),
    "log p": Made("log p(token given all before it) = log softmax(logits)[token]", model,
                  "out[part] = logits.gather(1, target[part, None])[:, 0] - lse[part]"),
    "log p_t": Made("the same under p_t: the opponent, the player before it moved", spin,
                    "ref.append(all_logprobs(game.player, part, args.micro_batch, crew))"),
    "log p/p_t": Made("log p - log p_t", spin, "ratio = lp - ref"),
    "sum": Made(f"log p(y given x) = {LOG_P.format('p')}", spin,
                "total = torch.zeros(2 * len(pairs)"),
    "margin": Made("m = lambda ( log p(y|x)/p_t(y|x) - log p(y'|x)/p_t(y'|x) )", spin,
                   "return lam * (ratio[:, 0] - ratio[:, 1])"),
    "spin loss": Made("log(1 + exp(-m)) (logistic), or what --loss names", spin,
                        '"logistic": lambda m: F.softplus(-m)'),
    "spin slope": Made("d loss / d log p(y|x) = lambda loss'(m), and its opposite for y'", spin,
                         "loss = spin_loss(lp, ref[here], lam, args.loss).sum()"),
    "after pairs": Made("the same, after training on these pairs", spin,
                        'row["gradient_norm"] = learning.take(optimizer, crew=game.crew)'),
}


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


def made_by(args):
    """Which names of MADE fit these settings: {short name: name}."""
    own = {"R": args.reward == "exact", "R_Q": args.game == "lsp" and args.judge == "expected",
           "paid": args.pay == "minimax", "KL": args.kl_form == "k3"}
    return {name: name if usual else f"{name}, another" for name, usual in own.items()}


def learner(game, args, name, player, advantage, beta, alpha):
    """The Learner of a player."""
    texts = player.prompts, player.completions, args.micro_batch, args.temperature
    lp, ref = token_logprobs(game.model, *texts), token_logprobs(game.reference, *texts)
    kl = [selfplay.KL[args.kl_form](r - x) for x, r in zip(lp, ref)]
    weight = selfplay.AGGREGATE[args.aggregate](torch.tensor([float(len(x)) for x in lp]))
    return Learner(name, player, advantage, beta, alpha, weight, lp, ref, kl)


def show_play(game, args, queries, answers, reward, quality, paid, solver, challenger=None):
    """Print every query with its answers, and what they are worth to each Learner."""
    by = made_by(args)
    heading("PLAY: one model, two players, told apart by the prompt alone", "selfplay.play")
    if challenger:
        print(f"  the Challenger is asked: {game.tokenizer.decode(game.prompt)[:70]!r}")
        print("  the Solver is asked each query as a plain user turn")
    for i, query in enumerate(queries):
        print(f"\n  q{i + 1}  {fit(query, 88).rstrip()}\n{ANSWERS}")
        for j, answer in enumerate(answers[i]):
            lp, kl = (rows[i * args.answers + j].sum() for rows in (solver.lp, solver.kl))
            print(f"      {fit(answer, 24)}  {number(reward[i, j], '9.3f', by['R'])}  "
                  f"{number(quality[i, j], '8.4f', by['R_Q'])}   "
                  f"{number(solver.advantage[i, j], '+10.5f', 'A_Sol')}  "
                  f"{number(lp, '9.3f', 'log pi')}  {number(kl, '9.2e', by['KL'])}")
        value, v_q = reward[i].mean(), quality[i].mean()
        print(f"      V = mean R = {number(value, '.4f', 'V')}, "
              f"mean R_Q = {number(v_q, '.4f', 'V_Q')}")
        if challenger:
            what = "-V + V_Q" if args.pay == "minimax" else f"--pay {args.pay}"[:20]
            lp, kl = challenger.lp[i].sum(), challenger.kl[i].sum()
            print(f"      the Challenger gets {what} = {number(paid[i], '+.4f', by['paid'])}\n"
                  f"      A_Ch = {number(challenger.advantage[i], '+.5f', 'A_Ch')} "
                  "(selfplay.advantages)")
            print(f"      log pi(q) = {number(lp, '.3f', 'log pi')} (model.logprobs)   "
                  f"KL sum = {number(kl, '.2e', by['KL'])} (selfplay.KL)")


def show_update(game, args, one):
    """Print the text of largest advantage, token by token, and then the loss over all texts."""
    by, texts = made_by(args), [ids for group in one.player.completions for ids in group]
    M, advantage = len(texts), one.advantage.flatten()
    # A text of a single token, or of one token again and again, shows too little.
    m = max(range(M), key=lambda m: (len(set(texts[m])) > 1, abs(advantage[m])))
    A, weight = advantage[m], one.weight[m]
    of = {"solver": "A_Sol", "challenger": "A_Ch"}[one.name]
    print(f"\n  {one.name}: a text of advantage {number(A, '+.4f', of)}; "
          f"weight {number(weight, '.3f', 'weight')} (AGGREGATE), beta {one.beta:g}, "
          f"M = {M} texts.\n{TOKENS}")
    for token, x, r, k in list(zip(texts[m], one.lp[m], one.ref[m], one.kl[m]))[:16]:
        text = fit(game.tokenizer.text.id_to_token(token), 16)
        print(f"      {text} {number(x, '10.5f', 'token')}   {number(r, '10.5f', 'token, ref')}  "
              f"{number(k, '9.2e', by['KL'])}   {number(-A * weight / M, '+8.5f', 'slope')}   "
              f"{number(one.beta * weight * k / M, '18.2e', 'loss')}")
    if len(texts[m]) > 16:
        print(f"      .. and {len(texts[m]) - 16} more tokens")

    terms = selfplay.gradients(game, one.player, one.advantage, one.beta, args, one.alpha)
    norm = get_total_norm([w.grad for w in learning.weights_of(game.optimizer)])
    game.optimizer.zero_grad()
    name = {"solver": "L_Sol", "challenger": "L_Ch"}[one.name]
    kl = (one.weight * torch.stack([k.sum() for k in one.kl])).mean()
    print("  policy = 1/M sum weight (-A) and KL = 1/M sum weight (KL sum) make the loss:")
    parts = number(terms["policy"], "+.6f", "policy"), number(kl, ".6f", by["KL"])
    print(f"  {name} = policy + beta KL = {parts[0]} + {one.beta:g} x {parts[1]} = "
          f"{number(terms['loss'], '+.6f', 'loss')};")
    print(f"  times {one.alpha:g} in the sum, with a gradient of norm "
          f"{number(norm, '.6g', 'norm')}; KL of a token "
          f"{number(terms['kl'], '.2e', by['KL'])} on average")


def take_step(game, args, learners):
    """Take the step on the sum of the losses, and print that sum."""
    terms = [selfplay.gradients(game, one.player, one.advantage, one.beta, args, one.alpha)
             for one in learners]
    total = sum(one.alpha * term["loss"] for one, term in zip(learners, terms))
    norm = check(learning.take(game.optimizer))
    name = "L_Sol + alpha_Ch L_Ch" if len(learners) == 2 else "L_Sol"
    print(f"\n  {name} of the step itself: {number(total, '+.6f', 'loss')};\n"
          f"  gradient norm {number(norm, '.4f', 'norm')}, cut to at most {learning.CLIP:g} "
          "(learning.take)")


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
                print(f"      {fit(answer, 26)}  A "
                      f"{number(solver.advantage[i, j], '+.3f', 'A_Sol')}   log pi "
                      f"{number(old, '9.4f', 'log pi')} -> {number(new, '9.4f', 'after')}   "
                      f"p times {number((new - old).exp(), '.3g', 'times')}")


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
    print(f"  {fit(game.data[it.chosen[i]].query, 96).rstrip()}")
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
            text = fit(game.tokenizer.text.id_to_token(token), 14)
            print(f"      {text} {number(x, '9.4f', 'log p')} {number(r, '9.4f', 'log p_t')}   "
                  f"{number(x - r, '+9.4f', 'log p/p_t')}")
        print(f"      {'sum':<15}{number(lp.sum(), '9.4f', 'sum')} "
              f"{number(ref.sum(), '9.4f', 'log p_t')}   "
              f"{number((lp - ref).sum(), '+9.4f', 'log p/p_t')}")


def show_pair_loss(game, args, pair, ref):
    """Print a pair's margin and loss, and where the loss moves the player. Returns its figures."""
    lam = spin.of_iteration(args.lam, 0)
    row = spin.spin_gradients(game.player, [pair], ref, lam, args)
    norm = get_total_norm([w.grad for w in game.player.parameters()])
    game.player.zero_grad()
    margin = torch.tensor(row["margin"], requires_grad=True)
    slope = lam * torch.autograd.grad(spin.LOSS[args.loss](margin), margin)[0]
    answer, rival = row["logprob_answer"] - ref[0, 0], row["logprob_rival"] - ref[0, 1]
    print(f"\nLOSS\n  margin = {lam:g} ({number(answer, '+.4f', 'log p/p_t')} - "
          f"{number(rival, '+.4f', 'log p/p_t')}) = {number(margin, '+.4f', 'margin')}   "
          "(spin.spin_margin)")
    print(f"  loss = {args.loss}(margin) = {number(row['loss'], '.5f', 'spin loss')}   "
          "(spin.spin_loss)")
    print(f"  its slope by log p(y|x) is {number(slope, '+.4f', 'spin slope')}, by log p(y'|x) "
          f"{number(-slope, '+.4f', 'spin slope')}: only the\n"
          "  difference is trained, so both may fall")
    print(f"  the gradient of this pair has norm {number(norm, '.4f', 'norm')}   "
          "(spin.spin_gradients)")
    return row


def show_pair_after(game, args, pair, ref, before):
    """Print what became of a pair's figures. before: as spin_gradients returned them."""
    lp = spin.all_logprobs(game.player, [pair], args.micro_batch)  # [1, 2], of the player now
    margin = spin.spin_margin(lp, ref, spin.of_iteration(args.lam, 0)).item()
    print(f"  margin {number(before['margin'], '+.4f', 'margin')} -> "
          f"{number(margin, '+.4f', 'after pairs')}   (spin.spin_margin)\n"
          f"  log p(y|x) {number(before['logprob_answer'], '.4f', 'sum')} -> "
          f"{number(lp[0, 0], '.4f', 'after pairs')}   "
          f"log p(y'|x) {number(before['logprob_rival'], '.4f', 'sum')} -> "
          f"{number(lp[0, 1], '.4f', 'after pairs')}")


LESSONS = {"selfplay": selfplay_lesson, "spin": spin_lesson}


def page_of(words):
    """(the words without --html FILE, FILE or None). Raises UserError."""
    words, path = [part for word in words for part in (
        word.split("=", 1) if word.startswith("--html=") else [word])], None
    if "--html" in words:
        i = words.index("--html")
        path, words = Path(*words[i + 1:i + 2]), words[:i] + words[i + 2:]
        if not path.name or path.is_dir() or not path.resolve().parent.is_dir():
            raise console.UserError("--html: expected a file's path in a folder that exists")
        if path.exists():
            raise console.UserError(f"--html {path} exists already: choose another name, nothing "
                                    "was touched")
    return words, path


def main(argv=None):
    """Give the lesson that the first word names. All other words are flags of that game."""
    words, page = page_of(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-h", "--help"):
        print("usage: explain.py {selfplay,spin} [--html FILE] [flags of that game]\n\n"
              f"{__doc__.strip()}")
        return
    if not words or words[0] not in LESSONS:
        raise console.UserError("the first word names the game, selfplay or spin; its flags follow")
    for word in words[1:]:
        if word.partition("=")[0] in ("--resume", "--run", "--dry-run"):
            raise console.UserError(f"{word}: a lesson is no run and saves nothing: leave it out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise console.UserError("a lesson is for one process: start it without torchrun")
    with lesson.marked() as printed:
        LESSONS[words[0]](words[1:])
    if page:
        title = {"selfplay": "One step of language self-play", "spin": "One pair of SPIN"}[words[0]]
        lesson.write_page(page, title, printed.text, MADE)
        print(f"\nopen it in a browser: {page}")


if __name__ == "__main__":
    sys.exit(console.run_command(main))
