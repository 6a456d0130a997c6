"""How much memory a step of a large model takes: planned, and tracked without having the memory.

    python tests/memory.py              planned and tracked peaks of training, GiB
    python tests/memory.py --table      planned peaks of whole runs, and the cards that they fit

The tracker is PyTorch's own (MemTracker). It runs a real step of our code on fake tensors, which
have shapes and no contents: so a model of 7 billion weights takes seconds on a laptop.
"""
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as llama
from support import learning, machine

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
OPTIMIZERS = {"lsp": (torch.optim.AdamW, {"fused": True}),
              "spin": (torch.optim.RMSprop, {"foreach": False})}
FLOATS = {"lsp": 2, "spin": 1}  # numbers a weight that the optimizer keeps
TEXT = 1024  # tokens of a prompt and its answer


def micro_batch(game, tokens):
    """One micro-batch of texts of 1,024 tokens: groups of two in spin, of some in lsp."""
    answer, group = TEXT // 2, 2 if game == "spin" else (tokens - TEXT // 2) // (TEXT // 2)
    rows = max(1, tokens // (TEXT // 2 + group * answer))
    prompts = [[5] * (TEXT - answer) for _ in range(rows)]
    return llama.pack(prompts, [[[7] * answer] * group] * rows, tokens, whole=True)[0]


def fused_norm(x, shape, weight, eps):
    """F.rms_norm by the kernel that a GPU has. (The CPU has none: it keeps more.)"""
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


def as_fakes(model):
    """Give a model on the meta device fake weights, as if on a CPU. Yields the frozen ones.

    Those become plain attributes: the tracker cannot take a parameter without a gradient.
    """
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            fake = torch.empty(p.shape, dtype=p.dtype, device="cpu")
            if p.requires_grad:
                module.register_parameter(name, torch.nn.Parameter(fake))
            else:
                delattr(module, name)
                setattr(module, name, fake)
                yield fake
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty(buffer.shape, device="cpu"))


def tracked(config, game, dtype, lora=None, recompute=False, tokens=4096):
    """Peak bytes of two updates: model, optimizer, and what comes and goes."""
    with torch.device("meta"):
        model = llama.Llama(config).to(dtype)
    reference = llama.adapt(model, lora) if lora else None
    packed = micro_batch(game, tokens)
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(
            llama, "attend", llama.attend_fused), mock.patch.object(
            torch.nn.functional, "rms_norm", fused_norm):  # as on a GPU
        frozen = [*as_fakes(model)]
        model.recompute = recompute
        kind, settings = OPTIMIZERS[game]
        optimizer = learning.optimizer_for(model, kind, lr=1e-3, **settings)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *getattr(model, "masters", ()), *frozen)
        with tracker:
            for _ in range(2):  # the first makes the optimizer's state
                for _ in range(2):  # micro-batches: the second finds the gradients of the first
                    llama.logprobs(model, packed).sum().backward()
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
        peak = tracker.get_tracker_snapshot("peak")
    return {str(k): v for k, v in next(iter(peak.values())).items()}


if __name__ == "__main__":
    import time
    for name in SIZES:
        config = llama.config_from_json(SIZES[name] | {"num_hidden_layers": 4})
        for lora in (None, 16):
            for rec in (True, False):
                t = time.time()
                got = tracked(config, "lsp", torch.bfloat16, lora, rec)
                print(name, lora, rec, {k: round(v / 2**30, 2) for k, v in got.items() if v}, round(time.time() - t, 1), flush=True)
        break
