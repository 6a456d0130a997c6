"""The memory that a step of a large model takes: planned, and tracked without having it.

    python tests/track_memory.py            planned and tracked peaks of training, GiB; 10 minutes
    python tests/track_memory.py --table    planned peaks of whole runs, and the cards that they fit

The tracker is PyTorch's own (MemTracker). It runs a real step of our code on fake tensors, which
have shapes and no contents: so a model of 7 billion weights takes seconds on a laptop.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as llama
import selfplay
import spin
from support import learning, memory, runs

LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8,
          "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True}
SIZES = {  # from the published config.json of each; tests have short contexts
    "Llama-3.2-1B": LLAMA3 | {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
                              "num_hidden_layers": 16, "num_attention_heads": 32},
    "Llama-3.2-3B": LLAMA3 | {"hidden_size": 3072, "intermediate_size": 8192, "head_dim": 128,
                              "num_hidden_layers": 28, "num_attention_heads": 24},
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096},
}
OPTIMIZERS = {"lsp": lambda model: learning.optimizer_for(model, torch.optim.AdamW, fused=True),
              "spin": spin.rmsprop}
FLOATS = {"lsp": 2, "spin": 1}  # numbers a weight that the optimizer keeps
TEXT = 1024  # tokens of a prompt and its answer


def micro_batch(game, tokens):
    """One micro-batch of texts of 1,024 tokens: groups of two in spin, of some in lsp."""
    answer, group = TEXT // 2, 2 if game == "spin" else (tokens - TEXT // 2) // (TEXT // 2)
    rows = max(1, tokens // (TEXT // 2 + group * answer))
    prompts = [[5] * (TEXT - answer) for _ in range(rows)]
    return llama.pack(prompts, [[[7] * answer] * group] * rows, tokens, whole=True)[0]


class FusedNorm(torch.autograd.Function):
    """F.rms_norm as the kernel of a GPU: it keeps its input and one number a token."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        return grad * weight, torch.empty_like(weight) if weight.requires_grad else None, None


def fused_norm(x, shape, weight, eps):
    return FusedNorm.apply(x, weight, eps)


def as_fakes(model):
    """Give a model on the meta device fake weights, as if on a CPU. Yields the frozen ones."""
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            fake = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"),
                                      requires_grad=p.requires_grad)
            module.register_parameter(name, fake)
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty(buffer.shape, device="cpu"))
    yield from as_tensors(model)


def as_tensors(model):
    """Make a model's frozen weights plain attributes, and yield them.

    The tracker cannot take a parameter without a gradient.
    """
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            if not p.requires_grad:
                delattr(module, name)
                setattr(module, name, p.data)
                yield p.data


def tracked(config, game, dtype, lora=None, recompute=False, tokens=4096):
    """Peak bytes of an update: model, optimizer, and what comes and goes.

    It is an update in the middle of a run: the optimizer has its state, and an earlier micro-batch
    has left its gradients.
    """
    with torch.device("meta"):
        model = llama.Llama(config).to(dtype)
    if lora:
        llama.adapt(model, lora)
    packed = micro_batch(game, tokens)
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(
            llama, "attend", llama.attend_fused), mock.patch.object(
            torch.nn.functional, "rms_norm", fused_norm):  # as on a GPU
        frozen = [*as_fakes(model)]
        model.recompute = recompute
        optimizer = OPTIMIZERS[game](model)
        weights = learning.weights_of(optimizer)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *weights, *(w.grad for w in weights), *frozen)
        with tracker:
            if game == "lsp":
                with torch.no_grad():  # as the reference is asked
                    llama.logprobs(model, packed)
                tracker.reset_mod_stats()  # it would refuse a second call
            llama.logprobs(model, packed).sum().backward()
            optimizer.step()
        peak = tracker.get_tracker_snapshot("peak")
    return next(iter(peak.values()))["Total"]


def tracked_sampling(model, prompts, group, new):
    """Peak bytes of sampling besides the weights. (Real tensors: what is sampled decides.)"""
    frozen = [*as_tensors(model)]
    tracker, weights = MemTracker(), sum(w.numel() * w.element_size() for w in frozen)
    tracker.track_external(*frozen)
    with tracker:
        call = torch.nn.Module.__call__

        def once_more(self, *args, **kwargs):
            tracker.reset_mod_stats()
            return call(self, *args, **kwargs)
        with mock.patch.object(llama.Llama, "__call__", once_more):
            llama.generate(model, prompts, group, new)
    peak = tracker.get_tracker_snapshot("peak")
    return next(iter(peak.values()))["Total"] - weights


def planned(config, game, dtype, lora=None, recompute=False, tokens=4096):
    """What memory.plan says of the same: training alone, without sampling and frozen models."""
    with torch.device("meta"):
        count = sum(p.numel() for p in llama.Llama(config).parameters())
    adapters = config.adapter_size(lora, runs.TARGETS) if lora else None
    plan = memory.plan(config, dtype, count, FLOATS[game], 0, micro_batch(game, tokens).ids.numel(),
                       adapters, recompute=recompute, fused=True)
    return sum(plan.values())


CASES = [(name, game, lora, recompute) for name in SIZES for game in OPTIMIZERS
         for lora in (None, 16) for recompute in (True, False)]


def compare():
    """Print the planned and the tracked peak of each case."""
    print("| model | game | | recompute | planned, GiB | tracked, GiB |\n|---|---|---|---|---|---|")
    for name, game, lora, recompute in CASES:
        config = llama.config_from_json(SIZES[name])
        both = [work(config, game, torch.bfloat16, lora, recompute) for work in (planned, tracked)]
        plan, peak = (f"{x / memory.GIB:.1f}" for x in both)
        case = [name, game, "LoRA" if lora else "full", "yes" if recompute else "no", plan, peak]
        print(f"| {' | '.join(case)} |", flush=True)


CARDS = (8, 16, 24, 48, 80)  # GiB
COMMANDS = {"LSP": (selfplay, "--reward", "majority"), "SPIN": (spin, "--data", "chats.jsonl")}


def table():
    """Print what each game plans: its defaults on a GPU, with --dtype bfloat16 and --low-memory.

    A card must have one GiB more: CUDA itself takes about that much.
    """
    print("| model | game | | one GPU, GiB | fits | each of 8, GiB |\n|---|---|---|---|---|---|")
    for name, raw in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(raw))
            for game, (module, *flags) in COMMANDS.items():
                for lora in ((), ("--lora", "16")):
                    args = module.parse_args([
                        "--model", folder, "--device", "cuda", "--dtype", "bfloat16",
                        "--low-memory", *flags, *lora])
                    one, each = (memory.most(module.plan(args, n)) / memory.GIB for n in (1, 8))
                    cards = [f"{card}" for card in CARDS if one + 1 <= card]
                    print(f"| {name} | {game} | {'LoRA' if lora else 'full'} | {one:.1f} | "
                          f"{', '.join(cards) or 'none'} | {each:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="whole runs, only planned")
    table() if parser.parse_args().table else compare()
