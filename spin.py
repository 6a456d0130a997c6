"""Self-Play Fine-Tuning (SPIN, arXiv 2401.01335): a Llama learns to tell people's answers from its own of an iteration ago.

    python spin.py                                     SPIN on the embedded default
    python spin.py --game sft                          baseline: plain fine-tuning on the same answers, as many updates
    python spin.py --iterations 1 --epochs 14          baseline: as many updates against one opponent
    python spin.py --model FOLDER --data FILE.jsonl    your Llama, your people

Iteration t has prompts x, people's answers y, and the opponent p_t, which is the last iteration's player, frozen:

    y' ~ p_t(. | x)                                                        the opponent's answer
    m  = lambda ( log p(y|x) / p_t(y|x)  -  log p(y'|x) / p_t(y'|x) )      the margin, 0 at first: p starts as p_t
    L  = mean log(1 + exp(-m))                                             log 2 at first, and then less

The trained p is the next opponent. Nothing moves any more where p_t answers as people do: then y and y' cannot be told apart.
From iteration 1 on, the last iteration's pairs are mixed in; their log-probabilities under p_t are computed anew.

What differs from the paper's settings, because answers here have 6 tokens and not 256, and the model 0.76 million parameters
and not 7 billion: lambda 1 (the paper's 0.1 hardly ties so short an answer to its opponent), a larger learning rate, fewer pairs.
"""
import argparse
import copy
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
from model import (DTYPES, Llama, Tokenizer, UserError, check_device, check_memory, clip, fingerprint, generate, groups, load, logprobs, memory_plan, number,
                   optimizer_for, pack, read_config, run_command, save, set_rate)
from tiny import language

# The loss of a margin: any convex, falling function will do (SPIN section 4.1).
LOSS = {
    "logistic": lambda m: F.softplus(-m),  # log(1 + exp(-m)), eq. 4.7
    "hinge": lambda m: F.relu(1 - m),
    "exponential": lambda m: (-m).exp(),
}


# Defaults for a model that does not speak the embedded language: the paper's settings; our own for the last two.
REAL = {"lr": 5e-7, "lr_late": 1e-7, "lam": 0.1, "lam_last": 5.0, "pairs": 50000, "answer_tokens": 256, "micro_batch": 4096}


class Pair(NamedTuple):
    """A prompt, what people answered, and what the opponent did: lists of ids. The two replies end alike, unless cut."""
    prompt: list
    answer: list
    rival: list


class Game(NamedTuple):
    """What a run is played with: `set_up` makes it from the settings."""
    player: Llama
    tokenizer: Tokenizer
    data: list  # [(messages, people's answer)], shuffled
    prompts: list  # the same, as ids
    answers: list
    generator: torch.Generator  # the opponent's answers
    rng: random.Random  # the order of the pairs
    start: int  # fingerprint of the starting model and the data


class Iteration(NamedTuple):
    """What the player learns from in one iteration."""
    number: int
    before: int  # updates that earlier iterations made
    rng_state: tuple  # of the game's rng when this one begins: a run that goes on shuffles as before
    chosen: list  # which of the data its own pairs are of
    pairs: list  # M Pairs: the last iteration's, and then its own
    ref: torch.Tensor  # [M, 2]: their log-probabilities under p_t; None in sft
    lam: float
    lr: float


# ---------------------------------------------------------------------------------------------------------------------
# Data

def language_data(count):
    """The first `count` instructions of the embedded default's own fine-tuning set, all answered right: [(messages, text)].

    The set's own answers are hasty in part (language.CARELESS); these are what careful people would have said.
    """
    solver = [messages for part, messages, _ in language.fine_tuning_set(2 * count) if part == "solver"]  # some 70 %
    return [(messages, language.solve(messages[0]["content"])) for messages in solver[:count]]


def encode(tokenizer, data, end_ids, limit):
    """(prompts, answers) as lists of ids. An answer over `limit` tokens is cut there and has no end token, as the opponent's.

    An answer's ids are those that the template writes after the prompt: they begin and end as the opponent's would. (A few
    templates write another prompt for an answer than for generating one; there, the text is encoded by itself.)
    """
    end, prompts, answers = tokenizer.end_of_turn(end_ids), [], []
    for messages, text in data:
        prompt = tokenizer.chat(messages)
        whole = tokenizer.chat([*messages, {"role": "assistant", "content": text}], add_generation_prompt=False)
        reply = whole[len(prompt):] if whole[:len(prompt)] == prompt else [*tokenizer.encode(text), end]
        prompts.append(prompt)
        answers.append(reply[:next((i + 1 for i, token in enumerate(reply) if token in end_ids), len(reply))][:limit])
    return prompts, answers


# ---------------------------------------------------------------------------------------------------------------------
# One iteration: the opponent answers, the player trains

ROOM = 16384  # cached positions of one sampling batch: bounds its memory


def opponent_answers(opponent, prompts, limit, generator):
    """y' ~ p_t(. | x) at temperature 1: a list of ids for each prompt. One that reaches `limit` tokens has no end token."""
    rows = max(1, ROOM // (max(map(len, prompts)) + limit))
    out, by_length = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for part in groups(by_length, rows):  # prompts of like length together: less padding
        for i, ids in zip(part, generate(opponent, [prompts[i] for i in part], 1, limit, 1.0, generator).ids):
            out[i] = ids
    return out


def pair_logprobs(model, pairs, micro_batch):
    """For each micro-batch of a list of Pairs: (which pairs, their log p(y|x) and log p(y'|x) [n, 2]), with a gradient.

    The prompt is computed once for both replies; a text's log-probability is the sum over its tokens, its end included.
    """
    device = model.embed.weight.device
    for packed in pack([p.prompt for p in pairs], [[p.answer, p.rival] for p in pairs], micro_batch, device, whole=True):
        total = torch.zeros(2 * len(pairs), device=device).index_add(0, packed.owner, logprobs(model, packed))
        here = (packed.owner // 2).unique()  # whole groups: no pair lies in two micro-batches
        yield here, total.view(-1, 2)[here]


@torch.no_grad()
def opponent_logprobs(opponent, pairs, micro_batch):
    """log p_t(y|x) and log p_t(y'|x) of all pairs, [M, 2]: computed once an iteration, and kept."""
    out = torch.zeros(len(pairs), 2, device=opponent.embed.weight.device)
    for start in range(0, len(pairs), 1024):  # packed a thousand at a time: that many ids are there at once
        for here, lp in pair_logprobs(opponent, pairs[start:start + 1024], micro_batch):
            out[start + here] = lp
    return out


def spin_margin(lp, ref, lam):
    """m [n] from the log-probabilities [n, 2] of answer and rival under player and opponent. SPIN eq. 4.7."""
    ratio = lp - ref  # [n, 2]: log p / p_t
    return lam * (ratio[:, 0] - ratio[:, 1])


def spin_loss(lp, ref, lam, form="logistic"):
    """The loss of each pair, [n]. lp, ref [n, 2]: log-probabilities of answer and rival under player and opponent."""
    return LOSS[form](spin_margin(lp, ref, lam))


def spin_gradients(player, pairs, ref, lam, args):
    """Gradients of the mean loss over a batch of pairs, ref [n, 2]: {"loss", "margin", "logprob_answer", "logprob_rival"}.

    Where answer and rival are the same, the margin is 0 whatever the player does: such a pair counts in the loss, as a
    constant, and is not computed. The other three figures are means over the rest.
    """
    different = [i for i, p in enumerate(pairs) if p.answer != p.rival]
    same = len(pairs) - len(different)
    total = torch.tensor([same * LOSS[args.loss](torch.zeros(())).item(), 0.0, 0.0, 0.0])
    ref = ref[different]
    for here, lp in pair_logprobs(player, [pairs[i] for i in different], args.micro_batch):
        loss = spin_loss(lp, ref[here], lam, args.loss).sum()
        (loss / len(pairs)).backward()
        total += torch.stack([loss.detach(), spin_margin(lp.detach(), ref[here], lam).sum(), *lp.detach().sum(0)]).cpu()
    mean = total / torch.tensor([len(pairs)] + 3 * [max(1, len(different))])
    return dict(zip(("loss", "margin", "logprob_answer", "logprob_rival"), mean.tolist()))


def sft_gradients(player, pairs, args):
    """The baseline: gradients of plain fine-tuning on the answers, the mean over their tokens: {"loss", "logprob_answer"}."""
    packs = pack([p.prompt for p in pairs], [[p.answer] for p in pairs], args.micro_batch, player.embed.weight.device)
    tokens, total = sum(len(p.answer) for p in pairs), 0.0
    for packed in packs:
        loss = -logprobs(player, packed).sum() / tokens
        loss.backward()
        total += loss.item()
    return {"loss": total, "logprob_answer": -total * tokens / len(pairs)}


def train(player, pairs, ref, lam, lr, optimizer, args, rng, done=0):
    """Train the player for args.epochs over the pairs, ref [M, 2] (None for sft): yields each update's figures.

    The learning rate rises to lr over the first tenth and then falls to 0, as in the paper. done: updates that were made before.
    """
    batches = [batch for _ in range(args.epochs) for batch in groups(rng.sample(range(len(pairs)), len(pairs)), args.batch)]
    for i, batch in list(enumerate(batches))[done:]:
        began, chosen = time.perf_counter(), [pairs[j] for j in batch]
        set_rate(optimizer, lr * min((i + 1) / (0.1 * len(batches)), (len(batches) - i) / (0.9 * len(batches)), 1.0))
        row = sft_gradients(player, chosen, args) if ref is None else spin_gradients(player, chosen, ref[batch], lam, args)
        row["gradient_norm"] = clip(optimizer, args.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield row | {"seconds": time.perf_counter() - began}


def rmsprop(player, lr):
    """The paper's optimizer, a new one for each iteration; no weight decay."""
    return optimizer_for(player, torch.optim.RMSprop, lr=lr)


# ---------------------------------------------------------------------------------------------------------------------
# For people

def identical_line(pairs, lam, loss):
    """How many of an iteration's new pairs teach nothing, in one line."""
    share = sum(p.answer == p.rival for p in pairs) / len(pairs)
    constant = LOSS[loss](torch.zeros(())).item()
    return f"in {100 * share:.1f} % of the new pairs the opponent says what people say: they teach nothing (loss {constant:.3f}, whatever the player); lambda {lam:g}"


def change_line(folder, iteration):
    """What an iteration changed, by the run's metrics.jsonl: its first update's figures, and the mean of its last tenth."""
    figures = evaluate.read_metrics(folder)
    own = [i for i, t in enumerate(figures["iteration"]) if t == iteration]
    end = own[-max(1, len(own) // 10):]
    names = {"loss": "loss of all pairs", "margin": "of differing ones: margin", "logprob_answer": "log p of people's answers", "logprob_rival": "of the opponent's"}
    return "  ".join(f"{name} {figures[k][own[0]]:.3f} -> {sum(figures[k][i] for i in end) / len(end):.3f}" for k, name in names.items() if k in figures and own)


def game_records(game, it):
    """An iteration's own pairs for games.jsonl, as text."""
    return [{"iteration": it.number, "prompt": game.data[i][0][-1]["content"], "answer": game.tokenizer.decode(p.answer), "rival": game.tokenizer.decode(p.rival)}
            for i, p in zip(it.chosen, it.pairs[-len(it.chosen):])]


def pair_text(tokenizer, messages, pair, lp, ref, lam):
    """One pair as a person would want to read it. lp, ref [2]: of answer and rival, under player and opponent."""
    lines = [f"    {messages[-1]['content'][:100]}"]
    for who, ids, x, r in (("people  ", pair.answer, *(lp[0], ref[0])), ("opponent", pair.rival, *(lp[1], ref[1]))):
        text = tokenizer.decode(ids).replace("\n", " ")[:32] or "(nothing)"
        lines.append(f"      {who}  {text:<32}  log p_t {r:7.2f}   log p {x:7.2f}   difference {x - r:+6.2f}")
    return "\n".join(lines + [f"      margin {spin_margin(lp[None], ref[None], lam).item():+.2f}"])


def explain(game, args):
    """--explain: one pair of one update as a lesson, number by number, each with the function that computed it.

    Half of the update's pairs are trained on first, unseen: at the very start player and opponent are the same, and the margin is 0.
    """
    player, tokenizer, rng = game.player, game.tokenizer, game.rng
    opponent = copy.deepcopy(player).requires_grad_(False)
    prompts, answers = game.prompts[:2 * args.batch], game.answers[:2 * args.batch]
    rivals = opponent_answers(opponent, prompts, args.answer_tokens, game.generator)
    pairs = [Pair(*row) for row in zip(prompts, answers, rivals)]
    ref = opponent_logprobs(opponent, pairs, args.micro_batch)
    half = len(pairs) // 2
    for _ in train(player, pairs[:half], ref[:half], args.lam, args.lr, rmsprop(player, args.lr), args, rng):
        pass
    pick = next((i for i in range(half, len(pairs)) if pairs[i].answer != pairs[i].rival), half)
    pair = pairs[pick]
    print(f"(first trained on {half} other pairs, unseen: else the player were its opponent, and the margin 0)\n")
    print(f"THE PAIR: the opponent answered too                                                opponent_answers\n  {game.data[pick][0][-1]['content'][:96]}")
    print(f"  {sum(p.answer == p.rival for p in pairs)} of {len(pairs)} such pairs have two equal answers, and teach nothing")
    print("\nTOKENS: under the player p and the opponent p_t                                       logprobs")
    for who, reply in (("y   people's answer", pair.answer), ("y'  the opponent's", pair.rival)):
        print(f"  {who}\n      token              log p   log p_t     log p / p_t")
        with torch.no_grad():
            packed, = pack([pair.prompt], [[reply]], args.micro_batch, ref.device, whole=True)
            rows = list(zip(reply, logprobs(player, packed).tolist(), logprobs(opponent, packed).tolist()))
        for token, x, r in rows[:24]:
            print(f"      {repr(tokenizer.text.id_to_token(token))[1:-1][:14]:<15}{x:9.4f} {r:9.4f}   {x - r:+9.4f}")
        print(f"      {'sum':<15}{sum(x for _, x, _ in rows):9.4f} {sum(r for *_, r in rows):9.4f}   {sum(x - r for _, x, r in rows):+9.4f}")
    lp = opponent_logprobs(player, [pair], args.micro_batch)  # [1, 2]
    margin = spin_margin(lp, ref[pick][None], args.lam)
    slope = torch.autograd.functional.jacobian(lambda m: LOSS[args.loss](m).sum(), margin).item()
    print(f"\nLOSS\n  margin = {args.lam:g} ({lp[0, 0] - ref[pick, 0]:+.4f} - {lp[0, 1] - ref[pick, 1]:+.4f}) = {margin.item():+.4f}   (spin_margin)")
    print(f"  loss = {args.loss}(margin) = {spin_loss(lp, ref[pick][None], args.lam, args.loss).item():.5f}   (spin_loss)")
    print(f"  its slope by log p(y|x) is {args.lam * slope:+.4f}, by log p(y'|x) {-args.lam * slope:+.4f}: only the\n  difference is trained, so both may fall")
    row = spin_gradients(player, [pair], ref[pick][None], args.lam, args)
    print(f"  the gradient of this pair has norm {sum(p.grad.norm() ** 2 for p in player.parameters()) ** 0.5:.4f}   (spin_gradients)")
    player.zero_grad()
    for _ in train(player, pairs[half:], ref[half:], args.lam, args.lr, rmsprop(player, args.lr), args, rng):
        pass
    lp = opponent_logprobs(player, [pair], args.micro_batch)
    print(f"\nAFTER training on these {len(pairs) - half} pairs, {args.epochs} epochs                                         train")
    print(f"  margin {row['margin']:+.4f} -> {spin_margin(lp, ref[pick][None], args.lam).item():+.4f}   log p(y|x) {row['logprob_answer']:.4f} -> {lp[0, 0]:.4f}   log p(y'|x) {row['logprob_rival']:.4f} -> {lp[0, 1]:.4f}")


def parse_args(argv=None):
    """The command line's settings; the defaults depend on whether the model speaks the embedded language. Exits with 2 if refused."""
    parser = argparse.ArgumentParser(description="Self-Play Fine-Tuning: a Llama that learns to tell people's answers from its own earlier ones.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
                                     epilog="A model that does not speak the embedded language has these defaults instead: "
                                            + ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in REAL.items()))
    g = parser.add_argument_group("the game")
    g.add_argument("--game", choices=["spin", "sft"], default="spin", help="sft: the baseline, plain fine-tuning on the same answers with as many updates")
    g.add_argument("--model", default="tiny", help="folder in Hugging Face layout, a run's folder, or a hub name")
    g.add_argument("--revision", default=None, help="branch, tag or commit of a hub model")
    g.add_argument("--data", default=argparse.SUPPRESS, metavar="FILE", help='JSONL with "prompt" and "answer", or "messages"; default: instructions of the embedded default\'s fine-tuning set, answered right')
    g.add_argument("--iterations", type=number(int), default=4, help="how often the player becomes the opponent")
    g.add_argument("--pairs", type=number(int), default=5000, help="new pairs an iteration; where the data ends, it begins again")
    g.add_argument("--epochs", type=number(int), default=2, help="over an iteration's pairs: new ones, and the last iteration's")
    g.add_argument("--batch", type=number(int), default=64, help="pairs an update")
    g.add_argument("--answer-tokens", type=number(int), default=32, help="longest answer, people's and the opponent's")
    g = parser.add_argument_group("the loss")
    g.add_argument("--loss", choices=list(LOSS), default="logistic", help="of the margin (not in sft)")
    g.add_argument("--lam", type=number(float), default=1.0, help="lambda: how closely the player is tied to its opponent (not in sft)")
    g.add_argument("--lam-last", type=number(float), default=2.0, help="lambda of the last of several iterations (not in sft)")
    g.add_argument("--lr", type=number(float), default=3e-5, help="peak learning rate of RMSProp in iterations 0 and 1")
    g.add_argument("--lr-late", type=number(float), default=2e-5, help="the same from iteration 2 on")
    g.add_argument("--clip", type=number(float), default=1.0, help="largest gradient norm")
    g = parser.add_argument_group("the run")
    g.add_argument("--seed", type=number(int, zero=True), default=0, help="seed of everything random")
    g.add_argument("--run", default=argparse.SUPPRESS, help="name of the run's folder below runs/; default: the game and the next free number")
    g.add_argument("--resume", default=argparse.SUPPRESS, metavar="RUN", help="go on with a run that was stopped or killed, by its own settings: no other flag beside it")
    g.add_argument("--save-every", type=number(int), default=100, help="updates between checkpoints, which --resume goes on from; there is one every ten minutes, too, and on Ctrl-C")
    g.add_argument("--eval-items", type=number(int), default=1000, help="held-out instructions for the score of each iterate (without --data)")
    g.add_argument("--micro-batch", type=number(int), default=512, help="token positions computed at once; changes memory and speed only")
    g.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of all models; what is trained keeps its weights in float32 beside it")
    g.add_argument("--recompute", action="store_true", help="compute each layer again in the backward pass: less memory, more time")
    g.add_argument("--cuda-graphs", action="store_true", help="record the sampler's steps as CUDA graphs and replay them (on one GPU; not measured yet)")
    g.add_argument("--explain", action="store_true", help="print one pair of one update as a lesson, from two batches of pairs unless told; save nothing")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ..")
    args = parser.parse_args(argv)
    if hasattr(args, "resume"):
        return evaluate.resumed(parser, argv, ("spin", "sft"))
    if evaluate.is_real(args.model):
        parser.set_defaults(**REAL)
        args = parser.parse_args(argv)
        if not hasattr(args, "data"):
            parser.error(f"{args.model} does not speak the embedded language: name --data to learn from")
    if args.explain:
        parser.set_defaults(pairs=2 * args.batch, iterations=1)  # a lesson needs no more
        args = parser.parse_args(argv)
    args.model = str(evaluate.model_folder(args.model))  # a run's folder stands for its last iterate
    if hasattr(args, "run"):
        evaluate.check_name(args.run)
    if args.cuda_graphs and not args.device.startswith("cuda"):
        parser.error(f"--cuda-graphs needs a GPU: --device is {args.device}")
    if args.explain and args.dtype != "float32":
        parser.error("--explain shows float32 numbers: leave --dtype out")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# A run

def set_up(args):
    """The Game of these settings: the model loaded, the data encoded, nothing played yet. Raises UserError."""
    check_device(args.device)
    data = evaluate.read_data(args.data) if hasattr(args, "data") else language_data(args.pairs * args.iterations)
    rng = random.Random(args.seed)
    rng.shuffle(data)
    plan = memory_plan(read_config(args.model, args.revision), DTYPES[args.dtype], 1, 1, ROOM, args.micro_batch, args.recompute)
    check_memory(plan, args.device)
    player, tokenizer = load(args.model, args.device, DTYPES[args.dtype], args.revision)
    player.recompute, player.replay = args.recompute, args.cuda_graphs
    prompts, answers = encode(tokenizer, data, player.end_ids, args.answer_tokens)
    return Game(player, tokenizer, data, prompts, answers, torch.Generator(args.device).manual_seed(args.seed), rng, fingerprint(player, data))


def choose(game, args, t):
    """Of iteration t: (which of the data its pairs are of, lambda, learning rate)."""
    size = min(args.pairs, len(game.data))
    chosen = [i % len(game.data) for i in range(t * size, (t + 1) * size)]
    return chosen, args.lam_last if 0 < t == args.iterations - 1 else args.lam, args.lr if t < 2 else args.lr_late


def begin(game, args, t, last, before):
    """Iteration t, after `before` updates. The player still is the opponent p_t: what p_t is needed for is computed here, and kept.

    last: the Pairs of the iteration before, which are mixed in.
    """
    chosen, lam, lr = choose(game, args, t)
    rivals, ref = [[]] * len(chosen), None
    if args.game == "spin":
        rivals = opponent_answers(game.player, [game.prompts[i] for i in chosen], args.answer_tokens, game.generator)
    pairs = last + [Pair(game.prompts[i], game.answers[i], rival) for i, rival in zip(chosen, rivals)]
    if args.game == "spin":
        ref = opponent_logprobs(game.player, pairs, args.micro_batch)
    return Iteration(t, before, game.rng.getstate(), chosen, pairs, ref, lam, lr)


def checkpoint(run, game, it, optimizer, update, rates):
    """Write down where a run stands, after so many updates of an iteration: with what p_t said, and the scores so far."""
    facts = {"iteration": it.number, "done": it.before, "update": update, "rng": it.rng_state, "rates": list(rates)}
    tensors = {"rivals": torch.tensor([i for p in it.pairs for i in p.rival], dtype=torch.int32), "lengths": torch.tensor([len(p.rival) for p in it.pairs])}
    tensors |= {} if it.ref is None else {"ref": it.ref}
    tensors |= {f"rate.{name}.{key}": value for name, both in rates.items() for key, value in both.items()}
    run.checkpoint(optimizer, game.generator, facts, **tensors)


def go_on(run, game, args, optimizer):
    """What `checkpoint` wrote: (the Iteration, how many updates it had, the scores). Player, optimizer and generators are as they were."""
    tensors, facts = run.restore(game.player, optimizer, game.generator, game.rng), run.facts
    t = facts["iteration"]
    chosen, lam, lr = choose(game, args, t)
    both = (choose(game, args, t - 1)[0] if t else []) + chosen
    rivals = tensors["rivals"].split(tensors["lengths"].tolist())
    pairs = [Pair(game.prompts[i], game.answers[i], rival.tolist()) for i, rival in zip(both, rivals)]
    ref = tensors["ref"].to(args.device) if "ref" in tensors else None
    rates = {name: {key: tensors[f"rate.{name}.{key}"] for key in ("sampled", "greedy")} for name in facts["rates"]}
    return Iteration(t, facts["done"], game.rng.getstate(), chosen, pairs, ref, lam, lr), facts["update"], rates


def play_iteration(run, game, it, optimizer, args, update, rates, began, stop):
    """The updates of an iteration from number `update` on, and the record of them; began: when the iteration did.

    Returns how many it has then, and whether that is all: a `stop` that is not empty ends it early, with a checkpoint.
    """
    updates, spent = args.epochs * math.ceil(len(it.pairs) / args.batch), time.perf_counter() - began
    with tqdm(total=updates, initial=update, unit="update", disable=None, dynamic_ncols=True) as bar:
        training = train(game.player, it.pairs, it.ref, it.lam, it.lr, optimizer, args, game.rng, update)
        while update < updates and not stop:
            try:
                row = next(training)
            except FloatingPointError as error:
                raise UserError(f"iteration {it.number}, update {update + 1}: {error}; it was not made; try a smaller --lr in a new run") from None
            if not update:  # the first update bears what the opponent did before it
                row |= {"tokens": sum(len(p.rival) for p in it.pairs[-len(it.chosen):]), "seconds": row["seconds"] + spent}
            update += 1
            run.metrics.write(json.dumps({"step": it.before + update, "iteration": it.number, "tokens": 0} | row) + "\n")
            bar.update()
            bar.set_postfix_str("  ".join(f"{k} {row[k]:.3f}" for k in ("loss", "margin") if k in row))
            if run.due(update) and update < updates:
                checkpoint(run, game, it, optimizer, update, rates)
    if update < updates:
        checkpoint(run, game, it, optimizer, update, rates)
    return update, update == updates


def add_score(game, args, rates, name):
    """Add the player's score by this name; the scoreboard speaks of the embedded language."""
    if not hasattr(args, "data"):
        queries = language.evaluation_set(args.eval_items)
        rates[name] = evaluate.rate(game.player, game.tokenizer, queries, 1000 * args.seed + len(rates))
        print(f"right answers of {name}: {evaluate.short(rates[name])}", flush=True)


def show_pair(game, it, args):
    """The first of an iteration's own pairs that taught something, after the training."""
    first = len(it.pairs) - len(it.chosen)
    i = next((i for i in range(first, len(it.pairs)) if it.pairs[i].answer != it.pairs[i].rival), None)
    if i is not None:
        now = opponent_logprobs(game.player, [it.pairs[i]], args.micro_batch)[0]
        print(pair_text(game.tokenizer, game.data[it.chosen[i - first]][0], it.pairs[i], now, it.ref[i], it.lam))


def main(argv=None):
    """Play: the opponent answers, the player trains, and is the next opponent."""
    args = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("this game is for one process: start it without torchrun")
    game, against = set_up(args), args.game == "spin"  # sft has no opponent
    if args.explain:
        return explain(game, args)
    with evaluate.open_run(args, game.start, iteration=0, done=0, update=0) as run:
        first = done = run.facts["done"] + run.facts["update"]
        print(f"{args.game} on {args.model}: {sum(p.numel() for p in game.player.parameters()):,} parameters, {len(game.data):,} answers "
              f"{'from ' + args.data if hasattr(args, 'data') else 'to instructions of its fine-tuning set, without the hasty ones'}, seed {args.seed}, "
              + (f"on from update {first} of {run.folder}" if run.tensors else f"into {run.folder}"))
        if against:
            print("the first loss of an iteration is log 2 = 0.693: the player still is its opponent. Both log-probabilities may fall,\n"
                  "of people's answers too; that is normal: only the margin between them is trained")
        rates, last, finished, began = {}, [], False, time.perf_counter()
        if not run.tensors:
            add_score(game, args, rates, "start")
        with evaluate.stop_asked() as stop:
            for t in range(run.facts["iteration"], args.iterations):
                iteration_began, update = time.perf_counter(), 0
                optimizer = rmsprop(game.player, choose(game, args, t)[2])
                if run.tensors:  # within this iteration
                    it, update, rates = go_on(run, game, args, optimizer)
                else:
                    it = begin(game, args, t, last, done)
                    if against:
                        run.games.write(json.dumps({"step": done, "games": game_records(game, it)}) + "\n")
                    checkpoint(run, game, it, optimizer, 0, rates)
                last = it.pairs[-len(it.chosen):]
                print(f"\niteration {t}: {len(it.pairs):,} pairs, {len(last):,} of them new; learning rate {it.lr:g}")
                if against:
                    print(identical_line(last, it.lam, args.loss))
                update, whole = play_iteration(run, game, it, optimizer, args, update, rates, iteration_began, stop)
                done, unfinished = it.before + update, run.folder / f"iteration-{t}-unfinished"
                if not whole:
                    save(game.player, unfinished)
                    print(f"stopped in iteration {t}; the player as it is: {unfinished}; python spin.py --resume {run.folder} goes on")
                    break
                save(game.player, run.folder / f"iteration-{t}")
                print(change_line(run.folder, t))
                if against:
                    show_pair(game, it, args)
                add_score(game, args, rates, f"iteration {t}")
                shutil.rmtree(unfinished, ignore_errors=True)  # of a stop before
                finished = t == args.iterations - 1
                if stop and not finished:
                    print(f"stopped after iteration {t}: python spin.py --resume {run.folder} goes on")
                    break
        print(f"\n{done - first} updates in {(time.perf_counter() - began) / 60:.1f} minutes; the iterates are in {run.folder}")
        if rates:
            evaluate.scoreboard(rates, language.evaluation_set(args.eval_items), run.folder / "evaluation.json")
        evaluate.show_run(run.folder)
        if finished:
            run.end()


if __name__ == "__main__":
    sys.exit(run_command(main))
