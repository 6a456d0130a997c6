"""The machine: devices, several processes that share one model (FSDP2), memory.

Several processes: `torchrun --nproc-per-node 8 -- selfplay.py ..`, or spin.py. Each process plays
its share of a step's games, or of a batch of pairs. Weights, gradients and optimizer state are
shared out among them by PyTorch's FSDP2. They are gathered once for sampling, and layer by layer in
training.
"""
import os
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from support.console import UserError, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def best_device():
    """The default of --device: an NVIDIA or AMD GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


DEVICE = best_device()


def check_device(name):
    """The name of a device that is really there. Raises UserError for any other name."""
    try:
        torch.empty(0, device=name)
        torch.Generator(name)
        if torch.device(name).type == "cuda":  # attention: fused, or not at all (attend_fused)
            torch.backends.cuda.enable_math_sdp(False)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: no such device here ({one_line(error)})") from None
    return name


def check_dtype(device, dtype):
    """Raise UserError where a device cannot compute in a dtype, a name of DTYPES."""
    kind = torch.device(device).type
    able = {"cuda": torch.cuda.is_bf16_supported,
            "mps": lambda: torch.backends.mps.is_macos_or_newer(14, 0)}
    if dtype == "bfloat16" and kind in able and not able[kind]():
        needs = "macOS 14" if kind == "mps" else "a newer GPU"
        raise UserError(f"--dtype bfloat16 on {device} needs {needs}: leave it out")


# --------------------------------------------------------------------------------------------------
# Several processes

class Crew(NamedTuple):
    """The processes that play one run together: which one this is, and how many they are."""
    rank: int = 0
    size: int = 1

    def share(self, items):
        """This process's part of a list or tensor that all processes have, in order of rank.

        Parts differ by one item at the most, so they may be empty.
        """
        n = len(items)
        return items[self.rank * n // self.size:(self.rank + 1) * n // self.size]

    def all(self, mine):
        """What every process has, in order of rank: a list of `size` objects."""
        out = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(out, mine)
        return out

    def merged(self, mine):
        """The parts of all processes as one. See `joined`."""
        return joined(self.all(mine))

    def in_step(self, items):
        """This process's items, each as (item, True), then (first item, False) while others work.

        The processes gather weights together, so all must go through the model equally often.
        """
        for i in range(max(self.all(len(items)))):
            yield (items[i], True) if i < len(items) else (items[0], False)


def joined(parts):
    """Parts as one: lists and tensors end to end, tuples field by field, None as None."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, tuple):
        fields = [joined(field) for field in zip(*parts)]
        return first._make(fields) if hasattr(first, "_make") else tuple(fields)
    return [item for part in parts for item in part]


def join(device):
    """(Crew, device) of this process. torchrun says in the environment how many play together."""
    if "RANK" not in os.environ:
        return Crew(), check_device(device)
    if device.startswith("cuda"):
        device = check_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    # A long limit: others may wait for one's slow reward, or for the first to write. A process that
    # dies is noticed by torchrun at once.
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    return Crew(dist.get_rank(), dist.get_world_size()), check_device(device)


def leave(crew):
    """The end of playing together: all wait for the last."""
    if crew.size > 1:
        dist.barrier()
        dist.destroy_process_group()


def shard(model, device="cpu", dtype=torch.float32):
    """Share a model's float32 weights out among the processes, layer by layer. Returns the model.

    It computes in `dtype`. model: anything with `blocks`, on the CPU.
    """
    # Imported here: it takes half a second, which one process alone need not wait.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    model.saved_in = dtype  # model.save writes this dtype, not float32
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def gathered(tensors, rank):
    """{name: tensor}, whole and on the CPU, in the first process. The others only help."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if rank == 0:
            found[name] = value.cpu().contiguous()
    return found


def whole(tensor):
    """A tensor that is shared out, gathered from all processes. Any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def average(weights, crew):
    """Average the processes' gradients of weights that each of them holds whole."""
    for weight in weights:
        if crew.size > 1 and not hasattr(weight, "full_tensor"):
            dist.all_reduce(weight.grad)
            weight.grad /= crew.size


def shared_as(tensor, like):
    """A whole tensor, shared out as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


# --------------------------------------------------------------------------------------------------
# Models that are on their device only while they are asked

def offload(model):
    """Move a frozen model's weights to CPU memory. `resident` brings them back. Returns the model.

    The memory is page-locked if a GPU will want the weights, which makes the copy fast.
    """
    for p in model.parameters():
        p.data = p.data.cpu().pin_memory() if p.data.is_cuda else p.data.cpu()
    return model


@contextmanager
def resident(model):
    """The model with all its weights on its device, for the length of a `with`.

    Its device is that of its rotary tables (`model.cos`). Nothing happens to a model that is there
    already. An offloaded model is copied and the copy is dropped: it is frozen, so its weights in
    CPU memory are still right. A model that is shared out is gathered once, by all processes.
    """
    if hasattr(model, "unshard"):
        parts = [*model.blocks, model]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield model
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not model, recurse=False)
        return
    home = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data.to(model.cos.device, non_blocking=True)
    try:
        yield model
    finally:
        for p, data in zip(model.parameters(), home):
            p.data = data


# --------------------------------------------------------------------------------------------------
# Memory

def memory_plan(config, dtype, parameters, optimizer_floats, rows, positions, tokens,
                recompute=False, chunk=1024, frozen=(), offloaded=False, processes=1):
    """{use: bytes} of a training run, before anything is loaded.

    First what stays, then what comes and goes.

    config: sizes by their names in config.json. parameters: how many weights the model has.
    optimizer_floats: float32 numbers a weight that the optimizer keeps (AdamW 2, RMSProp 1).
    rows, positions: of the largest sampling batch. tokens: of a micro-batch.
    recompute: activations are computed again in the backward pass.
    frozen: weights of each model that is only asked, the reference first. offloaded: those come one
    at a time. processes: the plan is that of each. They share out the float32 weights of player and
    reference, the gradients and the optimizer. Each gathers one of the two models at a time.
    """
    c, size = config, dtype.itemsize
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # Numbers a token that one layer keeps for the backward pass.
    layer = 6 * c.hidden_size + 4 * width + 4 * kv_width + 5 * c.intermediate_size
    if recompute:
        kept = c.num_hidden_layers * c.hidden_size + layer
    else:
        kept = c.num_hidden_layers * layer
    cache = 2 * c.num_hidden_layers * rows * positions * kv_width * size
    logits = 3 * 4 * min(chunk, tokens) + (4 + 2 * size) * c.hidden_size  # with the head's gradient
    asked = (max if offloaded else sum)([0, *frozen]) * size
    if processes > 1:
        cache //= processes
        asked = sum(4 * n // processes for n in frozen[:1]) + sum(frozen[1:]) * size
    return {
        "weights": parameters * size,
        "float32 masters": 4 * parameters // processes if size < 4 or processes > 1 else 0,
        "gradients": 4 * parameters // processes,
        "optimizer": 4 * optimizer_floats * parameters // processes,
        "frozen models": asked,
        "cache": 2 * cache,  # twice: rows that leave are copied
        "activations": tokens * kept * size,
        "logits": logits * c.vocab_size,
    }


def free_memory(device):
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


def most_memory(plan):
    """Bytes of a memory_plan at their peak.

    Sampling (the cache) and training (gradients, activations, logits) never happen at once.
    """
    training = plan["gradients"] + plan["activations"] + plan["logits"]
    return sum(plan.values()) - min(plan["cache"], training)


def check_memory(plan, device, show=False, processes=1):
    """Raise UserError if a memory_plan cannot fit. show: print the plan.

    processes: so many play on this machine. On the CPU all of their plans must fit. With GPUs, each
    process first holds a model whole in the CPU's memory, as in the file and in float32.
    """
    total, free, gib = most_memory(plan), free_memory(device), 2**30
    here = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    if torch.device(device).type == "cpu":
        total *= here
    elif here > 1:
        parameters = plan["gradients"] * processes // 4
        begin, host = 6 * here * parameters, free_memory("cpu")
        if host is not None and begin > host:
            raise UserError(f"{here} processes first load the model whole, about "
                            f"{begin / gib:.1f} GiB of CPU memory in all, and {host / gib:.1f} GiB "
                            "are free: try fewer processes on this machine")
    if show:
        for use, size in plan.items():
            print(f"    {use:<18}{size / gib:9.2f} GiB")
        rest = f" of {free / gib:.2f} GiB free on {device}" if free else ""
        print(f"    {'at the most':<18}{total / gib:9.2f} GiB{rest}")
    if free is not None and total > free:
        raise UserError(f"this needs about {total / gib:.1f} GiB, and {free / gib:.1f} GiB are "
                        f"free on {device}: try --dtype bfloat16, --low-memory, a smaller "
                        "--micro-batch, fewer games or a smaller model")
