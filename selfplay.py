"""Language Self-Play (LSP, arXiv 2509.07414): one Llama asks, answers, and learns from both.

    python selfplay.py --steps 500        LSP on the embedded default
    python selfplay.py --game lsp-zero    without the quality self-reward
    python selfplay.py --game grpo        the baseline: queries from data, no Challenger

"Embedded": a tiny trained model comes with this repository (tiny/), with a toy language. A query
and its right answer: Take "kobani", reverse it, then double every letter. -> iinnaabbookk
One step: the Challenger writes N queries q_i, and the Solver gives G answers a_ij to each.

    V(q_i)          = mean_j R(q_i, a_ij)              value: how well the query is answered
    A_Sol(q_i,a_ij) = R + R_Q - mean over the group    better than the group's other answers?
    A_Ch(q_i)       = -V + V_Q - mean over the batch   harder (and better judged) than the others?
    L_Sol = 1/(NG) sum_ij [ -pi/sg(pi) A_Sol + beta    KL(pi, pi_Ref) ]
    L_Ch  = 1/N    sum_i  [ -pi/sg(pi) A_Ch  + beta_Ch KL(pi, pi_Ref) ]
    L     = L_Sol + alpha_Ch L_Ch

    pi   the policy: one model is both players, with different prompts   sg   stop-gradient
    pi_Ref   the reference: the starting model, frozen    beta   weight of the KL term
    R    the referee's reward for an answer       R_Q  quality self-reward: the reference grades
         query and answer; 0 in lsp-zero, grpo    V_Q  the mean of R_Q over a group, as V of R
    M    one player's completions: N G answers, or N queries     n   the tokens of all of them

Simplified away:
1. Clipping of the ratio. There is one gradient step a batch, so it is 1; only its gradient counts.
2. Division by the standard deviation. Advantages are only centred, as in the paper.
3. A value network. The mean of the group stands for it.
4. Weighting by length: a text's log-probability is the sum over its tokens. (With a real model
   the default is the mean over all tokens, --aggregate token.)
Added: the gradient is scaled down to a norm of 1 (learning.CLIP; "clipped" in metrics.jsonl). The
paper does not say so. Its R_Q is 0 to 7 points. Ours is a seventh of that, times --quality: 7 with
a real model, as in the paper, and 1 on the embedded default.
recipes/plain.py is this step without any trick for speed. Begin there.
"""
import copy
import json
import math
import os
import random
import sys
import time
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

import evaluate
from model import ROOM, Llama, adapt, generate, groups, load, logprobs, pack, read_config, save
from rewards import QualityReward, WrittenQuality, load_referee, truth_of
from support import console, data, files, learning, machine, memory, record, referees, report, runs
from support.text import Tokenizer
from tiny import language


def step(game, args):
    """One step: play -> score -> update, the equations at the top in order. Returns a Step."""
    rows, answers, challenger, solver = play(game, args)  # N conversations, N lists of G texts
    queries = [row.query for row in rows]
    reward, quality = score(game, rows, answers)  # R, R_Q [N, G]
    paid = pay_of(game, args, queries, reward, quality)  # [N]: -V + V_Q
    a_sol, a_ch = advantages(reward + args.quality * quality, paid, args.advantage)  # [N, G], [N]
    losses = {"solver": gradients(game, solver, a_sol, args.kl, args)}
    if challenger:  # grpo has none
        losses["challenger"] = gradients(game, challenger, a_ch, args.kl_challenger, args,
                                         args.alpha_ch)
    norm = learning.take(game.optimizer, crew=game.crew)  # one AdamW step on L_Sol + alpha_Ch L_Ch
    return Step(queries, answers, challenger, solver, reward, quality if game.judge else None,
                a_sol, a_ch if challenger else None, losses, norm)


def advantages(solver, challenger, normalise="centre"):
    """(A_Sol [N, G], A_Ch [N]), of what both players are paid. LSP section 2.

    solver [N, G]: R + R_Q, centred over each group. challenger [N]: -V + V_Q, centred over the
    batch. Example without R_Q: R = [[1, 0, 0, 1], [0, 0, 0, 0]] gives V = [.5, 0] and A_Ch =
    [-.25, +.25]: the query that nobody answers rightly wins.

    normalise "std": also divide by the deviation, as GRPO does. Where all answers are wrong, the
    judge's small noise is then the whole signal.
    """
    a_sol = solver - solver.mean(1, keepdim=True)
    a_ch = challenger - challenger.mean()
    if normalise == "std":
        a_sol = a_sol / (solver.std(1, keepdim=True, correction=0) + 1e-4)
        a_ch = a_ch / (challenger.std(correction=0) + 1e-4)
    return a_sol, a_ch


def player_loss(lp, ref, owner, here, advantage, weight, beta, kl_form="k3"):
    """L_Sol or L_Ch over the completions of one micro-batch: {"loss", "policy", "kl"}.

        L = 1/M sum_m weight_m [ -pi/sg(pi) A_m + beta KL_m ]         LSP section 2

    lp, ref [n]: log-probabilities of tokens under policy and reference. owner [n]: whose token.
    here [u]: the owners, the completions of this micro-batch. advantage [M] and weight [M] (see
    AGGREGATE) are of all the player's completions, in this micro-batch or not.
    The terms of all micro-batches add up to the whole loss.
    loss has a gradient; policy and kl (the sum over tokens, not yet divided by M) are figures.
    """
    M = len(advantage)
    zeros = torch.zeros(M, device=lp.device)
    log_pi = zeros.index_add(0, owner, lp)  # [M]: of a text, the sum over its tokens
    ratio = (log_pi - log_pi.detach()).exp()  # [M]: pi/sg(pi) is 1, with the gradient of log pi
    policy = -ratio * advantage  # [M]
    kl = zeros.index_add(0, owner, KL[kl_form](ref - lp))  # [M]
    loss = weight * (policy + beta * kl)  # [M]
    # Only completions of this micro-batch count: the others have no tokens here.
    return {"loss": loss[here].sum() / M,
            "policy": (weight * policy)[here].detach().sum() / M,
            "kl": kl[here].detach().sum()}


# What the Challenger is paid for each query [N]: a function of the query texts, R [N, G] and R_Q
# [N, G], weighted by --quality. With rewards of 0 and 1, p = V is the share of right answers. Only
# LSP's pays for quality. All others pay least at p = 0 and p = 1: nothing is learnt there.
PAY = {
    "minimax": lambda queries, R, R_Q: -R.mean(1) + R_Q.mean(1),  # LSP, 2509.07414: -V + V_Q
    # R-Zero, 2508.05004, without its penalty for repetition
    "r-zero": lambda queries, R, R_Q: 1 - 2 * (R.mean(1) - 0.5).abs(),
    # Absolute Zero, 2505.03335
    "absolute-zero": lambda queries, R, R_Q: (1 - R.mean(1)) * (R.mean(1) > 0),
    "sqlm": lambda queries, R, R_Q: ((R.mean(1) > 0) & (R.mean(1) < 1)).float(),  # SQLM, 2508.03682
    # SPICE, 2510.24684
    "spice": lambda queries, R, R_Q: torch.exp(
        -((R.mean(1) * (1 - R.mean(1)) - 0.25) ** 2) / (2 * 0.01)),
}

# The loss is a mean over M completions. Each is multiplied by this weight, a function of the
# lengths in tokens [M].
AGGREGATE = {
    "sum": lambda length: torch.ones_like(length),  # LSP: a text's log-probability is a sum
    "mean": lambda length: 1 / length,  # GRPO: punishes long wrong answers less for each token
    "token": lambda length: (len(length) / length.sum()).expand_as(length),  # DAPO: tokens alike
}

# The KL term of a token, from d = log pi_Ref - log pi.
KL = {
    # exp(d) - d - 1: never negative. Its mean over pi's samples is KL(pi, pi_Ref); its gradient
    # there is that of KL(pi_Ref, pi), which pulls pi towards pi_Ref, too.
    "k3": lambda d: d.expm1() - d,
    # d^2 / 2: the other way round. Its gradient over pi's samples is that of KL(pi, pi_Ref), the
    # paper's term; its value is that KL only where pi is close to pi_Ref.
    "k2": lambda d: d * d / 2,
    "literal": lambda d: -d,  # as LSP prints it: on-policy, its expected gradient is 0
}


class Player(NamedTuple):
    """One player's part in a step: what it was given, and what it sampled."""
    prompts: list  # lists of ids: the Challenger's one (of each process), or the Solver's N
    completions: list  # for each prompt a list of lists of ids
    finished: list  # M bools: False where the length limit cut it
    logprobs: torch.Tensor  # [n]: log pi as sampled, for the entropy in metrics.jsonl alone


class Step(NamedTuple):
    """What happened in a step: selfplay.step returns it, support/record.py writes it down."""
    queries: list  # N texts
    answers: list  # N lists of G texts
    challenger: Player  # None in grpo
    solver: Player
    reward: torch.Tensor  # R [N, G]
    quality: torch.Tensor  # R_Q [N, G], 0 to 1, not yet weighted; None without a judge
    a_sol: torch.Tensor  # [N, G]
    a_ch: torch.Tensor  # [N]; None in grpo
    losses: dict  # {"solver": {"loss", "policy", "kl"}, "challenger": ..}
    norm: float  # of the gradient, before clipping; no step was taken if it is not finite


class Game(NamedTuple):
    """What a run is played with: `set_up` makes it from the settings."""
    model: Llama  # both players
    reference: Llama  # the starting model, frozen: for the KL, as judge, and for the last score
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # all sampling
    rng: random.Random  # which instructions of the data
    prompt: list  # the Challenger's, ids; None in grpo
    ask: Callable  # () -> a Row of the data, in grpo
    referee: Callable  # (queries, answers) -> R
    pay: Callable  # (queries, R, R_Q) -> what the Challenger is paid
    judge: Callable  # (queries, answers) -> R_Q; None in lsp-zero and grpo
    start: int  # fingerprint of the starting model and the data
    held: list  # texts or Rows for the scores; None: the Challenger's last queries
    truth: Callable  # the referee of the scores; None where nothing knows the truth
    crew: machine.Crew  # the processes that play together; mostly one alone


# --------------------------------------------------------------------------------------------------
# Play, score, update

# The Challenger's prompt for a model that does not speak the embedded language. Both variables are
# optional (LSP section 2.2).
CHALLENGER_PROMPT = """Write one input that puts another assistant to the test.
{task}{template}Write exactly one valid input{of_task}. It may be easy, hard or noisy, whatever \
tests the assistant best. \
Write nothing else: no answer, no hint, no comment. Stop as soon as the input is complete."""


def challenger_prompt(tokenizer, task=None, template=None):
    """Ids of the Challenger's prompt: the embedded language's, or LSP's with task and template."""
    text = language.CHALLENGER_PROMPT
    if not language.spoken_by(tokenizer):
        form = f"Template, every placeholder of which you fill in: {template}\n" if template else ""
        text = CHALLENGER_PROMPT.format(task=f"Task: {task}\n" if task else "", template=form,
                                        of_task=" for this task" if task else "")
    return tokenizer.chat([{"role": "user", "content": text}])


def play(game, args):
    """Both players' moves: (rows, answers, challenger or None, solver).

    rows: N Rows; the query is a conversation's last message. Of several processes, each plays its
    share of the N queries; all of them get what all played.
    """
    model, tokenizer, crew = game.model, game.tokenizer, game.crew
    limits = args.query_tokens, args.answer_tokens
    with machine.resident(model):
        if game.prompt is None:
            challenger = None
            rows = crew.share([game.ask() for _ in range(args.queries)])
        else:
            out = generate(model, [game.prompt], args.queries // crew.size, limits[0],
                           args.temperature, game.generator)
            challenger = as_player([game.prompt], out)
            # A query is plain text of a user turn: nothing in it can become a special token.
            texts = [tokenizer.spoken(tokenizer.decode(ids)) for ids in out.ids]
            rows = [data.Row([{"role": "user", "content": text}]) for text in texts]
        # A sampled text may have more tokens when it is encoded again: what is too long is cut.
        room = model.config.context - args.answer_tokens
        prompts = [tokenizer.chat(row.messages, room=room) for row in rows]
        out = generate(model, prompts, args.answers, limits[1], args.temperature, game.generator)
    answers = groups([tokenizer.decode(ids) for ids in out.ids], args.answers)
    return crew.merged((rows, answers, challenger, as_player(prompts, out)))


def as_player(prompts, rollout):
    """The Player who was given these prompts and sampled this Rollout."""
    completions = groups(rollout.ids, len(rollout.ids) // len(prompts))
    return Player(prompts, completions, rollout.finished, torch.cat(rollout.logprobs).cpu())


def score(game, rows, answers):
    """(R, R_Q) [N, G] of a step's texts. R_Q is 0 without a judge.

    Of several processes each scores its share.
    """
    rows, answers = game.crew.share(rows), game.crew.share(answers)
    queries = [row.query for row in rows]
    # A thought, <think>..</think>, is kept in the game. It is not part of what is graded.
    answers = [[game.tokenizer.spoken(text) for text in group] for group in answers]
    reward = referees.judged(game.referee, queries, answers, data.columns(rows))
    quality = torch.zeros_like(reward)
    if game.judge:
        quality = referees.judged(game.judge, queries, answers, what="judge")
    return game.crew.merged((reward, quality))


def pay_of(game, args, queries, reward, quality):
    """What the Challenger is paid for its N queries, [N]. Raises UserError.

    R_Q is weighted by --quality here, too, or by --quality-challenger.
    """
    own = args.quality_challenger
    quality = (args.quality if own is None else own) * quality
    inside = bool(((reward >= 0) & (reward <= 1)).all())
    if args.pay in PAY and args.pay != "minimax" and not inside:
        raise console.UserError(f"--pay {args.pay} is for rewards between 0 and 1, and --reward "
                                f"{args.reward} gave {reward.min():.3g} to {reward.max():.3g}: "
                                "bring them there, or take --pay minimax")
    paid = game.pay([*queries], reward.clone(), quality.clone())
    return referees.numbers(paid, [len(queries)], f"the pay {args.pay}")


def gradients(game, player, advantage, beta, args, alpha=1.0):
    """Add the gradient of alpha * L, one player's loss. Returns {"loss", "policy", "kl"}.

    advantage: [N, G] or [N]. beta: weight of the KL term. kl is a mean over tokens, in nats.
    A completion lies in one micro-batch, so the split into micro-batches changes nothing.
    Of several processes, each computes its share, and backward() averages their gradients
    (machine.shard).
    """
    crew, device = game.crew, game.model.cos.device
    prompts, completions = crew.share(player.prompts), crew.share(player.completions)
    packs = pack(prompts, completions, args.micro_batch, device)
    lengths = torch.tensor([float(len(ids)) for group in player.completions for ids in group])
    weight = crew.share(AGGREGATE[args.aggregate](lengths)).to(device)  # [M]
    advantage = crew.share(advantage).flatten().to(device)  # [M]
    with torch.no_grad(), machine.resident(game.reference):
        refs = [logprobs(game.reference, packed, args.temperature) for packed in packs]
    figures = []  # of each micro-batch, on the device: to read them now would be to wait for it
    # active: False for a micro-batch that is only repeated, to keep the processes together.
    for (packed, ref), active in crew.in_step(list(zip(packs, refs))):
        lp = logprobs(game.model, packed, args.temperature)
        terms = player_loss(lp, ref, packed.owner, packed.here, advantage, weight, beta,
                            args.kl_form)
        (active * alpha * terms["loss"]).backward()
        if active:
            figures.append(torch.stack([term.detach() for term in terms.values()]))
    loss, policy, kl = (sum(crew.all(sum(values)))
                        for values in zip(*torch.stack(figures).tolist()))
    return {"loss": loss / crew.size, "policy": policy / crew.size,
            "kl": kl / lengths.sum().item()}


# --------------------------------------------------------------------------------------------------
# Settings

NUMBER, COUNT = console.positive(float), console.positive(int)
ZERO_TOO = console.positive(float, zero=True)

# A row: flag, kind, default on the embedded model, default on a real one, help. The paper states
# queries, lr, kl and "at least" so many steps for a real model; the rest of that column is ours.
SETTINGS = [
    "the game",
    ("--game", ("lsp", "lsp-zero", "grpo"), "lsp", "lsp",
     "lsp-zero: no quality self-reward; grpo: queries from data, no Challenger"),
    runs.MODEL,
    ("--reward", {str}, "exact", None,
     "the referee: exact (the embedded language's solver), math (what an answer comes to, against "
     "--data's), majority (what most answers of a group come to), file.py:function, or a reward "
     "model's folder or hub name; it may end in :weight, and several are summed up"),
    ("--data", str, None, None,
     "for grpo: a file (JSONL, JSON, CSV, Parquet) or hub dataset in one of the shapes of "
     "support/data.py; without it: the embedded language's instructions"),
    runs.SPLIT,
    runs.EVAL_DATA,
    runs.EVAL_SPLIT,
    runs.SKIP_BAD_ROWS,
    ("--task", str, None, None,
     "with a real model: what the Challenger writes an input for; without it: its own judgement"),
    ("--template", str, None, None,
     "with a real model: a form with placeholders that the Challenger fills in"),
    ("--pay", str, "minimax", "minimax",
     f"what the Challenger is paid for a query: {', '.join(PAY)}, or file.py:function of (query "
     "texts, R, R_Q)"),
    ("--steps", COUNT, 500, 1500, "optimizer steps, one batch of games each"),
    ("--queries", COUNT, 32, 8, "N, queries a step"),
    ("--answers", COUNT, 16, 8,
     "G, answers to each query; what they begin with alike is computed once"),
    ("--temperature", NUMBER, 1.0, 1.0, "of sampling and of training alike"),
    ("--query-tokens", COUNT, 48, 256, "longest query"),
    runs.ANSWER_TOKENS,
    runs.TEMPLATE_ARGS,
    "the loss",
    ("--lr", NUMBER, 1.5e-4, 3e-6,
     "learning rate of AdamW (grpo with a real model: 1e-06; with --lora: ten times as much); it "
     "rises for 20 steps, then falls linearly towards 0"),
    ("--alpha-ch", ZERO_TOO, 0.005, 0.1,
     "alpha_Ch, weight of the Challenger's loss; with more it asks what nobody can answer, with 0 "
     "it is not trained"),
    ("--quality", ZERO_TOO, 1.0, 7.0,
     "weight of the quality self-reward R_Q, in lsp; R_Q is 0 to 1, so 7 counts points"),
    ("--quality-challenger", ZERO_TOO, None, None,
     "the same in what the Challenger is paid; without it: as --quality, as in the paper"),
    ("--judge", str, "expected", "expected",
     "who gives R_Q: expected, the reference by its mean grade; written (with a real model), by a "
     "verdict in words, as in the paper; or file.py:function of (query texts, answers), 0 to 1"),
    ("--kl", ZERO_TOO, 0.005, 0.05, "beta, weight of the Solver's KL to the starting model"),
    ("--kl-challenger", ZERO_TOO, 0.1, 0.05,
     "beta_Ch, the same for the Challenger; the paper has one beta for both"),
    ("--kl-form", tuple(KL), "k3", "k3",
     "k2: its gradient is that of the paper's KL; k3: of the reversed KL; literal: as printed in "
     "the paper, its mean gradient is 0"),
    ("--advantage", ("centre", "std"), "centre", "centre", "std: also divide by the deviation"),
    ("--aggregate", tuple(AGGREGATE), "sum", "token",
     "how a text's tokens are weighted: sum (LSP), mean over its own (GRPO), or over all (DAPO)"),
    *runs.SETTINGS,
    ("--eval-every", COUNT, 50, 150,
     "steps between scores on held-out questions, for the curves; 200 questions, or fewer"),
    ("--keep-every", COUNT, None, None,
     "steps between models that are kept beside the last one, as step-N in the run's folder"),
    ("--show-every", COUNT, 100, 100, "print one game every so many steps"),
    ("--dry-run", bool, False, False,
     "only say what memory these settings need and how long a step takes; save nothing"),
]


# Flags that mean nothing in a game: they are refused there.
IDLE = {"grpo": ("--pay", "--alpha-ch", "--kl-challenger", "--query-tokens", "--quality",
                 "--quality-challenger", "--judge", "--task", "--template"),
        "lsp-zero": ("--quality", "--quality-challenger", "--judge")}
UNTRAINED = "--pay", "--quality-challenger", "--kl-challenger"  # idle: no loss of the Challenger


def parse_args(argv=None):
    """The settings of a command line. Raises UserError, or exits with 2, where one is refused."""
    about = "selfplay.py", "Language Self-Play: a Llama that learns from questions of its own."
    args = console.parse(SETTINGS, argv, *about)
    if args.resume:
        return runs.resumed(argv, console.parse(SETTINGS, [], *about))
    real = not language.spoken_by(runs.model_folder(args.model))
    others = {"lr": 1e-6} if real and args.game == "grpo" else {}
    if args.lora:
        usual = console.parse(SETTINGS, [], *about, real=real, **others)
        others["lr"] = runs.LORA_RATE * usual.lr
    args = console.parse(SETTINGS, argv, *about, real=real, **others)
    args.model = str(runs.model_folder(args.model))  # a run's folder stands for its model
    console.refuse_idle(argv, f"--game {args.game}", IDLE.get(args.game, ()))
    if args.alpha_ch == 0:
        console.refuse_idle(argv, "--alpha-ch 0", UNTRAINED)
    refuse(args, real)
    return args


def refuse(args, real):
    """Raise UserError for settings that do not go together."""
    grpo, foreign = args.game == "grpo", f"{args.model} does not speak the embedded language"
    if args.run is not None:
        runs.check_name(args.run)
    console.assignments(args.template_args)
    runs.check_lora(args)
    data.refuse_splits(args)
    for refused, why in (
            (real and grpo and not args.data, f"{foreign}: name --data for it to answer"),
            (real and (not args.reward or "exact" in dict(console.specs(args.reward))),
             f"{foreign}, so --reward exact cannot judge it: name a reward model, "
             "file.py:function, majority, or math"),
            (args.quality == 0 and not args.quality_challenger and args.game == "lsp",
             "--quality 0 leaves the judge out: that is --game lsp-zero"),
            (args.judge == "written" and not real,
             "--judge written is for models that do not speak the embedded language: that one's "
             "judge can only say a digit"),
            (not real and (args.task or args.template),
             "--task and --template are for models that do not speak the embedded language: this "
             "one has its own Challenger's prompt"),
            (args.pay in PAY and args.pay != "minimax" and files.reward_models(args.reward),
             f"--pay {args.pay} is for rewards between 0 and 1; a reward model's have no bounds"),
            (args.answers == 1,
             "--answers 1 teaches nothing: an answer is compared with the others of its group, so "
             "alone its advantage is always 0"),
            (args.queries == 1 and not grpo and args.alpha_ch > 0,
             "--queries 1 teaches the Challenger nothing: a query is compared with the others of "
             "its step, so alone its advantage is always 0; if you want that, --alpha-ch 0"),
            (args.kl_form != "k3" and args.kl == args.kl_challenger == 0,
             "--kl-form is the form of the KL term, which --kl 0 and --kl-challenger 0 leave out"),
            (args.skip_bad_rows and not (args.data or args.eval_data),
             "--skip-bad-rows is about --data: name one"),
            (args.data and not grpo,
             "--data is for --game grpo: in the other games the Challenger writes the queries"),
            ("math" in dict(console.specs(args.reward)) and not args.data,
             "--reward math knows the right answers from --data alone")):
        if refused:
            raise console.UserError(why)


# --------------------------------------------------------------------------------------------------
# A run

def set_up(args, device, crew=machine.Crew()):
    """The Game of these settings: models loaded, referee and judge ready. Raises UserError."""
    machine.check_dtype(device, args.dtype)
    dtype, alone = machine.DTYPES[args.dtype], crew.size == 1
    template = args.date, console.assignments(args.template_args)
    # Before anything is read, and again where the data has longer prompts than were planned for.
    longest = args.query_tokens + 64  # tokens of the longest prompt
    runs.check_memory(plan, args, device, crew.size, longest=longest)
    # Data, referee and pay first: what is wrong with them shows before a large model is loaded.
    rows, held = data.read_both(args)
    if rows or held:
        tokenizer = Tokenizer(files.find(args.model), *template)
        reads = [(lambda row: tokenizer.chat(row.messages), read_config(args.model)[0].context)]
        (rows, first), (held, second) = (data.fitting(args, x, reads) for x in (rows, held))
        if max(first, second) > longest:
            runs.check_memory(plan, args, device, crew.size, longest=max(first, second))
    config, count = read_config(args.model)
    adapters = config.adapter_size(args.lora, args.lora_targets)
    kept = (args.steps - 1) // args.keep_every if args.keep_every else 0
    runs.check_disk(args, count, adapters, optimizer_floats=2, models=1 + kept)
    referee, readers, pay, judge = load_judgement(args, device, dtype, template, rows, held)
    # Several processes share the weights out, and each begins with all of them on the CPU. There
    # the reference is loaded anew, so that each process holds one whole copy at a time. (With LoRA
    # each process has the whole frozen model, and only the adapters' gradients are exchanged.)
    where = (device, dtype) if alone or args.lora else ("cpu", torch.float32)
    model, tokenizer = load(args.model, *where, *template)
    model.recompute = args.low_memory
    start = learning.fingerprint(model, [*(rows or []), *(held or [])] or None)
    if args.lora:
        reference = adapt(model, args.lora, args.lora_alpha, args.lora_targets, args.seed)
    elif alone:
        reference = copy.deepcopy(model).requires_grad_(False)
    else:
        machine.shard(model, device, dtype)
        reference = load(args.model, *where, *template)[0].requires_grad_(False)
        machine.shard(reference, device, dtype)
    if alone and args.low_memory and device.startswith("cuda"):
        own = [] if args.lora else [reference]  # with LoRA its weights are the model's
        for frozen in own + [part.model for part in readers]:
            machine.offload(frozen)
    if args.game == "lsp" and args.judge == "expected":
        judge = QualityReward(reference, tokenizer, args.micro_batch)
    elif args.game == "lsp" and args.judge == "written":
        judge = WrittenQuality(reference, tokenizer)
    prompt = None
    if args.game != "grpo":
        prompt = challenger_prompt(tokenizer, args.task, args.template)
    reads = [(lambda row, part=part: part.ids(row.messages, ""), part.model.config.context)
             for part in readers]
    rows, held = (data.fitting(args, x, reads)[0] if reads else x for x in (rows, held))
    if not rows:
        own = [(lambda row: tokenizer.chat(row.messages), model.config.context)]
        data.check_longest(args, prompt, own + reads, judge)
    for remark in tokenizer.remarks:
        console.note(remark)
    optimizer = learning.optimizer_for(model, torch.optim.AdamW, lr=args.lr, weight_decay=0.0,
                                       fused=True)
    # No two processes may play the same games, and all must draw the same instructions.
    generator = torch.Generator(device).manual_seed(crew.seed(args.seed))
    rng = random.Random(args.seed)

    embedded = language.spoken_by(args.model)
    if embedded and held is None:
        held = [data.Row([{"role": "user", "content": query}], language.solve(query))
                for query in language.evaluation_set(args.eval_items)]

    def ask():
        if rows:
            return rng.choice(rows)
        return data.Row([{"role": "user", "content": language.draw(rng)}])
    return Game(model, reference, tokenizer, optimizer, generator, rng, prompt, ask, referee, pay,
                judge, start, held and held[:args.eval_items],
                truth_of(referee, embedded and not args.data, held), crew)


def load_judgement(args, device, dtype, template, rows, held):
    """(referee, those of its parts that are reward models, pay, judge). Raises UserError.

    rows: to learn from, or None. held: for scores, or None. judge: of the user's own, or None.
    """
    referee = load_referee(args.reward, device, dtype, template, args.micro_batch)
    parts = referees.parts_of(referee)
    for part in parts:  # is all at hand that they ask for?
        for asked in (rows or [data.Row([])], held or rows or [data.Row([])]):
            console.asked_for(part, data.columns(asked))
    pay = PAY.get(args.pay) or console.users_function(
        args.pay, "--pay", "pay", f"{', '.join(PAY)} or file.py:function", given=3)
    judge = None
    if args.judge not in ("expected", "written"):
        judge = console.users_function(args.judge, "--judge", "judge",
                                       "written, expected or file.py:function")
    return referee, [part for part in parts if hasattr(part, "ids")], pay, judge


def plan(args, processes=1, longest=None):
    """The memory.plan of these settings, for each process, before any weights are loaded.

    longest: tokens of the longest prompt.
    """
    config, own = read_config(args.model)
    adapters = config.adapter_size(args.lora, args.lora_targets)
    asked = [read_config(name)[1] for name in files.reward_models(args.reward)]
    cuda, games = args.device.startswith("cuda"), args.queries * args.answers
    longest = longest or args.query_tokens + 64
    text, room = longest + args.answer_tokens, ROOM * processes  # scores, of each process
    return memory.plan(config, machine.DTYPES[args.dtype], own, optimizer_floats=2,
                       positions=max(games * text, room), sampled=games,
                       read=max(args.queries * longest, room * longest // text),
                       tokens=max(args.micro_batch, text), adapters=adapters,
                       recompute=args.low_memory, frozen=asked if args.lora else [own, *asked],
                       offloaded=args.low_memory and cuda, processes=processes, fused=cuda)


def dry_run(args, device):
    """--dry-run: what memory a run needs, and how long a step takes. Nothing is saved.

    Raises UserError where the model does not fit, or only its config.json is there.
    """
    try:
        game = set_up(args, device)
    except console.UserError as error:
        raise console.UserError(f"{error}; so no step was timed") from None
    for name in ("first", "second"):
        began = time.perf_counter()
        step(game, args)
        seconds = time.perf_counter() - began
        print(f"{name} step: {seconds:.2f} seconds")
    print(f"{args.steps} steps like the second: {args.steps * seconds / 60:.1f} minutes; "
          "nothing was saved")


def train(game, run, args):
    """Step after step, from where the run stands, with a record of each.

    Returns the number of the last step. Raises UserError where a gradient is not finite.
    """
    crew, facts = game.crew, run.facts
    done, recent, said = facts["step"], facts["recent"], facts["said"]
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, unit="step",
               disable=True if crew.rank else None, dynamic_ncols=True)
    with runs.stop_asked() as asked, bar:
        for number in bar:
            began = time.perf_counter()
            rise, fall = number / 20, 1 - (number - 1) / args.steps
            learning.set_rate(game.optimizer, args.lr * min(rise, fall))
            played = step(game, args)

            valid = referees.which_valid(game.referee, played.queries)
            games = record.game_records(played, valid)
            games = json.dumps({"step": number, "games": games}) + "\n"
            if not math.isfinite(played.norm):
                not_finite(run, number, played.norm, games)
            row = {"step": number} | record.measure(played, valid)
            for source in (game.referee, game.judge):  # what they say of themselves
                for name, value in getattr(source, "figures", {}).items():
                    row[name] = sum(crew.all(value)) / crew.size
            if number % args.eval_every == 0 and game.held and game.truth:
                row |= held_scores(game, args)
            row["seconds"] = time.perf_counter() - began
            run.metrics.write(json.dumps(row) + "\n")
            run.games.write(games)
            done, recent = number, [*recent, row][-record.WINDOW:]
            for sentence in record.watch(recent, said, args.game):
                bar.write(sentence)
                if not crew.rank:
                    (run.folder / "warnings.txt").write_text(
                        "\n".join(said.values()) + "\n", encoding="utf-8")
            shown = ("reward", "quality", "malformed", "valid", "kl_solver")
            bar.set_postfix_str("  ".join(f"{key} {row[key]:.2f}" for key in shown if key in row))
            if number % args.show_every == 0 or number == 1:
                bar.write("\n" + record.game_text(number, played, valid))
            stop = any(crew.all(bool(asked)))
            if args.keep_every and number % args.keep_every == 0 and number < args.steps:
                save(game.model, run.folder / f"step-{number}")
            if run.due(number) or stop or number == args.steps:
                run.checkpoint(game.optimizer, game.generator, {
                    "step": number, "rng": game.rng.getstate(), "said": said, "recent": recent})
            if stop:
                break
    return done


def not_finite(run, number, norm, games):
    """Keep the games of a step whose gradient was not finite, and raise UserError."""
    path = run.folder / "not-finite.json"
    if not run.crew.rank:
        path.write_text(games, encoding="utf-8")
    raise console.UserError(f"step {number}: the gradient's norm is {norm}; the step was not "
                            f"taken, its games are in {path}; try a smaller --lr in a new run")


def held_scores(game, args):
    """Mean rewards on held-out questions: {"held_sampled", "held_greedy"}, of 200 at the most."""
    with machine.resident(game.model):
        rates = evaluate.rate(game.model, game.tokenizer, game.held[:200], 0, game.truth,
                              args.answer_tokens, samples=1)
    return {f"held_{way}": rewards.mean().item() for way, rewards in rates.items()}


def compare(game, run, args):
    """The scoreboard: the start and the trained model on held-out questions.

    Where nothing is held out, on the Challenger's last queries.
    """
    held = game.held
    if game.truth is None or held == []:
        lacks = "no questions are held out, and --eval-data names none" if game.truth else (
            "--reward majority alone does not know what is right")
        print(f"no scoreboard: {lacks}")
        return
    with machine.resident(game.model), machine.resident(game.reference):
        if game.crew.rank:
            return
        if held is None:
            held = record.last_queries(run.folder, args.eval_items)
            print(f"\nthe scores are on the Challenger's last {len(held)} queries")
        players = {"start": game.reference, "now": game.model}
        evaluate.compare(players, game.tokenizer, held, game.truth, args.answer_tokens, args.seed,
                         run.folder / "evaluation.json")


def main(argv=None):
    """Play step by step into a run's folder, and then show the scoreboard."""
    args = parse_args(argv)
    crew, device = machine.join(args.device)
    if crew.size > 1 and (args.dry_run or args.queries % crew.size):
        raise console.UserError(f"{crew.size} processes play together without --dry-run, and share "
                                "--queries out evenly")
    if crew.rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the first process speaks for all
    heading = f"{args.game} on {args.model}: {read_config(args.model)[1]:,} parameters, "
    if args.dry_run:
        print(f"{heading}{args.dtype}", flush=True)
        return dry_run(args, device)
    game = set_up(args, device, crew)
    with runs.open_run(args, game.start, crew, step=0, said={}, recent=[]) as run:
        first = run.facts["step"]
        if run.tensors:
            run.restore(game.model, game.optimizer, game.generator, game.rng)
        print(f"{heading}{args.queries} queries x {args.answers} answers a step, seed {args.seed}, "
              + (f"on from step {first} of {run.folder}" if first else f"into {run.folder}"))
        if args.aggregate != "mean":
            print("a loss near 0 in metrics.jsonl is normal: advantages are centred, so only the "
                  "KL is left in it; its gradient is not 0")
        began = time.perf_counter()
        done = train(game, run, args)
        save(game.model, run.folder / "model")
        if done < args.steps:
            print(f"stopped after step {done}; saved what there is: "
                  f"python selfplay.py --resume {run.folder} goes on")
        minutes = (time.perf_counter() - began) / 60
        print(f"\n{done - first} steps in {minutes:.1f} minutes; "
              f"the model is in {run.folder / 'model'}", flush=True)
        if done:
            compare(game, run, args)
        machine.leave(crew)
        if not crew.rank:
            report.show_run(run.folder)
            if done == args.steps:
                run.end()


if __name__ == "__main__":
    sys.exit(console.run_command(main))
