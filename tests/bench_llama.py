"""Real sizes, random weights, as JSON; needs no download.

On a GPU, with as many queries and answers as a step of the paper has:

    python tests/bench_llama.py --size llama-3.2-1b llama-3.2-3b --queries 8 --answers 8 \\
        --query-tokens 256 --answer-tokens 256 --micro-batch 4096 --low-memory

    decode: seconds of sampling. They are compared with what the memory's bandwidth allows, where
            weights and cache are read once a step and the bandwidth is measured with a copy. They
            are also compared with transformers' generate with its static cache.
    step:   whole steps of `selfplay.py` with the flags given, or else with the embedded defaults,
            and a reward model of the same size. Their peak memory is compared with the estimate
            of `--dry-run`. On a CPU the peak is the process's, so of several sizes only the first
            has the right one.
    trl:    the same number of games with TRL's GRPOTrainer, which generates through transformers.
            Sizes, tokens and reward model are the same; there is no Challenger and no judge. (For
            the same work on both sides: --game grpo --data FILE.)
            Where ours are bfloat16 with float32 masters, it runs twice: with float32 weights under
            autocast, as is its default, and with bfloat16 weights without masters. Answers of
            random weights decode to short texts, so rewards cost little.

The models are written to a temporary folder, with the sizes of their published config.json. The
vocabulary is the embedded default's, or --tokenizer's. Ids that it lacks decode to nothing.
"""
import argparse
import gc
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU: TRL would use every GPU that it sees

import torch

import model as llama
import selfplay
from support import data, memory
from support.machine import DTYPES

LLAMA3 = {
    "rope_theta": 500000.0, "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192},
}
SIZES = {  # from the published config.json of each
    "llama-3.2-1b": LLAMA3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "head_dim": 64},
    "llama-3.2-3b": LLAMA3 | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "head_dim": 128},
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "small": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
        "rope_theta": 10000.0, "max_position_embeddings": 1024, "tie_word_embeddings": True},
}


def write(folder, size, tokenizer, dtype, score_head):
    """A model folder with random weights."""
    kind = "LlamaForSequenceClassification" if score_head else "LlamaForCausalLM"
    raw = SIZES[size] | {"model_type": "llama", "architectures": [kind], "hidden_act": "silu",
                         "rms_norm_eps": 1e-5, "eos_token_id": 3}
    torch.manual_seed(int(score_head))
    model = llama.Llama(llama.config_from_json(raw)).to(dtype)
    model.raw, model.folder = raw, folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, folder)
    llama.save(model, folder)


def on_gpu(device):
    return torch.device(device).type == "cuda"


def sync(device):
    if on_gpu(device):
        torch.cuda.synchronize()


def process_peak():
    """The largest memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(work, device, rounds):
    """Median seconds, after one round that does not count."""
    times = []
    for _ in range(rounds + 1):
        sync(device)
        began = time.perf_counter()
        work()
        sync(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def bandwidth(device):
    """Bytes a second that a large copy reads and writes."""
    a = torch.empty(2**28 if on_gpu(device) else 2**26, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / seconds(lambda: b.copy_(a), device, 5)


def user(text):
    return [{"role": "user", "content": text}]


def decode_ours(folder, device, dtype, rows, new, rounds):
    """(figures, prompts). The model's memory is free again when this returns."""
    model, tokenizer = llama.load(folder, device, dtype)
    # The prompts are different, so that no row can profit from another row's work.
    prompts = [tokenizer.chat(user(f"{i} and {i * i}?")) for i in range(rows)]

    def sample():
        generator = torch.Generator(device).manual_seed(0)
        return llama.generate(model, prompts, 1, new, generator=generator, end_ids={-1})
    ours = seconds(sample, device, rounds)
    c, width = model.config, max(map(len, prompts))
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    positions = rows * (width + new / 2)
    cache = (2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * positions
             * dtype.itemsize)
    limit = new * (weights + cache) / bandwidth(device)
    result = {"rows": rows, "new_tokens": new, "ours_s": ours, "bandwidth_limit_s": limit,
              "share_of_limit": limit / ours}
    return result, prompts


def bench_decode(folder, device, dtype, rows, new, rounds):
    result, prompts = decode_ours(folder, device, dtype, rows, new, rounds)
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return result | {"transformers": "not installed"}
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    def peer_sample():
        peer.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                      do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                      cache_implementation="static", pad_token_id=0)
    theirs = seconds(peer_sample, device, rounds)
    return result | {"transformers_s": theirs, "ratio": theirs / result["ours_s"]}


def parsed(folder, reward, flags):
    return selfplay.parse_args(["--model", str(folder), "--reward", str(reward), *flags])


def sizes(args):
    return {"queries": args.queries, "answers": args.answers, "answer_tokens": args.answer_tokens}


def bench_step(folder, reward, flags, rounds):
    """A whole step, as selfplay.py plays it, and its peak memory."""
    args = parsed(folder, reward, flags)
    device, cuda = args.device, on_gpu(args.device)
    resident = process_peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    game = selfplay.set_up(args, device)
    step_s = seconds(lambda: selfplay.step(game, args), device, rounds)
    peak = torch.cuda.max_memory_allocated() if cuda else process_peak()
    above_start = peak - (0 if cuda else resident)
    foretold = memory.most(selfplay.plan(args))
    return sizes(args) | {
        "dtype": args.dtype, "step_s": step_s, "peak_gib": peak / 2**30,
        "peak_above_start_gib": above_start / 2**30, "foretold_gib": foretold / 2**30}


def batch_size(args):
    """The size of TRL's micro-batch: it divides the games, and is about as large as ours."""
    games, tokens = args.queries * args.answers, args.answer_tokens + 32
    divisors = [d for d in range(1, games + 1) if games % d == 0]
    return max(d for d in divisors if d == 1 or d * tokens <= args.micro_batch)


def bench_trl(folder, reward, flags, rounds, weights):
    """The same number of games with the same settings, and their peak memory.

    weights: the dtype of TRL's weights.
    """
    try:
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        return {"trl": f"not installed ({error.name})"}
    args, times = parsed(folder, reward, flags), []
    cuda, size = on_gpu(args.device), batch_size(args)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            sync(args.device)
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            sync(args.device)
            times.append(time.perf_counter() - self.began)

    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    rows = data.read_both(args)[0]  # of --data; ours is asked the same
    asked = [row.messages for row in rows] if rows else [user(f"{i} and {i * i}?")
                                                         for i in range(args.queries)]
    prompts = [asked[i % len(asked)] for i in range(args.queries * (rounds + 1))]
    with tempfile.TemporaryDirectory() as temporary:
        config = GRPOConfig(
            output_dir=temporary, use_cpu=not cuda, per_device_train_batch_size=size,
            gradient_accumulation_steps=args.queries * args.answers // size,
            num_generations=args.answers, max_completion_length=args.answer_tokens,
            beta=args.kl, learning_rate=args.lr, temperature=1.0, top_k=0, scale_rewards="none",
            bf16=args.dtype == "bfloat16", gradient_checkpointing=args.low_memory,
            model_init_kwargs={"dtype": weights}, max_steps=rounds + 1, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=0,
        )
        trainer = GRPOTrainer(
            str(folder), str(reward), config, Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Clock()])
        trainer.train()
    result = sizes(args) | {"step_s": statistics.median(times[1:])}
    if cuda:
        result["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return result


def rounded(figures):
    return {name: round(x, 3) if isinstance(x, float) else x for name, x in figures.items()}


def measure(size, args, flags):
    """All that --what names, of one size: {what: figures}.

    If something does not fit into the GPU's memory, its figures say so and the rest goes on.
    """
    result, dtype = {}, DTYPES[args.dtype]
    flags = ["--dtype", args.dtype, "--device", args.device, *flags]

    def take(name, work, *words):
        try:
            result[name] = work(*words)
        except torch.OutOfMemoryError:
            result[name] = {"failed": "out of memory"}
        gc.collect()
        if on_gpu(args.device):
            torch.cuda.empty_cache()

    with tempfile.TemporaryDirectory() as temporary:
        folder, reward = Path(temporary) / "policy", Path(temporary) / "reward"
        for path, score_head in ((folder, False), (reward, True)):
            path.mkdir()
            write(path, size, args.tokenizer, dtype, score_head)
        if "step" in args.what:
            take("step", bench_step, folder, reward, flags, args.rounds)
        if "trl" in args.what:
            for weights in dict.fromkeys(("float32", args.dtype)):
                name = f"trl, {weights} weights"
                take(name, bench_trl, folder, reward, flags, args.rounds, weights)
                trl, ours = result[name], result.get("step", {})
                if "step_s" in trl and "step_s" in ours:
                    trl["ratio"] = trl["step_s"] / ours["step_s"]
        if "decode" in args.what:
            take("decode", bench_decode, folder, args.device, dtype, args.rows, args.new_tokens,
                 args.rounds)
    return {name: rounded(figures) for name, figures in result.items()}


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), nargs="+", default=["small"],
                        help="whose published sizes")
    parser.add_argument("--what", choices=["decode", "step", "trl"], nargs="+",
                        default=["step", "trl", "decode"], help="what to measure")
    parser.add_argument("--rows", type=int, default=64, help="of the decoding bench")
    parser.add_argument("--new-tokens", type=int, default=512, help="of the decoding bench")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over so many")
    parser.add_argument("--dtype", choices=list(DTYPES),
                        default="bfloat16" if cuda else "float32", help="of all models")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu, cuda, ..")
    parser.add_argument("--tokenizer", default=str(ROOT / "tiny"),
                        help="folder with tokenizer.json and tokenizer_config.json")
    args, flags = parser.parse_known_args()  # what is left goes to selfplay.py
    if flags and args.what == ["decode"]:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    machine = f"CPU, {torch.get_num_threads()} threads"
    if on_gpu(args.device):
        machine = torch.cuda.get_device_name()
    for size in args.size:
        figures = {"machine": f"{machine}, torch {torch.__version__}", "size": size}
        print(json.dumps(figures | measure(size, args, flags), indent=2), flush=True)


if __name__ == "__main__":
    main()
