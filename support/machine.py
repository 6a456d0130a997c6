"""The machine: devices, and several processes that share one model (FSDP2).

Several processes: `torchrun --nproc-per-node 8 -- selfplay.py ..`, or spin.py. Each process plays
its share of a step's games, or of a batch of pairs. Weights, gradients and optimizer state are
shared out among them by PyTorch's FSDP2. They are gathered once for sampling, and layer by layer in
training.
"""
import os
import random
from contextlib import contextmanager
from datetime import timedelta
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

    def seed(self, seed):
        """This process's own seed, from a run's: no two sample alike. The first has the run's."""
        return random.Random(f"{seed} {self.rank}").getrandbits(32) if self.rank else seed

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
    """Average the processes' gradients of weights that each of them holds whole.

    All processes have a gradient, or none has: in SPIN, where no pair of a batch differs.
    """
    for weight in weights:
        if crew.size > 1 and not hasattr(weight, "full_tensor") and weight.grad is not None:
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
