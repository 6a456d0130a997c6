"""Speed, side by side in one run, as JSON: `python tests/bench.py` (needs tests/requirements.txt).

Ours and its peer alternate, so that a busy machine slows both; medians and their ratio.
    generate: 32 prompts x 16 answers on the embedded default, sampled to their natural ends, against transformers' generate
    grpo step: sample, reward, log-probabilities of policy and reference, one AdamW step, against TRL's GRPOTrainer
    spin update: one update of an iteration's training on 64 pairs, against TRL's DPOTrainer with stored reference log-probabilities
    lsp step: its floating-point work against what this machine reaches in one large matrix product; and against a step with half the answers
    run: which share of 100 steps is spent on the record (figures, games, bar), and which on checkpoints
"""
import argparse
import contextlib
import io
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
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import evaluate  # noqa: E402
import model as llama  # noqa: E402
import selfplay  # noqa: E402
import spin  # noqa: E402
from tiny import language  # noqa: E402

ROUNDS, ANSWERS = 7, 16


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
    ours = lambda: llama.generate(model, prompts, ANSWERS, 32)
    theirs = lambda: peer.generate(ids, attention_mask=mask, num_return_sequences=ANSWERS, max_new_tokens=32, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    return {"ours_s": statistics.median(a for a, _ in times), "transformers_s": statistics.median(b for _, b in times),
            "ratio": statistics.median(b / a for a, b in times)}


def stepper(*flags):
    """(a function that plays one step of selfplay.py with these flags, its settings)."""
    args = selfplay.parse_args(["--model", str(ROOT / "tiny"), "--answers", str(ANSWERS), "--device", "cpu", *flags])
    game = selfplay.set_up(args, "cpu")
    return lambda: selfplay.one_step(game, args), args


def bench_grpo(queries):
    """The same batch, KL weight and reward; TRL steps are timed between its own callbacks, ours in the gaps."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    ours, theirs = [], []
    ours_step, settings = stepper("--game", "grpo")
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
        config = GRPOConfig(output_dir=folder, use_cpu=True, per_device_train_batch_size=len(queries) * ANSWERS, num_generations=ANSWERS, max_completion_length=settings.answer_tokens,
                            beta=settings.kl, learning_rate=settings.lr, temperature=1.0, scale_rewards="none", loss_type="grpo", max_steps=ROUNDS + 1, report_to="none",
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


def bench_lsp():
    step, half = stepper("--game", "lsp")[0], stepper("--game", "lsp", "--answers", str(ANSWERS // 2))[0]
    step(), half()
    times = [(seconds(step), seconds(half), matrix_rate()) for _ in range(3 * ROUNDS)]
    with FlopCounterMode(display=False) as counter:
        step()
    gflop, (whole, halved, rate) = counter.get_total_flops() / 1e9, map(statistics.median, zip(*times))
    return {"step_s": whole, "half_the_answers_s": halved, "ratio": statistics.median(a / b for a, b, _ in times), "gflop_a_step": gflop,
            "matrix_product_gflop_s": rate, "share_of_it": gflop / whole / rate}


def bench_run():
    """What is neither play, score, update nor a checkpoint is the record."""
    spent = Counter()

    def clocked(function):
        def call(*args, **more):
            began = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                spent[function.__name__] += time.perf_counter() - began
        return call
    with contextlib.ExitStack() as stack:
        for owner, name in [(selfplay, name) for name in ("play", "score", "update", "train")] + [(evaluate.Run, "checkpoint")]:
            stack.enter_context(mock.patch.object(owner, name, clocked(getattr(owner, name))))
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        selfplay.main(["--model", str(ROOT / "tiny"), "--steps", "100", "--eval-items", "1", "--device", "cpu"])
    record = spent["train"] - sum(spent[name] for name in ("play", "score", "update", "checkpoint"))
    return {"seconds": spent["train"], "record": record / spent["train"], "checkpoints": spent["checkpoint"] / spent["train"]}


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    fresh = lambda: llama.load(ROOT / "tiny")
    model, tokenizer = fresh()
    rng = random.Random(0)
    queries = [language.draw(rng) for _ in range(32)]
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    result = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
              "lsp_step": bench_lsp(), "run": bench_run(), "generate": bench_generate(model, prompts), "grpo_step": bench_grpo(queries),
              "spin_update": bench_spin(*fresh())}
    print(json.dumps({k: {n: round(x, 4) for n, x in v.items()} if isinstance(v, dict) else v for k, v in result.items()}, indent=2))


if __name__ == "__main__":
    main()
