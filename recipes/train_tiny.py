"""How the embedded default was made: this rebuilds it from nothing, into runs/tiny.

    python recipes/train_tiny.py

One Llama of 0.76 million parameters learns its three parts at once: Solver (70 % of the training
set), judge (18 %) and Challenger (12 %). As in a chat model, only the prompt tells the parts apart.
The set is finite and drawn once from a seed. The model is trained on it until more of the same does
not help (`--more` shows that). So what self-play adds is not just more of this training. Some of
the Solver's answers in the set are careless. That makes the model less reliable at temperature 1
than in greedy decoding, and no amount of the same data mends it.
"""
import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Llama, config_from_json, generate, load, logprobs, pack, save
from rewards import QualityReward
from support import console
from support.text import Tokenizer
from tiny import language

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|unknown|>", "<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>",
           "<|assistant|>"]
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


# --------------------------------------------------------------------------------------------------
# The folder: tokenizer, chat template and settings, in Hugging Face layout

def build_folder(folder):
    """Write everything but the weights. Returns (the config as a dict, the tokenizer)."""
    tokenizer, vocabulary = build_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
        "eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<|unknown|>",
        "model_max_length": 512, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE})
    end, begin, pad = (vocabulary[token] for token in ("<|end|>", "<|begin|>", "<|pad|>"))
    _write_json(folder / "generation_config.json", {
        "bos_token_id": begin, "eos_token_id": [end], "pad_token_id": pad,
        "do_sample": True, "temperature": 1.0})
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
           "vocab_size": len(vocabulary), **SHAPE, "max_position_embeddings": 512,
           "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
           "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
           "bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    return raw, Tokenizer(folder)


def build_tokenizer():
    """(tokenizer, {token: id}). A phrase of the language is one token; all else is one a letter."""
    phrases = [*language.PROMPT_PHRASES, *language.PHRASES]
    tokens = dict.fromkeys([*SPECIAL, *phrases, *language.CHARACTERS])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    longest_first = sorted(phrases, key=len, reverse=True)
    pattern = "|".join([*map(_escape, longest_first), "[\\s\\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer, vocabulary


def _escape(phrase):
    """A phrase as a regular expression that matches it literally."""
    special = {"\n": "\\n"} | {c: c for c in ' ",:;'}
    return "".join(c if c.isalnum() else special.get(c, "\\" + c) for c in phrase)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# How good it is

@torch.no_grad()
def solver_accuracy(model, tokenizer, queries, temperature, seed=0):
    """Share of right answers to the queries, with one sample each."""
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    rollout = generate(model, prompts, max_new_tokens=32, temperature=temperature,
                       generator=torch.Generator().manual_seed(seed))
    answers = [tokenizer.decode(ids) for ids in rollout.ids]
    return sum(a == language.solve(q) for a, q in zip(answers, queries)) / len(queries)


def judge_accuracy(model, tokenizer, n=2000, seed=1):
    """How well the judge grades n fresh exchanges, compared with the true grades.

    Three figures: the share of exact grades, the mean error in points, and the share of queries
    that are rightly told to be well formed or not. A grade of two or more means well formed.
    """
    queries, answers = exchanges(n, random.Random(f"judge {seed}"))
    score = QualityReward(model, tokenizer)(queries, [[a] for a in answers])[:, 0] * 7
    truth = torch.tensor([language.grade(q, a) for q, a in zip(queries, answers)])
    told_apart = (score >= 1.5) == (truth >= 2)
    return {"exact": (score.round() == truth).float().mean().item(),
            "mean error": (score - truth).abs().mean().item(),
            "well formed told from malformed": told_apart.float().mean().item()}


def exchanges(n, rng):
    """n held-out queries, 40 % spoilt, and an answer to each: right in 30 %, else wrong."""
    queries, answers = [], []
    for _ in range(n):
        query = language.draw(rng, held_out=True)
        u = rng.random()
        query = language.spoil(query, rng) if u < 0.4 else query
        queries.append(query)
        right = 0.4 <= u < 0.7
        answers.append(language.solve(query) if right else language.misanswer(query, rng))
    return queries, answers


# --------------------------------------------------------------------------------------------------
# Training

def learning_rate(i, steps):
    """Update i's factor of the peak rate: 5 % of warm-up, then a cosine down to a twentieth."""
    warm_up = (i + 1) / (0.05 * steps)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / steps)).item())
    return min(warm_up, 0.05 + 0.95 * cosine)


def train(model, tokenizer, data, steps, batch, lr, seed, log):
    """Supervised fine-tuning with AdamW: next-token loss on the replies alone.

    log(step, mean loss, seconds) is called every 500 steps and after the last one.
    """
    rng, end = random.Random(seed), min(model.end_ids)
    encoded = [(tokenizer.chat(messages), tokenizer.encode(reply) + [end])
               for _, messages, reply in data]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate(i, steps))
    order, began, losses = [], time.time(), []
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = rng.sample(range(len(encoded)), len(encoded))  # a new epoch
        losses += gradients(model, [encoded[order.pop()] for _ in range(batch)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0 or step == steps:
            log(step, sum(losses) / len(losses), time.time() - began)
            losses = []


def gradients(model, rows):
    """Add up the gradients of one batch of (prompt, reply). Returns the loss of each part of it."""
    packs = pack([prompt for prompt, _ in rows], [[reply] for _, reply in rows], tokens=1024)
    total = sum(len(p.target) for p in packs)
    losses = []
    for packed in packs:
        loss = -logprobs(model, packed).sum() / total
        loss.backward()
        losses.append(loss.item() * len(packs))
    return losses


# --------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    """The command's settings. Raises UserError for numbers that make no sense."""
    parser = argparse.ArgumentParser(
        description="How the embedded default was made: rebuild it from nothing, into runs/tiny.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--out", default="runs/tiny", help="folder for the model; never over another model")
    flag("--steps", type=int, default=4000, help="optimizer steps")
    flag("--again", type=int, default=2000,
         help="steps of a second round, at half the learning rate")
    flag("--size", type=int, default=60000, help="conversations in the finite fine-tuning set")
    flag("--batch", type=int, default=96, help="conversations in a step")
    flag("--lr", type=float, default=2e-3, help="peak learning rate")
    flag("--seed", type=int, default=0, help="seed of the set, the weights and the order")
    flag("--more", type=int, default=0, metavar="STEPS",
         help="instead, train the committed model this much longer on the same set; save nothing")
    args = parser.parse_args(argv)
    smallest = min(args.steps, args.again, args.size, args.batch)
    if smallest < 1 or args.lr <= 0 or args.more < 0 or args.batch > args.size:
        raise console.UserError(
            "--steps, --size, --batch and --lr must be above zero, and --batch at most --size")
    return args


def new_model(folder):
    """(model with random weights, tokenizer), in a folder that holds no model yet."""
    if (folder / "model.safetensors").exists():
        raise console.UserError(
            f"{folder} holds a model already: choose another --out, nothing was touched")
    raw, tokenizer = build_folder(folder)
    model = Llama(config_from_json(raw))
    model.raw, model.folder, model.end_ids = raw, folder, {raw["eos_token_id"]}
    return model, tokenizer


def accuracy_log(model, tokenizer, data):
    """A function log(step, loss, seconds) that prints a line with the Solver's accuracy.

    It is measured on 1,000 held-out queries and on 1,000 that the model is trained on.
    """
    seen = [messages[0]["content"] for part, messages, _ in data if part == "solver"][:1000]
    sets = {"held out": language.evaluation_set(1000, drawing=3), "trained on": seen}

    def log(step, loss, seconds):
        row = {"step": f"{step}", "minutes": f"{seconds / 60:.3f}", "loss": f"{loss:.3f}"}
        for name, queries in sets.items():
            for how, temperature in (("sampled", 1.0), ("greedy", 0)):
                accuracy = solver_accuracy(model, tokenizer, queries, temperature)
                row[f"{name}, {how}"] = f"{accuracy:.3f}"
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    return log


def main(argv=None):
    """Train a new model and save it; with --more, only train the committed one longer."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    model, tokenizer = load(ROOT / "tiny") if args.more else new_model(Path(args.out))
    data = language.fine_tuning_set(args.size, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} conversations")
    log = accuracy_log(model, tokenizer, data)
    rounds = [(args.steps, args.lr), (args.again, args.lr / 2)]
    if args.more:
        rounds = [(args.more, args.lr / 2)]
        log(0, math.nan, 0)  # how it stands before
    for steps, lr in rounds:
        train(model, tokenizer, data, steps, args.batch, lr, args.seed, log)
    if not args.more:
        save(model, Path(args.out))
    print("judge:", {k: round(v, 3) for k, v in judge_accuracy(model, tokenizer).items()})


if __name__ == "__main__":
    sys.exit(console.run_command(main))
