"""Speed, side by side in one run, as JSON: `python tests/bench.py` (needs tests/requirements.txt).

Ours and its peer alternate, so that a busy machine slows both; medians and their ratio.
    generate: 32 prompts x 8 answers on the embedded default, sampled to their natural ends, against transformers' generate
    grpo step: sample, reward, log-probabilities of policy and reference, one AdamW step, against TRL's GRPOTrainer
    spin update: one update of an iteration's training on 64 pairs, against TRL's DPOTrainer with stored reference log-probabilities
    lsp step: its floating-point work against what this machine reaches in one large matrix product
"""
import argparse
import copy
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import model as llama  # noqa: E402
import selfplay  # noqa: E402
import spin  # noqa: E402
from rewards import ExactReward, QualityReward  # noqa: E402
from tiny import language  # noqa: E402

ROUNDS = 7


def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def matrix_rate():
    """GFLOP/s of a float32 product of 1024 x 1024 matrices, median."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / statistics.median(seconds(lambda: a @ b) for _ in range(30)) / 1e9


def bench_generate(model, prompts):
    from transformers import AutoModelForCausalLM
    peer = AutoModelForCausalLM.from_pretrained(ROOT / "tiny").eval()
    width, pad = max(map(len, prompts)), peer.config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ours = lambda: llama.generate(model, prompts, 8, 32)
    theirs = lambda: peer.generate(ids, attention_mask=mask, num_return_sequences=8, max_new_tokens=32, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    return {"ours_s": statistics.median(a for a, _ in times), "transformers_s": statistics.median(b for _, b in times),
            "ratio": statistics.median(b / a for a, b in times)}


def stepper(model, tokenizer, *flags):
    """A function that plays one step, and the list of whole-step seconds."""
    args = selfplay.parse_args([*flags, "--device", "cpu"])
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    judge = QualityReward(reference, tokenizer) if args.game == "lsp" else None
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    prompt = None if args.game == "grpo" else selfplay.challenger_prompt(tokenizer)
    draw = lambda: [{"role": "user", "content": language.draw(rng)}]

    def step():
        queries, answers, challenger, solver = selfplay.play(model, tokenizer, prompt, draw, args, generator)
        _, _, a_sol, a_ch = selfplay.score(queries, answers, ExactReward(), judge, args)
        selfplay.update(model, reference, optimizer, selfplay.sides(solver, challenger, a_sol, a_ch, args), args)
    return step


def bench_grpo(model, tokenizer, queries):
    """The same batch, KL weight and reward; TRL steps are timed between its own callbacks, ours in the gaps."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    ours_step, ours, theirs = stepper(model, tokenizer, "--game", "grpo"), [], []
    ours_step()

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            theirs.append(time.perf_counter() - self.began)
            ours.append(seconds(ours_step))

    def reward(prompts, completions, **kwargs):
        return [float(language.solve(p[0]["content"]) == c[0]["content"]) for p, c in zip(prompts, completions)]

    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": q}] for q in queries * (ROUNDS + 1)]})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, use_cpu=True, per_device_train_batch_size=256, num_generations=8, max_completion_length=32, beta=0.02,
                            learning_rate=1e-4, temperature=1.0, scale_rewards="none", loss_type="grpo", max_steps=ROUNDS + 1, report_to="none",
                            logging_strategy="no", save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False, top_k=0, seed=0)
        trainer = GRPOTrainer(AutoModelForCausalLM.from_pretrained(ROOT / "tiny"), reward, config, data,
                              processing_class=AutoTokenizer.from_pretrained(ROOT / "tiny"), callbacks=[Clock()])
        trainer.train()
    times = list(zip(ours, theirs))[1:]
    return {"ours_s": statistics.median(a for a, _ in times), "trl_s": statistics.median(b for _, b in times), "ratio": statistics.median(b / a for a, b in times)}


def bench_spin(model, tokenizer):
    """The same pairs, loss, optimizer and batch; as in a real iteration, in a part of them both answers are the same."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    args = spin.parse_args(["--device", "cpu"])
    data = spin.language_data(64 * (ROUNDS + 1))
    prompts, answers = spin.encode(tokenizer, data, model.end_ids, 32)
    rivals = spin.opponent_answers(model, prompts, 32, torch.Generator().manual_seed(0))
    pairs = [spin.Pair(*row) for row in zip(prompts, answers, rivals)]
    ref = spin.opponent_logprobs(model, pairs, args.micro_batch)
    ours, theirs = [], []
    updates = spin.train(model, pairs, ref, args.lam, args.lr, spin.rmsprop(model, args.lr), args, random.Random(0))
    next(updates)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            theirs.append(time.perf_counter() - self.began)
            ours.append(seconds(lambda: next(updates)))

    turn = lambda role, ids: [{"role": role, "content": tokenizer.decode(ids)}]
    rows = [{"prompt": messages, "chosen": turn("assistant", p.answer), "rejected": turn("assistant", p.rival)} for (messages, _), p in zip(data, pairs)]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(output_dir=folder, use_cpu=True, per_device_train_batch_size=64, beta=args.lam, learning_rate=args.lr, optim="rmsprop", max_steps=ROUNDS + 1,
                           precompute_ref_log_probs=True, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, bf16=False,
                           gradient_checkpointing=False, seed=0)
        DPOTrainer(AutoModelForCausalLM.from_pretrained(ROOT / "tiny"), args=config, train_dataset=Dataset.from_list(rows),
                   processing_class=AutoTokenizer.from_pretrained(ROOT / "tiny"), callbacks=[Clock()]).train()
    times = list(zip(ours, theirs))[1:]
    return {"ours_s": statistics.median(a for a, _ in times), "trl_s": statistics.median(b for _, b in times), "ratio": statistics.median(b / a for a, b in times),
            "identical_pairs": sum(p.answer == p.rival for p in pairs) / len(pairs)}


def bench_lsp(model, tokenizer):
    step = stepper(model, tokenizer, "--game", "lsp")
    step()
    work, times, rates = [], [], []
    for _ in range(ROUNDS):
        times.append(seconds(step))
        rates.append(matrix_rate())
    with FlopCounterMode(display=False) as counter:
        step()
    gflop = counter.get_total_flops() / 1e9
    return {"step_s": statistics.median(times), "gflop_a_step": gflop, "matrix_product_gflop_s": statistics.median(rates),
            "share_of_it": gflop / statistics.median(times) / statistics.median(rates)}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    fresh = lambda: llama.load(ROOT / "tiny")
    model, tokenizer = fresh()
    rng = random.Random(0)
    queries = [language.draw(rng) for _ in range(32)]
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
              "lsp_step": bench_lsp(*fresh()), "generate": bench_generate(model, prompts), "grpo_step": bench_grpo(*fresh(), queries),
              "spin_update": bench_spin(*fresh())}
    print(json.dumps({k: {n: round(x, 3) for n, x in v.items()} if isinstance(v, dict) else v for k, v in result.items()}, indent=2))


if __name__ == "__main__":
    main()
