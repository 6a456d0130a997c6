"""Self-Play Fine-Tuning (SPIN, arXiv 2401.01335): a Llama learns to tell people's answers from its
own of an iteration ago.

    python spin.py                                     SPIN on the embedded default
    python spin.py --game sft                          baseline: fine-tuning on the same answers
    python spin.py --iterations 1 --epochs 14          baseline: one opponent, about as many updates
    python spin.py --model FOLDER --data FILE.jsonl    your Llama, your people
    torchrun --nproc-per-node 8 -- spin.py ..          the same, played by eight processes

("Embedded": a tiny trained model comes with this repository, in tiny/, with a toy language.)
Iteration t has prompts x, people's answers y, and the opponent p_t. The opponent is the player p as
the iteration before left it. It writes answers, too, and is the reference of the loss. No second
model is kept: its answers y' and all log p_t are computed before p moves (`opponent_plays`).

    y' ~ p_t(. | x)                                                  the opponent's answer
    m  = lambda ( log p(y|x)/p_t(y|x)  -  log p(y'|x)/p_t(y'|x) )    the margin
    L  = mean log(1 + exp(-m))                                       eq. 4.7

The player starts as its opponent, so at first every margin is 0, and L is log 2 = 0.693. Its
gradient is not 0: it is lambda/2 times that of log p(y'|x) - log p(y|x). Training makes people's
answers more probable, compared with the opponent's. The trained player is the next opponent. Where
p_t answers as people do, y and y' cannot be told apart, and nothing moves on average.
From iteration 1 on, the previous iteration's pairs are mixed in, with new log-probabilities.

Choices: the embedded default's answers have 6 tokens and not 256, and it has 0.76 million
parameters and not 7 billion. So lambda is 1 (the paper's 0.1 hardly ties so short an answer to the
opponent), the learning rate is larger, and there are fewer pairs. `-h` shows the paper's settings
beside them; they are the defaults with a real model.
"""
import json
import math
import os
import random
import shutil
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from model import ROOM, Llama, adapt, groups, load, logprobs, pack, read_config, sample_parts, save
from support import console, data, learning, machine, memory, record, report, runs
from support.text import Tokenizer
from tiny import language


def spin_margin(lp, ref, lam):
    """m [n]. lp, ref [n, 2]: log-probabilities of answer and rival under player and opponent."""
    ratio = lp - ref  # [n, 2]: log p / p_t
    return lam * (ratio[:, 0] - ratio[:, 1])


# The loss of a margin: any convex function that falls will do (SPIN section 4.1).
LOSS = {
    "logistic": lambda m: F.softplus(-m),  # log(1 + exp(-m)), eq. 4.7
    "hinge": lambda m: F.relu(1 - m),
    "exponential": lambda m: (-m).exp(),
}


def spin_loss(lp, ref, lam, form="logistic"):
    """The loss [n] of each pair. lp, ref [n, 2]: see spin_margin."""
    return LOSS[form](spin_margin(lp, ref, lam))


def opponent_plays(game, args, it, keep=lambda it: False):
    """Iteration t, first half: the opponent p_t answers. Returns the Iteration to train on.

    The player still is p_t. All that p_t is needed for is computed here, before the player moves.
    it: the iteration, with no rivals yet, or only some. keep(it): asked after each batch, with what
    there is; if it says True, the run is to stop, and `it` comes back unfinished: its ref is None.
    """
    crew, ref, left = game.crew, [], sum(not pair.rival for pair in it.pairs)
    # A share is of all new pairs, answered or not: so a run that goes on shares them out as before.
    own = crew.share(range(len(it.pairs))[-len(it.chosen):])
    missing = [i for i in own if not it.pairs[i].rival]
    prompts = [it.pairs[i].prompt for i in missing]
    batches = opponent_answers(game.player, prompts, args.answer_tokens, game.generator)
    answered = ([(missing[i], ids) for i, ids in zip(*batch)] for batch in batches)
    with machine.resident(game.player):
        with console.progress("the opponent answers", left) as bar:
            # A batch of each process in each round. One that is through adds nothing to it.
            while found := crew.merged(next(answered, [])):
                for i, rival in found:
                    it.pairs[i] = it.pairs[i]._replace(rival=rival)
                bar.update(len(found))
                if keep(it):
                    return it
        with console.progress("their log p_t", len(it.pairs)) as bar:
            for part in groups(it.pairs, PART * crew.size):
                ref.append(all_logprobs(game.player, part, args.micro_batch, crew))
                bar.update(len(part))
                if keep(it):
                    return it
    return it._replace(ref=torch.cat(ref))  # [M, 2]


def player_trains(game, args, it, optimizer, skip=0):
    """Iteration t, second half: epochs over the pairs. Yields the figures of each update.

    skip: updates of this iteration that were made before the run was stopped.
    """
    order = [game.rng.sample(range(len(it.pairs)), len(it.pairs)) for _ in range(args.epochs)]
    batches = [batch for epoch in order for batch in groups(epoch, args.batch)]
    lam, lr = of_iteration(args.lam, it.number), of_iteration(args.lr, it.number)
    for i, batch in list(enumerate(batches))[skip:]:
        began = time.perf_counter()
        pairs = [it.pairs[j] for j in batch]
        # As in the paper: the rate rises over the first tenth, then falls to 0.
        rise, fall = (i + 1) / (0.1 * len(batches)), (len(batches) - i) / (0.9 * len(batches))
        learning.set_rate(optimizer, lr * min(rise, fall, 1.0))
        if args.game == "spin":
            row = spin_gradients(game.player, pairs, it.ref[batch], lam, args, game.crew)
        else:
            row = sft_gradients(game.player, pairs, args, game.crew)
        row["gradient_norm"] = learning.take(optimizer, crew=game.crew)
        yield row | {"seconds": time.perf_counter() - began}


def spin_gradients(player, pairs, ref, lam, args, crew=machine.Crew()):
    """Add the gradient of the mean loss over a batch of pairs; ref [n, 2]. Returns its figures.

    {"loss", "margin", "accuracy", "logprob_answer", "logprob_rival"}. accuracy: the share of pairs
    whose margin is above 0, where the player tells people's answer from the opponent's. Where
    answer and rival are the same, the margin is 0 whatever the player does. Such a pair counts in
    the loss, as a constant, and is not computed. The other figures are means over the rest, and
    there are none where no pair is left.
    Of several processes, each computes its share of the rest. backward() averages their gradients
    (machine.shard): times the number of processes, that is the sum over all shares.
    """
    different = [i for i, pair in enumerate(pairs) if pair.answer != pair.rival]
    constant = (len(pairs) - len(different)) * LOSS[args.loss](torch.zeros(())).item()
    found = []  # of each micro-batch, on the device: to read them now would be to wait for it
    ref = crew.share(ref[different]).to(player.embed.weight.device)
    for here, lp in pair_logprobs(player, [pairs[i] for i in different], args.micro_batch, crew):
        loss = spin_loss(lp, ref[here], lam, args.loss).sum()
        (crew.size * loss / len(pairs)).backward()
        margin = spin_margin(lp.detach(), ref[here], lam)  # [n]
        figures = [loss.detach(), margin.sum(), (margin > 0).sum(), *lp.detach().sum(0)]
        found.append(torch.stack(figures))
    if not different:
        return {"loss": torch.tensor(constant).item() / len(pairs)}
    total = torch.tensor([constant / crew.size, 0.0, 0.0, 0.0, 0.0])
    for figures in torch.stack(found).cpu():
        total += figures
    total = sum(crew.all(total))
    mean = total / torch.tensor([len(pairs)] + 4 * [len(different)])
    names = ("loss", "margin", "accuracy", "logprob_answer", "logprob_rival")
    return dict(zip(names, mean.tolist()))


def sft_gradients(player, pairs, args, crew=machine.Crew()):
    """The baseline: the gradient of fine-tuning on the answers, a mean over their tokens.

    Returns {"loss", "logprob_answer"}. Several processes: as in spin_gradients.
    """
    tokens, losses = sum(len(p.answer) for p in pairs), []
    rows = [(p.prompt, [p.answer]) for p in pairs]
    for packed, active in shared_packs(player, rows, args.micro_batch, crew):
        loss = active * -logprobs(player, packed).sum() / tokens
        (crew.size * loss).backward()
        losses.append(loss.detach())
    total = sum(crew.all(sum(torch.stack(losses).tolist())))
    return {"loss": total, "logprob_answer": -total * tokens / len(pairs)}


class Pair(NamedTuple):
    """A prompt, people's answer, and the opponent's: lists of ids. Both end alike, unless cut."""
    prompt: list
    answer: list
    rival: list


class Game(NamedTuple):
    """What a run is played with: `set_up` makes it from the settings."""
    player: Llama
    tokenizer: Tokenizer
    data: list  # Rows, shuffled
    prompts: list  # the same, as ids
    answers: list
    cut: int  # how many of people's answers are cut at the limit
    generator: torch.Generator  # the opponent's answers
    rng: random.Random  # the order of the pairs
    start: int  # fingerprint of the starting model and the data
    held: list  # (prompt, people's answer) of held-out rows, as ids
    crew: machine.Crew  # the processes that play together; mostly one alone


class Iteration(NamedTuple):
    """What the player learns from in one iteration."""
    number: int
    before: int  # updates that earlier iterations made
    rng_state: tuple  # of the game's rng at its beginning: a run that goes on shuffles as before
    chosen: list  # which of the data its own pairs are of
    pairs: list  # M Pairs: the last iteration's, and then its own
    ref: torch.Tensor  # [M, 2]: their log-probabilities under p_t, on the CPU; None in sft


# --------------------------------------------------------------------------------------------------
# Data

def chosen_data(data, count, t):
    """Which of the data iteration t learns from: `count` new ones, round and round."""
    size = min(count, len(data))
    return [i % len(data) for i in range(t * size, (t + 1) * size)]


def of_iteration(values, t):
    """The value of iteration t in a list with one number an iteration; the last one goes on."""
    return values[min(t, len(values) - 1)]


def language_data(count):
    """Rows: the first instructions of the embedded default's own fine-tuning set.

    The set's own answers are careless in part (language.CARELESS). These are all right, as careful
    people would have answered.
    """
    conversations = language.fine_tuning_set(2 * count)  # some 70 % of them are the Solver's
    solver = [messages for part, messages, _ in conversations if part == "solver"]
    return [data.Row(messages, language.solve(messages[0]["content"]), i, source="instruction")
            for i, messages in enumerate(solver[:count], 1)]


def cut_answers(replies, limit):
    """(people's answers as lists of ids, how many were cut).

    replies: an answer's ids are those that the template writes after the prompt (Tokenizer.reply),
    so they begin and end as the opponent's would. One over `limit` tokens is cut and has no end
    token, as the opponent's: it must not teach to end there.
    """
    return [ids[:limit] for ids in replies], sum(len(ids) > limit for ids in replies)


# --------------------------------------------------------------------------------------------------
# What the opponent is asked for

def opponent_answers(opponent, prompts, limit, generator):
    """y' ~ p_t(. | x) at temperature 1. Yields (which prompts, a list of ids for each).

    An answer of `limit` tokens is cut and has no end token.
    """
    for part, found in sample_parts(opponent, prompts, 1, limit, 1.0, generator):
        yield part, [ids for ids, in found]


def shared_packs(model, rows, micro_batch, crew):
    """Micro-batches of this process's share of rows (prompt, replies): (Packed, does it count?).

    All processes get equally many (Crew.in_step). One without a share repeats the first row.
    """
    share = crew.share(rows)
    prompts, replies = ([row[i] for row in share or rows[:1]] for i in (0, 1))
    packs = pack(prompts, replies, micro_batch, model.embed.weight.device, whole=True)
    for packed, active in crew.in_step(packs):
        yield packed, active and bool(share)


def pair_logprobs(model, pairs, micro_batch, crew=machine.Crew()):
    """For each micro-batch of Pairs: (which pairs, [n, 2]: log p(y|x) and log p(y'|x)).

    They have a gradient, unless under no_grad. A prompt is computed once for both replies. A text's
    log-probability is the sum over its tokens, its end token included.
    Of several processes, each gets its share, and counts the pairs within that. While the others
    still work, it gets [0, 2], with a gradient that adds nothing.
    """
    rows = [(pair.prompt, [pair.answer, pair.rival]) for pair in pairs]
    for packed, active in shared_packs(model, rows, micro_batch, crew):
        lp = logprobs(model, packed)
        total = torch.zeros(2 * len(pairs), device=lp.device).index_add(0, packed.owner, lp)
        here = packed.here[::2] // 2  # whole groups: no pair lies in two micro-batches
        here = here if active else here[:0]
        yield here, total.view(-1, 2)[here]


PART = 64  # so many pairs of each process at a time: then a run can stop


@torch.no_grad()
def all_logprobs(model, pairs, micro_batch, crew=machine.Crew()):
    """log p(y|x) and log p(y'|x) of all pairs, [M, 2], on the CPU. Of p_t: once an iteration.

    A model that is shared out must be machine.resident: else it would stay gathered in part, and an
    optimizer made then would hold weights that get no gradient.
    """
    out = torch.zeros(len(crew.share(pairs)), 2, device=model.embed.weight.device)
    for here, lp in pair_logprobs(model, pairs, micro_batch, crew):
        out[here] = lp
    return crew.merged(out.cpu())


def rmsprop(player):
    """The paper's optimizer, a new one for each iteration; no weight decay.

    Of a bfloat16 player it goes on with the float32 weights of the iteration before.
    """
    # One weight after another. PyTorch's default on a GPU is all at once, with a copy of its whole
    # state: 27 GiB of a 7B model.
    return learning.optimizer_for(player, torch.optim.RMSprop, foreach=False)


# --------------------------------------------------------------------------------------------------
# Settings

NUMBER, COUNT = console.positive(float), console.positive(int)

# A row: flag, kind, default on the embedded model, default on a real one, help. The default on a
# real one is the paper's, but for --micro-batch.
SETTINGS = [
    "the game",
    ("--game", ("spin", "sft"), "spin", "spin",
     "sft: the baseline, fine-tuning on the same answers with as many updates"),
    runs.MODEL,
    ("--data", str, None, None,
     "a file (JSONL, JSON, CSV, Parquet) or hub dataset in one of the shapes of support/data.py; "
     "without it: the embedded default's fine-tuning set, answered right"),
    runs.SPLIT,
    runs.EVAL_DATA,
    runs.EVAL_SPLIT,
    runs.SKIP_BAD_ROWS,
    ("--iterations", COUNT, 4, 4, "how often the player becomes the opponent"),
    ("--pairs", COUNT, 5000, 50000,
     "new pairs an iteration; where the data ends, it begins again"),
    ("--epochs", COUNT, 2, 2, "over an iteration's pairs: its own, and the last iteration's"),
    ("--batch", COUNT, 64, 64, "pairs an update"),
    runs.ANSWER_TOKENS,
    runs.TEMPLATE_ARGS,
    "the loss",
    ("--loss", tuple(LOSS), "logistic", "logistic", "of the margin, in spin"),
    ("--lam", [NUMBER], [1.0, 1.0, 1.0, 2.0], [0.1, 0.1, 0.1, 5.0],
     "lambda, in spin: how closely the player is tied to its opponent; one number an iteration "
     "(fewer iterations take the first ones, in more the last one goes on)"),
    ("--lr", [NUMBER], [3e-5, 3e-5, 2e-5, 2e-5], [5e-7, 5e-7, 1e-7, 1e-7],
     "peak learning rate of RMSProp; one number an iteration, as --lam (with --lora: ten times as "
     "much)"),
    *runs.SETTINGS,
    ("--dry-run", bool, False, False,
     "only say what memory and disk these settings need; save nothing"),
]


IDLE = {"sft": ("--lam", "--loss")}  # flags that mean nothing in a game: they are refused there


def parse_args(argv=None):
    """The settings of a command line. Raises UserError, or exits with 2, where one is refused."""
    about = "spin.py", ("Self-Play Fine-Tuning: a Llama that learns to tell people's answers from "
                        "its own earlier ones.")
    args = console.parse(SETTINGS, argv, *about)
    if args.resume:
        return runs.resumed(argv, console.parse(SETTINGS, [], *about))
    real = not language.spoken_by(runs.model_folder(args.model))
    default, others = console.parse(SETTINGS, [], *about, real=real), {}
    if args.lora:
        others = {"lr": [runs.LORA_RATE * lr for lr in default.lr]}
    args = console.parse(SETTINGS, argv, *about, real=real, **others)
    if real and not args.data:
        raise console.UserError(f"{args.model} does not speak the embedded language: name --data "
                                "to learn from")
    console.refuse_idle(argv, f"--game {args.game}", IDLE.get(args.game, ()))
    runs.check_lora(args)
    if args.eval_data and not args.data:
        raise console.UserError("--eval-data goes with --data: the embedded default has scores")
    data.refuse_splits(args)
    if args.skip_bad_rows and not args.data:
        raise console.UserError("--skip-bad-rows is about --data: name one")
    for name in ("lam", "lr"):
        given = getattr(args, name)
        if len(given) > args.iterations and given != others.get(name, getattr(default, name)):
            raise console.UserError(f"--{name}: {len(given)} numbers for {args.iterations} "
                                    "iterations; give at most one an iteration")
    args.model = str(runs.model_folder(args.model))  # a run's folder stands for its last iterate
    if args.run is not None:
        runs.check_name(args.run)
    return args


# --------------------------------------------------------------------------------------------------
# A run

def set_up(args):
    """The Game of these settings: model loaded, data encoded, nothing played. Raises UserError."""
    crew, device = machine.join(args.device)
    machine.check_dtype(device, args.dtype)
    check_room(args, device, crew.size)
    rows, held = data.read_both(args)
    rows = rows or language_data(args.pairs * args.iterations)
    config, dtype = read_config(args.model)[0], machine.DTYPES[args.dtype]
    variables = console.assignments(args.template_args)
    # Several processes share the weights out, and each begins with all of them on the CPU. (With
    # LoRA each has the whole frozen model.)
    where = (device, dtype) if crew.size == 1 or args.lora else ("cpu", torch.float32)
    player, tokenizer = load(args.model, *where, args.date, variables)
    player.recompute = args.low_memory
    for remark in tokenizer.remarks:
        console.note(remark)
    reads = [(lambda row: tokenizer.chat(row.messages), config.context),
             (lambda row: tokenizer.reply(row.messages, row.answer, player.end_ids), None)]
    # [(row, (prompt, answer))] of the rows to learn from, and of those held out
    found, held = (data.measured(x, reads, args.answer_tokens, args.skip_bad_rows if args.data
                                 else None) for x in (rows, held or []))
    rng = random.Random(args.seed)
    rng.shuffle(found)
    rows = [row for row, _ in found]
    prompts = [prompt for _, (prompt, _) in found]
    answers, cut = cut_answers([reply for _, (_, reply) in found], args.answer_tokens)
    # All have the same pairs in the same order, and no two answer with the same random numbers.
    generator = torch.Generator(device).manual_seed(crew.seed(args.seed))
    start = learning.fingerprint(player, rows + [row for row, _ in held])
    if args.lora:
        adapt(player, args.lora, args.lora_alpha, args.lora_targets, args.seed)
    elif crew.size > 1:
        machine.shard(player, device, dtype)
    return Game(player, tokenizer, rows, prompts, answers, cut, generator, rng, start,
                [ids for _, ids in held][:args.eval_items], crew)


def check_room(args, device, processes=1):
    """Raise UserError where memory or disk will not do. --dry-run: print what both need."""
    runs.check_memory(plan, args, device, processes)
    config, count = read_config(args.model)
    adapters = config.adapter_size(args.lora, args.lora_targets)
    runs.check_disk(args, count, adapters, optimizer_floats=1, models=args.iterations + 1)


def plan(args, processes=1):
    """The memory.plan of these settings, for each process, before any weights are loaded."""
    config, count = read_config(args.model)
    adapters = config.adapter_size(args.lora, args.lora_targets)
    room = ROOM * processes  # each process samples its own batches
    return memory.plan(config, machine.DTYPES[args.dtype], count, optimizer_floats=1,
                       positions=room, read=room, adapters=adapters,
                       # A pair is never split, however small a micro-batch is.
                       tokens=max(args.micro_batch, 2 * args.answer_tokens),
                       sampled=room // args.answer_tokens, recompute=args.low_memory,
                       processes=processes, fused=args.device.startswith("cuda"))


def new_iteration(game, args, t, last, before):
    """Iteration t before the opponent's answers. last: the Pairs of the iteration before.

    before: updates that were made so far.
    """
    chosen = chosen_data(game.data, args.pairs, t)
    new = [Pair(game.prompts[i], game.answers[i], []) for i in chosen]
    return Iteration(t, before, game.rng.getstate(), chosen, last + new, None)


def checkpoint(run, game, it, optimizer, update, rates):
    """Write down where a run stands after so many updates of an iteration.

    That includes what p_t said, be it all or some of it, and the scores so far.
    """
    facts = {"iteration": it.number, "done": it.before,  # "done": by earlier iterations
             "update": update, "rng": it.rng_state, "rates": list(rates)}
    rivals = [token for pair in it.pairs for token in pair.rival]
    tensors = {"rivals": torch.tensor(rivals, dtype=torch.int32),
               "lengths": torch.tensor([len(pair.rival) for pair in it.pairs])}
    if it.ref is not None:
        tensors["ref"] = it.ref
    for name, both in rates.items():
        tensors |= {f"rate.{name}.{key}": value for key, value in both.items()}
    run.checkpoint(optimizer, game.generator, facts, **tensors)


def go_on(run, game, args, optimizer):
    """What `checkpoint` wrote: (the Iteration, how many updates it had, the scores).

    Player, optimizer and generators are put back as they were.
    """
    tensors = run.restore(game.player, optimizer, game.generator, game.rng)
    t, before = run.facts["iteration"], run.facts["done"]
    chosen = chosen_data(game.data, args.pairs, t)
    both = (chosen_data(game.data, args.pairs, t - 1) if t else []) + chosen
    rivals = tensors["rivals"].split(tensors["lengths"].tolist())  # of length 0: not yet answered
    pairs = [Pair(game.prompts[i], game.answers[i], y.tolist()) for i, y in zip(both, rivals)]
    ref = tensors.get("ref")
    rates = {name: {key.rpartition(".")[2]: value for key, value in tensors.items()
                    if key.startswith(f"rate.{name}.")} for name in run.facts["rates"]}
    it = Iteration(t, before, game.rng.getstate(), chosen, pairs, ref)
    return it, run.facts["update"], rates


def play_iteration(run, game, args, it, optimizer, update, rates, began, stop):
    """The updates of an iteration from number `update` on, with a record of each.

    began: when the iteration did. A `stop` that is not empty ends it early, with a checkpoint.
    Returns how many updates it has then. Raises UserError where a gradient is not finite.
    """
    spent, updates = time.perf_counter() - began, update_count(it, args)
    bar = tqdm(total=updates, initial=update, unit="update",
               disable=True if game.crew.rank else None, dynamic_ncols=True)
    with bar:
        training = player_trains(game, args, it, optimizer, update)
        while update < updates and not any(game.crew.all(bool(stop))):
            row = next(training)
            if not math.isfinite(row["gradient_norm"]):
                raise console.UserError(
                    f"iteration {it.number}, update {update + 1}: the gradient's norm is "
                    f"{row['gradient_norm']}; the update was not made; try a smaller --lr in a new "
                    "run")
            if not update:  # the first update also bears what the opponent did before it
                tokens = sum(len(pair.rival) for pair in own_pairs(it))
                row |= {"tokens": tokens, "seconds": row["seconds"] + spent}
            update += 1
            place = {"step": it.before + update, "iteration": it.number, "tokens": 0}
            run.metrics.write(json.dumps(place | row) + "\n")
            bar.update()
            shown = [f"{key} {row[key]:.3f}" for key in ("loss", "margin", "accuracy")
                     if key in row]
            bar.set_postfix_str("  ".join(shown))
            if run.due(update) and update < updates:
                checkpoint(run, game, it, optimizer, update, rates)
    if update < updates:
        checkpoint(run, game, it, optimizer, update, rates)
    return update


def update_count(it, args):
    """How many updates an iteration has."""
    return args.epochs * math.ceil(len(it.pairs) / args.batch)


def own_pairs(it):
    """An iteration's new pairs."""
    return it.pairs[-len(it.chosen):]


def add_score(game, args, rates, name):
    """Score the player by this name: right answers, or log p of people's held-out answers."""
    if game.held:
        with machine.resident(game.player):
            rates[name] = {"people": people_logprobs(game.player, game.held, args.micro_batch)}
        mean = rates[name]["people"].mean()
        print(f"log p of people's held-out answers, of {name}: {mean:.4f} nats a token "
              f"(n={len(game.held)})", flush=True)
    elif not args.data:
        queries = language.evaluation_set(args.eval_items)
        seed = 1000 * args.seed + len(rates)
        with machine.resident(game.player):
            rates[name] = evaluate.rate(game.player, game.tokenizer, queries, seed)
        print(f"right answers of {name}: {evaluate.short(rates[name])}", flush=True)


@torch.no_grad()
def people_logprobs(player, held, micro_batch):
    """The mean log-probability of a token of each held-out answer, [n] in nats, on the CPU."""
    total = torch.zeros(len(held), device=player.embed.weight.device)
    prompts, answers = [prompt for prompt, _ in held], [[answer] for _, answer in held]
    for packed in pack(prompts, answers, micro_batch, total.device):
        total = total.index_add(0, packed.owner, logprobs(player, packed))
    return total.cpu() / torch.tensor([len(answer) for answer, in answers])


def show_pair(game, args, it):
    """Print the first of an iteration's own pairs that taught something, after the training."""
    for i in range(len(it.pairs) - len(it.chosen), len(it.pairs)):
        pair = it.pairs[i]
        if pair.answer != pair.rival:
            with machine.resident(game.player):
                lp = all_logprobs(game.player, [pair], args.micro_batch)  # [1, 2]
            margin = spin_margin(lp, it.ref[i][None], of_iteration(args.lam, it.number)).item()
            prompt = game.data[it.chosen[i - len(it.pairs)]].query
            print(record.pair_text(prompt, pair, lp[0], it.ref[i], margin, game.tokenizer.decode))
            return


def opponents_turn(run, game, args, it, optimizer, rates, stop):
    """`opponent_plays`, with a checkpoint every ten minutes, and one where `stop` was asked.

    Returns the Iteration, unfinished where it was stopped.
    """
    def keep(it):
        # One look, of all processes together: a signal may come between two looks.
        asked, late = map(any, zip(*game.crew.all((bool(stop), run.late()))))
        if asked or late:
            checkpoint(run, game, it, optimizer, 0, rates)
        return asked
    it = opponent_plays(game, args, it, keep)
    if it.ref is None:
        own = own_pairs(it)
        print(f"stopped in iteration {it.number}, while the opponent answered: "
              f"{sum(bool(pair.rival) for pair in own):,} of {len(own):,} answers are kept; "
              f"python spin.py --resume {run.folder} goes on")
    return it


def begin(run, game, args, it, optimizer, rates):
    """Keep what the opponent answered: in games.jsonl, and in a first checkpoint."""
    if args.game == "spin":
        prompts = [game.data[i].query for i in it.chosen]
        games = record.pair_records(it.number, prompts, own_pairs(it), game.tokenizer.decode)
        run.games.write(json.dumps({"step": it.before, "games": games}) + "\n")
    checkpoint(run, game, it, optimizer, 0, rates)


def announce(run, game, args):
    """Print what is played, and what is normal in it."""
    source = f"from {args.data}" if args.data else "to instructions of its fine-tuning set"
    place = f"into {run.folder}"
    if run.tensors:
        place = f"on from update {run.facts['done'] + run.facts['update']} of {run.folder}"
    count = sum(p.numel() for p in game.player.parameters())
    print(f"{args.game} on {args.model}: {count:,} parameters, {len(game.data):,} answers "
          f"{source}, seed {args.seed}, {place}")
    if game.cut:
        print(f"{game.cut:,} of {len(game.data):,} of people's answers are longer than "
              f"--answer-tokens {args.answer_tokens}: they are cut there, as the opponent's are, "
              "and teach no end")
    if game.tokenizer.opens_thought:
        print("the chat template opens a thought (<think>) in each answer: people's answers go on "
              "from there, and those without a thought close it first")
    if args.game == "spin":
        first = LOSS[args.loss](torch.zeros(())).item()
        name = "log 2 = " if args.loss == "logistic" else ""
        print(f"the first loss of an iteration is {name}{first:.3f}: the player still is its "
              "opponent. Both\nlog-probabilities may fall, of people's answers too. That is normal:"
              " only the margin\nbetween them is trained")


def main(argv=None):
    """Play: the opponent answers, the player trains, and is the next opponent."""
    args = parse_args(argv)
    if args.dry_run:
        return check_room(args, machine.check_device(args.device))
    game = set_up(args)
    crew = game.crew
    if crew.rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the first process speaks for all
    with runs.open_run(args, game.start, crew, iteration=0, done=0, update=0) as run:
        announce(run, game, args)
        first = made = run.facts["done"] + run.facts["update"]
        rates, last, finished, began = {}, [], False, time.perf_counter()
        if not run.tensors:
            add_score(game, args, rates, "start")
        with runs.stop_asked() as stop:
            for t in range(run.facts["iteration"], args.iterations):
                iteration_began, update = time.perf_counter(), 0
                optimizer = rmsprop(game.player)
                if run.tensors:  # in the middle of this iteration; go_on empties run.tensors
                    it, update, rates = go_on(run, game, args, optimizer)
                else:
                    it = new_iteration(game, args, t, last, made)
                if it.ref is None and not update:  # else the opponent is through already
                    if args.game == "spin":
                        it = opponents_turn(run, game, args, it, optimizer, rates, stop)
                        if it.ref is None:
                            break
                    begin(run, game, args, it, optimizer, rates)
                last = own_pairs(it)
                print(f"\niteration {t}: {len(it.pairs):,} pairs, {len(last):,} of them new; "
                      f"learning rate {of_iteration(args.lr, t):g}")
                if args.game == "spin":
                    constant = LOSS[args.loss](torch.zeros(())).item()
                    print(record.identical_line(last, of_iteration(args.lam, t), constant))
                update = play_iteration(run, game, args, it, optimizer, update, rates,
                                        iteration_began, stop)
                made, unfinished = it.before + update, run.folder / f"iteration-{t}-unfinished"
                if update < update_count(it, args):
                    save(game.player, unfinished)
                    print(f"stopped in iteration {t}; the player as it is: {unfinished}; "
                          f"python spin.py --resume {run.folder} goes on")
                    break
                save(game.player, run.folder / f"iteration-{t}")
                if not crew.rank:
                    shutil.rmtree(unfinished, ignore_errors=True)  # of a stop before
                    print(record.change_line(run.folder, t))
                if args.game == "spin":
                    show_pair(game, args, it)
                add_score(game, args, rates, f"iteration {t}")
                finished = t == args.iterations - 1
                if not finished and any(crew.all(bool(stop))):
                    after = new_iteration(game, args, t + 1, last, made)
                    checkpoint(run, game, after, rmsprop(game.player), 0, rates)
                    print(f"stopped after iteration {t}: "
                          f"python spin.py --resume {run.folder} goes on")
                    break
        minutes = (time.perf_counter() - began) / 60
        print(f"\n{made - first} updates in {minutes:.1f} minutes; "
              f"the iterates are in {run.folder}")
        machine.leave(crew)
        if crew.rank:
            return
        if game.held and len(rates) > 1:
            print(evaluate.people_table(rates))
        elif rates:
            queries = language.evaluation_set(args.eval_items)
            evaluate.scoreboard(rates, queries, run.folder / "evaluation.json")
        report.show_run(run.folder)
        if finished:
            run.end()


if __name__ == "__main__":
    sys.exit(console.run_command(main))
