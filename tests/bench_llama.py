"""Real sizes, random weights, as JSON; needs no download. On a GPU, with as many queries and answers as a step of the paper has:

    python tests/bench_llama.py --size llama-3.2-1b llama-3.2-3b --queries 8 --answers 8 --query-tokens 256 --answer-tokens 256 --micro-batch 4096 --recompute --cuda-graphs

    decode: seconds of sampling, plain and in steps of fixed shapes (on a GPU: CUDA graphs), against what the memory's bandwidth
            allows (weights and cache read once a step, against a measured copy), and against transformers' generate with its
            static cache; and for how many tokens, in the median, the two ways sample alike (bfloat16 rounds, so they part)
    step:   whole steps of `selfplay.py` by the flags given, else with the embedded defaults, and a reward model of the same size; their peak memory against
            what `--dry-run` foretells (on a CPU the peak is the process's, so of several sizes it is right for the first alone)
    trl:    as many games of TRL's GRPOTrainer, which generates through transformers: the same sizes, tokens and reward model,
            no Challenger and no judge. Where ours are bfloat16 with float32 masters, twice: float32 weights under autocast, as it
            is by default, and bfloat16 weights without masters. Answers of random weights decode to little, so rewards cost little

The models are written to a temporary folder with the sizes of their published config.json; the vocabulary is the embedded
default's (the ids that it lacks decode to nothing), or --tokenizer's.
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
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU: TRL would take all that it sees

import torch  # noqa: E402

import model as llama  # noqa: E402
import selfplay  # noqa: E402

LLAMA3 = {"rope_theta": 500000.0, "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": True,
          "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}}
SIZES = {  # from the published config.json of each
    "llama-3.2-1b": LLAMA3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "llama-3.2-3b": LLAMA3 | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
                     "vocab_size": 49152, "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
              "vocab_size": 1000, "rope_theta": 10000.0, "max_position_embeddings": 1024, "tie_word_embeddings": True},
}


def write(folder, size, tokenizer, dtype, score_head):
    """A model folder with random weights."""
    kind = "LlamaForSequenceClassification" if score_head else "LlamaForCausalLM"
    raw = SIZES[size] | {"model_type": "llama", "architectures": [kind], "hidden_act": "silu", "rms_norm_eps": 1e-5, "eos_token_id": 3}
    torch.manual_seed(int(score_head))
    model = llama.Llama(llama.Config.from_json(raw), raw).to(dtype)
    model.folder = folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, folder)
    llama.save(model, folder)


def sync(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


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
    a = torch.empty(2**28 if torch.device(device).type == "cuda" else 2**26, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / seconds(lambda: b.copy_(a), device, 5)


def bench_decode(folder, device, dtype, rows, new, rounds):
    model, tokenizer = llama.load(folder, device, dtype)
    # Different prompts, so that no row can lean on another's work.
    prompts = [tokenizer.chat([{"role": "user", "content": f"{i} and {i * i}?"}]) for i in range(rows)]
    sample = lambda: llama.generate(model, prompts, 1, new, generator=torch.Generator(device).manual_seed(0), end_ids={-1})
    ours, plain = seconds(sample, device, rounds), sample().ids
    model.replay = True
    fixed = seconds(sample, device, rounds)
    alike = statistics.median(next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), new) for pair in zip(plain, sample().ids))
    c, width = model.config, max(map(len, prompts))
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * rows * (width + new / 2) * dtype.itemsize
    limit = new * (weights + cache) / bandwidth(device)
    result = {"rows": rows, "new_tokens": new, "ours_s": ours, "fixed_shapes_s": fixed, "alike_tokens": alike, "bandwidth_limit_s": limit, "share_of_limit": limit / min(ours, fixed)}
    del model, sample
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return result | {"transformers": "not installed"}
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    theirs = seconds(lambda: peer.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                           cache_implementation="static", pad_token_id=0), device, rounds)
    return result | {"transformers_s": theirs, "ratio": theirs / min(ours, fixed)}


def bench_step(folder, reward, flags, rounds):
    """A whole step, as selfplay.py plays it, and its peak memory."""
    args = selfplay.parse_args(["--model", str(folder), "--reward", str(reward), *flags])
    device, cuda = args.device, torch.device(args.device).type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    game = selfplay.set_up(args, device)
    step = lambda: selfplay.one_step(game, args)
    result = {"queries": args.queries, "answers": args.answers, "answer_tokens": args.answer_tokens, "dtype": args.dtype, "step_s": seconds(step, device, rounds)}
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result | {"peak_gib": peak / 2**30, "peak_above_start_gib": (peak - (0 if cuda else resident)) / 2**30, "foretold_gib": llama.most_memory(selfplay.plan(args)) / 2**30}


def bench_trl(folder, reward, flags, rounds, weights):
    """As many games with the same settings and about as large micro-batches, and their peak memory. weights: the dtype of its weights."""
    try:
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        return {"trl": f"not installed ({error.name})"}
    args, times = selfplay.parse_args(["--model", str(folder), "--reward", str(reward), *flags]), []
    cuda, games = torch.device(args.device).type == "cuda", args.queries * args.answers
    size = max(d for d in range(1, games + 1) if games % d == 0 and (d == 1 or d * (args.answer_tokens + 32) <= args.micro_batch))

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
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i} and {i * i}?"}] for i in range(args.queries * (rounds + 1))]})
    with tempfile.TemporaryDirectory() as temporary:
        config = GRPOConfig(output_dir=temporary, use_cpu=not cuda, per_device_train_batch_size=size, gradient_accumulation_steps=games // size, num_generations=args.answers,
                            max_completion_length=args.answer_tokens, beta=args.kl, learning_rate=args.lr, temperature=1.0, top_k=0, scale_rewards="none", bf16=args.dtype == "bfloat16",
                            gradient_checkpointing=args.recompute, model_init_kwargs={"dtype": weights}, max_steps=rounds + 1, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, seed=0)
        GRPOTrainer(str(folder), str(reward), config, data, processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Clock()]).train()
    result = {"queries": args.queries, "answers": args.answers, "answer_tokens": args.answer_tokens, "step_s": statistics.median(times[1:])}
    return result | ({"peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30} if cuda else {})


def measure(size, args, flags):
    """All that --what names of one size: {what: figures}. What does not fit into the GPU says so, and the rest goes on."""
    result, dtype, cuda = {}, llama.DTYPES[args.dtype], torch.device(args.device).type == "cuda"
    flags = ["--dtype", args.dtype, "--device", args.device, *flags]

    def take(name, work, *words):
        try:
            result[name] = work(*words)
        except torch.OutOfMemoryError:
            result[name] = {"failed": "out of memory"}
        gc.collect()
        if cuda:
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
                take(f"trl, {weights} weights", bench_trl, folder, reward, flags, args.rounds, weights)
                trl, ours = result[f"trl, {weights} weights"], result.get("step", {})
                if "step_s" in trl and "step_s" in ours:
                    trl["ratio"] = trl["step_s"] / ours["step_s"]
        if "decode" in args.what:
            take("decode", bench_decode, folder, args.device, dtype, args.rows, args.new_tokens, args.rounds)
    return {k: {n: round(x, 3) if isinstance(x, float) else x for n, x in v.items()} for k, v in result.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), nargs="+", default=["small"], help="whose published sizes")
    parser.add_argument("--what", choices=["decode", "step", "trl"], nargs="+", default=["step", "trl", "decode"], help="what to measure")
    parser.add_argument("--rows", type=int, default=64, help="of the decoding bench")
    parser.add_argument("--new-tokens", type=int, default=512, help="of the decoding bench")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over so many")
    parser.add_argument("--dtype", choices=list(llama.DTYPES), default="bfloat16" if torch.cuda.is_available() else "float32", help="of all models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ..")
    parser.add_argument("--tokenizer", default=str(ROOT / "tiny"), help="folder with tokenizer.json and tokenizer_config.json")
    args, flags = parser.parse_known_args()  # what is left goes to selfplay.py
    if flags and args.what == ["decode"]:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    machine = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for size in args.size:
        print(json.dumps({"machine": f"{machine}, torch {torch.__version__}", "size": size} | measure(size, args, flags), indent=2), flush=True)


if __name__ == "__main__":
    main()
