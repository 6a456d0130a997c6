"""Memory: what a run needs, planned from a model's sizes before anything is loaded.

tests/track_memory.py compares it with PyTorch's own tracker, for 1 to 7 billion weights.
"""
import os
from itertools import combinations
from pathlib import Path

import torch

from support.console import UserError

GIB = 2**30


def plan(config, dtype, parameters, optimizer_floats, positions, tokens, adapters=None, sampled=0,
         read=0, recompute=False, chunk=1024, frozen=(), offloaded=False, processes=1,
         fused=False):
    """{use: bytes} of a run. First what stays, then what comes and goes.

    config: sizes by their names in config.json. parameters: how many weights the model has.
    adapters: how many numbers LoRA's have; None: all weights are trained.
    optimizer_floats: float32 numbers that the optimizer keeps of a weight (AdamW 2, RMSProp 1).
    positions: of the largest sampling batch, in all its rows. sampled: completions in it.
    read: positions of a batch's prompts, which are computed at once.
    tokens: of a micro-batch. chunk: tokens whose logits are alive at once (model.logprobs).
    recompute: activations are computed again in the backward pass.
    frozen: weights of each model that is only asked, the reference first (with LoRA it is none).
    offloaded: those visit the device one at a time. fused: the kernels are those of a GPU.
    processes: the plan is that of each; positions, sampled and read are of all together. Without
    LoRA they share out the float32 weights of player and reference, the gradients and the
    optimizer. Each gathers the player for sampling, and for the last scores the reference, too.
    (In training they gather layer by layer, so there the plan says too much.)
    """
    c, size, lora = config, dtype.itemsize, adapters is not None
    D, I, L, V = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.vocab_size
    W, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    learnt, share = (adapters, 1) if lora else (parameters, processes)
    shared = share > 1
    # Numbers a token that a layer keeps for the backward pass. Of a norm: what goes in and out; the
    # CPU also keeps copies, in float32. Of attention: rotated queries and keys, values, and what
    # comes out; a GPU's kernel has keys and values for each head. Of SwiGLU: gate, up, silu(gate),
    # and the product. (LoRA keeps the same: an adapter's gradient needs its layer's input.)
    norms = 4 * D if fused else (6 if size == 4 else 10) * D
    attention = 5 * W + KV if fused else 4 * W + 3 * KV
    layer = norms + attention + 4 * I
    kept = (L * D if recompute else L * layer) + norms // 2  # and the norm behind all layers
    # What is alive in a layer that keeps nothing: what goes in and out, the product for queries,
    # keys and values, its rotated queries and keys, what attention says, and SwiGLU's. (With LoRA:
    # gate and up, and what adapters add to them, one by one and side by side.)
    passing = 2 * D + 3 * W + 3 * KV + (6 if lora else 4) * I
    # The head's backward pass: of a chunk's logits three copies in float32 and one in the dtype;
    # and the gradient of the head, in float32, to which a product in the dtype is added.
    rows, gradient = min(chunk, tokens), 0 if lora else V * D
    logits = max((12 + size) * rows * V + 4 * gradient, (4 + size) * (rows * V + gradient))
    # Then one layer at a time goes backward, perhaps computed again, and of SwiGLU some three
    # gradients are alive. A tied head's gradient waits for that of the embedding.
    block = size * (tokens * ((layer if recompute else 0) + 3 * I) + (0 if lora else 2 * I * D)
                    + gradient * c.tie_word_embeddings)
    update = 4 * V * D * (not lora) * (optimizer_floats == 1)  # RMSProp takes a copy of a weight
    cache, asked = 2 * L * positions * KV * size, size * sum(frozen)
    visiting = size * max([0, *frozen]) if offloaded else 0
    if processes > 1:
        cache, sampled, read = cache // processes, sampled // processes, read // processes
        visiting = size * sum(frozen[:1]) if shared else 0
        asked = (4 * sum(frozen[:1]) // share if shared else size * sum(frozen[:1]))
        asked += size * sum(frozen[1:])
    elif offloaded:
        asked = 0
    words = 4 * sampled * V  # a float32 number for each word and completion
    return {
        "weights": (parameters + (adapters or 0)) * size,
        "float32 masters": 4 * learnt // share if size < 4 or shared else 0,
        "optimizer": 4 * optimizer_floats * learnt // share,
        "frozen models": asked,
        "visiting model": visiting,
        # The cache, and the most of these: a copy of a layer of it, as rows leave, with logits and
        # probabilities; or these and two copies of their sums, while a token is drawn; or, before,
        # the prompts on their way through a layer.
        "sampling": cache + max(cache // L + 2 * words, 4 * words, size * passing * read),
        "gradients": 4 * learnt // share,
        "activations": tokens * kept * size + (1 + size) * tokens**2,  # with the mask [T, T]
        "at work": max(logits, block, update),
    }


COMING = ("visiting model", "sampling", "gradients", "activations", "at work")  # and going


def most(plan):
    """Bytes of a plan at their peak.

    Sampling and training never happen at once. A visiting model may be asked while there are
    gradients, but not while there are activations.
    """
    visiting, sampling, gradients, activations, at_work = (plan[use] for use in COMING)
    training = gradients + at_work + max(activations, visiting)
    return sum(plan.values()) - sum(plan[use] for use in COMING) + max(visiting + sampling,
                                                                      training)


def free(device):
    """Free bytes on a device, or None where that cannot be told."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type == "mps":  # a part of the machine's one memory
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return None


def check(planned, device, show=False, processes=1, changes=()):
    """Raise UserError if a run cannot fit. show: print its plan.

    planned: a function that gives the plan. Its arguments are settings that differ from the run's,
        {name: value}, and the number of processes.
    changes: [(flag, {name: value})], what could be changed, from the cheapest on.
    processes: so many play on this machine. On the CPU all of their plans must fit. With GPUs, each
    process first holds a model whole in the CPU's memory, as in the file and in float32.
    """
    whole, available = planned({}, processes), free(device)
    here = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    on_cpu = torch.device(device).type == "cpu"
    if here > 1 and not on_cpu:
        begin, host = here * (whole["weights"] + processes * whole["float32 masters"]), free("cpu")
        if host is not None and begin > host:
            raise UserError(f"{here} processes first load the model whole, about "
                            f"{begin / GIB:.1f} GiB of CPU memory in all, and {host / GIB:.1f} GiB "
                            "are free: try fewer processes on this machine")

    def needs(other):
        return most(planned(other, processes)) * (here if on_cpu else 1)
    if show:
        for use, size in whole.items():
            print(f"    {use:<18}{size / GIB:9.2f} GiB")
        rest = f" of {available / GIB:.2f} GiB free on {device}" if available else ""
        print(f"    {'at the most':<18}{needs({}) / GIB:9.2f} GiB{rest}")
        several = [f"{most(planned({}, n)) / GIB:.2f} of {n}" for n in (2, 4, 8)]
        print(f"    each process, GiB: {', '.join(several)}")
    if available is not None and needs({}) > available:
        raise UserError(f"this needs about {needs({}) / GIB:.1f} GiB, and {available / GIB:.1f} "
                        f"GiB are free on {device}: {advice(needs, changes, available)}")


def advice(needs, changes, available):
    """The three cheapest changes that make a run fit, in words.

    needs: a function of changed settings that gives bytes. changes: [(flag, {name: value})]. Of
    several sets of changes, fewer are cheaper, and then those that stand earlier in the list.
    """
    found, least = [], None
    for count in (1, 2, 3, len(changes)):
        for some in combinations(changes, count):
            flags = " ".join(flag for flag, _ in some)
            size = needs({name: value for _, other in some for name, value in other.items()})
            # Not a set that holds a smaller one that fits.
            names = {flag for flag, _ in some}
            if size <= available and not any(one <= names for one, _ in found):
                found.append((names, f"{flags} ({size / GIB:.1f})"))
            least = min(least or (size, flags), (size, flags))
    if not found:
        still = f" (with {least[1]} it still needs {least[0] / GIB:.1f})" if least else ""
        return f"try fewer games or a smaller model{still}"
    return f"it would fit with {', or '.join(words for _, words in found[:3])}"
