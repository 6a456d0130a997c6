"""How the embedded default was made: `python tiny/train.py` rebuilds it from nothing, into runs/tiny.

One Llama of 0.76 million parameters learns its three parts at once, as a chat model does, from prompts alone:
Solver (70 % of the set), judge (18 %) and Challenger (12 %). The set is finite, drawn once from a seed, and the model is
trained on it until more of the same does not help (`--more` shows that), so that whatever self-play adds is not just more
of this. Some of the Solver's answers in the set are careless, so the model at temperature 1 is less sure than at its best,
and no amount of the same data mends that.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import model as llama  # noqa: E402 (the repository's own module, found through the line above)
from tiny import language  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def build_folder(folder):
    """Write everything but the weights: tokenizer, chat template and settings in Hugging Face layout."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    pieces = ["<|unknown|>", *SPECIAL, *language.PROMPT_PHRASES, *language.PHRASES, *language.CHARACTERS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    whole = sorted(language.PROMPT_PHRASES + language.PHRASES, key=len, reverse=True)
    escaped = "|".join("".join(c if c.isalnum() or c in ' ",:;' else "\\n" if c == "\n" else "\\" + c for c in p) for p in whole)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(escaped + "|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<|unknown|>", *SPECIAL]])
    end, begin, pad = vocabulary["<|end|>"], vocabulary["<|begin|>"], vocabulary["<|pad|>"]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>",
        "unk_token": "<|unknown|>", "model_max_length": 512, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE})
    write("generation_config.json", {"bos_token_id": begin, "eos_token_id": [end], "pad_token_id": pad, "do_sample": True, "temperature": 1.0})
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": 128,
           "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
           "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
           "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
           "bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    return raw, llama.Tokenizer(folder)


@torch.no_grad()
def solver_accuracy(model, tokenizer, queries, temperature, seed=0):
    """Share of right answers to queries, one sample each."""
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    rollout = llama.generate(model, prompts, max_new_tokens=32, temperature=temperature, generator=torch.Generator().manual_seed(seed))
    return sum(tokenizer.decode(ids) == language.solve(q) for ids, q in zip(rollout.ids, queries)) / len(queries)


def judge_accuracy(model, tokenizer, n=2000, seed=1):
    """The judge against the truth on n fresh exchanges: exact share, mean error in points, share that tells good from bad.

    The last is over queries: does an expected score of two or more go with a well-formed query?
    """
    import rewards
    rng = random.Random(f"judge {seed}")
    queries, answers = [], []
    while len(queries) < n:
        query = language.draw(rng, held_out=True)
        u = rng.random()
        query = language.spoil(query, rng) if u < 0.4 else query
        queries.append(query)
        answers.append([language.solve(query) if 0.4 <= u < 0.7 else language.misanswer(query, rng)])
    score = rewards.QualityReward(model, tokenizer)(queries, answers)[:, 0] * 7
    truth = torch.tensor([language.grade(q, a[0]) for q, a in zip(queries, answers)])
    return {"exact": (score.round() == truth).float().mean().item(), "mean error": (score - truth).abs().mean().item(),
            "well formed told from malformed": ((score >= 1.5) == (truth >= 2)).float().mean().item()}


def train(model, tokenizer, data, steps, batch, lr, seed, log):
    """Supervised fine-tuning: next-token loss on the replies alone; AdamW, cosine to a twentieth, 5 % warm-up."""
    rng = random.Random(seed)
    encoded = [(tokenizer.chat(messages), tokenizer.encode(reply) + [min(model.end_ids)]) for _, messages, reply in data]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(
        (i + 1) / (0.05 * steps), 0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / steps)).item())))
    order, began, losses = [], time.time(), []
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = rng.sample(range(len(encoded)), len(encoded))  # a new epoch
        rows = [encoded[order.pop()] for _ in range(batch)]
        packs = llama.pack([p for p, _ in rows], [[r] for _, r in rows], tokens=1024)
        total = sum(len(p.target) for p in packs)
        for packed in packs:
            loss = -llama.logprobs(model, packed).sum() / total
            loss.backward()
            losses.append(loss.item() * len(packs))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0 or step == steps:
            log(step, sum(losses) / len(losses), time.time() - began)
            losses = []


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="folder to write the model to; never over another model")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--again", type=int, default=2000, help="steps of a second round, at half the learning rate")
    parser.add_argument("--size", type=int, default=60000, help="conversations in the finite fine-tuning set")
    parser.add_argument("--batch", type=int, default=96, help="conversations a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the set, the weights and the order")
    parser.add_argument("--more", type=int, default=0, metavar="STEPS",
                        help="train the committed model this much longer on the same set instead, and save nothing")
    args = parser.parse_args()
    if min(args.steps, args.again, args.size, args.batch) < 1 or args.lr <= 0 or args.more < 0 or args.batch > args.size:
        raise llama.UserError("--steps, --size, --batch and --lr must be above zero, and --batch at most --size")
    torch.manual_seed(args.seed)
    folder = HERE if args.more else Path(args.out)
    if not args.more and (folder / "model.safetensors").exists():
        raise llama.UserError(f"{folder} holds a model already: choose another --out, nothing was touched")
    data = language.fine_tuning_set(args.size, args.seed)
    if args.more:
        model, tokenizer = llama.load(folder)
    else:
        raw, tokenizer = build_folder(folder)
        model = llama.Llama(llama.Config.from_json(raw), raw)
        model.folder, model.end_ids = folder, {raw["eos_token_id"]}
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} conversations")
    queries = language.evaluation_set(1000, seed=7)
    seen = [messages[0]["content"] for part, messages, _ in data if part == "solver"][:1000]

    def log(step, loss, seconds):
        row = {"step": step, "minutes": seconds / 60, "loss": loss}
        for name, items in (("held out", queries), ("trained on", seen)):
            row |= {f"{name}, sampled": solver_accuracy(model, tokenizer, items, 1.0), f"{name}, greedy": solver_accuracy(model, tokenizer, items, 0)}
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    if args.more:
        log(0, float("nan"), 0)
    for steps, lr in ((args.more, args.lr / 2),) if args.more else ((args.steps, args.lr), (args.again, args.lr / 2)):
        train(model, tokenizer, data, steps, args.batch, lr, args.seed, log)
    if not args.more:
        llama.save(model, folder)
    print("judge:", {k: round(v, 3) for k, v in judge_accuracy(model, tokenizer).items()})


if __name__ == "__main__":
    sys.exit(llama.run_command(main))
