"""Speed, side by side in one run, as JSON: `python tests/bench.py` (needs tests/requirements.txt).

Ours and its peer alternate, so that a busy machine slows both. Times are medians, `ratio` is the
median of the ratios, and `middle_half` holds their quartiles.
    generate: 32 prompts x 16 answers on the embedded default, sampled to their natural ends,
        against transformers' generate
    grpo step: sample, reward, log-probabilities of policy and reference, and one AdamW step,
        against TRL's GRPOTrainer
    spin update: one update on 64 pairs whose answers differ, against TRL's DPOTrainer with stored
        reference log-probabilities
    lsp step: its floating-point work against what this machine reaches in one large matrix
        product, and against a step with half the answers
The peers get the same prompts, lengths, losses and optimizers. What ours saves in addition: a
prompt, and what answers begin with alike, is computed once for its group. `ratio_unshared` is the
ratio with that switched off (`unshared`): then each answer is a row of its own, as in the peers.
    run: the share of 100 steps that is spent on the record (figures, games, progress bar), and
        the share that is spent on checkpoints
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

import torch
from torch.utils.flop_counter import FlopCounterMode

import model as llama
import selfplay
import spin
from support import learning, runs
from tiny import language

ROUNDS, ANSWERS = 7, 16


def median(values):
    return statistics.median(values)


def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def matrix_rate():
    """GFLOP/s of a float32 product of 1024 x 1024 matrices, median."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / median(seconds(lambda: a @ b) for _ in range(30)) / 1e9


def compared(times, peer):
    """The figures of [(our seconds, the same unshared, the peer's seconds)]."""
    ours, unshared, theirs = zip(*times)
    ratios = [b / a for a, b in zip(ours, theirs)]
    return {"ours_s": median(ours), f"{peer}_s": median(theirs), "ratio": median(ratios),
            "middle_half": statistics.quantiles(ratios, n=4)[::2],
            "ratio_unshared": median(b / a for a, b in zip(unshared, theirs))}


@contextlib.contextmanager
def unshared(whole=False):
    """Inside, each answer is sampled and scored as a row of its own, behind its own prompt.

    whole: all rows in one micro-batch, as SPIN needs both answers of a pair at once.
    """
    def generate(model, prompts, group, *rest):
        return llama.generate(model, [p for p in prompts for _ in range(group)], 1, *rest)

    def pack(prompts, completions, tokens, device, **more):
        repeated = [p for p, group in zip(prompts, completions) for _ in group]
        alone = [[ids] for group in completions for ids in group]
        return llama.pack(repeated, alone, 10**9 if whole else tokens, device)
    with mock.patch.object(selfplay, "generate", generate), \
            mock.patch.object(selfplay, "pack", pack), mock.patch.object(spin, "pack", pack):
        yield


def bench_generate(model, prompts):
    from transformers import AutoModelForCausalLM
    peer = AutoModelForCausalLM.from_pretrained(ROOT / "tiny").eval()
    width, pad = max(map(len, prompts)), peer.config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def ours():
        selfplay.generate(model, prompts, ANSWERS, 32)

    def theirs():
        peer.generate(ids, attention_mask=mask, num_return_sequences=ANSWERS, max_new_tokens=32,
                      do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    def alone():
        with unshared():
            return seconds(ours)
    ours()
    theirs()
    times = [(seconds(ours), alone(), seconds(theirs)) for _ in range(ROUNDS)]
    return compared(times, "transformers")


def stepper(*flags):
    """(a function that plays one step of selfplay.py with these flags, its settings)."""
    args = selfplay.parse_args(["--model", str(ROOT / "tiny"), "--answers", str(ANSWERS),
                                "--device", "cpu", *flags])
    game = selfplay.set_up(args, "cpu")
    return lambda: selfplay.step(game, args), args


def bench_grpo(queries):
    """The batch, the KL weight and the reward are the same.

    TRL's steps are timed between its own callbacks, and ours run between TRL's steps.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    ours, alone, theirs = [], [], []
    ours_step, settings = stepper("--game", "grpo")
    ours_step()

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            theirs.append(time.perf_counter() - self.began)
            ours.append(seconds(ours_step))
            with unshared():
                alone.append(seconds(ours_step))

    def reward(prompts, completions, **kwargs):
        return [float(language.solve(prompt[0]["content"]) == completion[0]["content"])
                for prompt, completion in zip(prompts, completions)]

    turns = [[{"role": "user", "content": query}] for query in queries * (ROUNDS + 1)]
    data = Dataset.from_dict({"prompt": turns})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=len(queries) * ANSWERS,
            num_generations=ANSWERS, max_completion_length=settings.answer_tokens,
            beta=settings.kl, learning_rate=settings.lr, temperature=1.0, top_k=0,
            scale_rewards="none", loss_type="grpo", max_steps=ROUNDS + 1, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, bf16=False,
            gradient_checkpointing=False, seed=0,
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(ROOT / "tiny"), reward, config, data,
            processing_class=AutoTokenizer.from_pretrained(ROOT / "tiny"), callbacks=[Clock()])
        trainer.train()
    return compared(list(zip(ours, alone, theirs))[1:], "trl")


def bench_spin():
    """The pairs, the loss, the optimizer and the batch are the same. No pair's answers are equal.

    (In a real iteration some are. Ours leaves those out, as they teach nothing.)
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    args = spin.parse_args(["--model", str(ROOT / "tiny"), "--device", "cpu", "--iterations", "1",
                            "--pairs", "2500", "--epochs", "3"])
    game, ours, alone, theirs = spin.set_up(args), [], [], []
    it = spin.opponent_plays(game, args, spin.new_iteration(game, args, 0, [], 0))
    differ = [i for i, pair in enumerate(it.pairs) if pair.answer != pair.rival]
    share, differ = len(differ) / len(it.pairs), differ[:args.batch * (ROUNDS + 1)]
    it = it._replace(chosen=[it.chosen[i] for i in differ], pairs=[it.pairs[i] for i in differ],
                     ref=it.ref[differ])
    updates = spin.player_trains(game, args, it, spin.rmsprop(game.player))
    next(updates)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            theirs.append(time.perf_counter() - self.began)
            ours.append(seconds(lambda: next(updates)))
            with unshared(whole=True):
                alone.append(seconds(lambda: next(updates)))

    def turn(role, ids):
        return [{"role": role, "content": game.tokenizer.decode(ids)}]

    rows = [{"prompt": game.data[i][0], "chosen": turn("assistant", pair.answer),
             "rejected": turn("assistant", pair.rival)}
            for i, pair in zip(it.chosen, it.pairs)]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=args.batch,
            beta=args.lam[0], learning_rate=args.lr[0], optim="rmsprop", max_steps=ROUNDS + 1,
            precompute_ref_log_probs=True, report_to="none", logging_strategy="no",
            save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
            seed=0,
        )
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(ROOT / "tiny"), args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(ROOT / "tiny"), callbacks=[Clock()])
        trainer.train()
    with FlopCounterMode(display=False) as counter:
        next(updates)
    return compared(list(zip(ours, alone, theirs))[1:], "trl") | {
        "pairs_that_differ": share, "gflop_an_update": counter.get_total_flops() / 1e9}


def bench_lsp():
    """Steps differ, so a second game plays the very same ones, to count their operations."""
    step, _ = stepper("--game", "lsp")
    same, _ = stepper("--game", "lsp")
    half, _ = stepper("--game", "lsp", "--answers", str(ANSWERS // 2))
    for first in (step, same, half):
        first()
    times = [(seconds(step), seconds(half), matrix_rate()) for _ in range(3 * ROUNDS)]
    with FlopCounterMode(display=False) as counter:
        for _ in times:
            same()
    gflop = counter.get_total_flops() / 1e9 / len(times)
    whole, halved, rate = map(median, zip(*times))
    return {"step_s": whole, "middle_half_s": statistics.quantiles(list(zip(*times))[0], n=4)[::2],
            "half_the_answers_s": halved,
            "ratio": median(a / b for a, b, _ in times), "gflop_a_step": gflop,
            "matrix_product_gflop_s": rate, "share_of_it": gflop / whole / rate}


def bench_run():
    """The record is what remains without play, score, the update and checkpoints."""
    spent = Counter()

    def clocked(function):
        def call(*args, **more):
            began = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                spent[function.__name__] += time.perf_counter() - began
        return call
    clocks = [(selfplay, name) for name in ("play", "score", "gradients", "train")]
    clocks += [(learning, "take"), (runs.Run, "checkpoint")]
    with contextlib.ExitStack() as stack:
        for owner, name in clocks:
            patch = mock.patch.object(owner, name, clocked(getattr(owner, name)))
            stack.enter_context(patch)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        selfplay.main(["--model", str(ROOT / "tiny"), "--steps", "100", "--eval-items", "1",
                       "--device", "cpu"])
    total = spent.pop("train")
    record = total - spent.total()
    return {"seconds": total, "record": record / total, "checkpoints": spent["checkpoint"] / total}


def rounded(figures):
    return {name: [round(x, 4) for x in value] if isinstance(value, list) else round(value, 4)
            for name, value in figures.items()}


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    model, tokenizer = llama.load(ROOT / "tiny")
    rng = random.Random(0)
    queries = [language.draw(rng) for _ in range(32)]
    prompts = [tokenizer.chat([{"role": "user", "content": query}]) for query in queries]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    result = {
        "machine": machine,
        "lsp_step": rounded(bench_lsp()),
        "run": rounded(bench_run()),
        "generate": rounded(bench_generate(model, prompts)),
        "grpo_step": rounded(bench_grpo(queries)),
        "spin_update": rounded(bench_spin()),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
