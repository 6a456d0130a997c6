"""Learning: an optimizer with float32 master weights, one clipped step, and checkpoints."""
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.console import UserError, one_line
from support.machine import Crew, average, gathered, shared_as, whole

# The largest norm of a step's gradient. On the embedded default nearly every step is above it, so
# it works as a normaliser: each step has the same size before AdamW (docs/claims.md has a table).
CLIP = 1.0


def optimizer_for(model, kind, **settings):
    """An optimizer (kind: a class of torch.optim) of float32 weights, for a model of any dtype.

    A bfloat16 model computes in bfloat16 and learns in float32. Every weight has a float32 master.
    The gradients of all micro-batches are summed in the master, and each step copies the masters
    back. Without masters, a small step would be rounded away. They stay with the model: a second
    optimizer goes on with the same masters, and loses nothing of what the first one learnt.
    Frozen weights (with LoRA, all but the adapters) are left out.
    """
    weights = trained(model)
    if weights[0].dtype == torch.float32:
        return kind(weights, **settings)
    if not hasattr(model, "masters"):
        model.masters = [w.detach().float().requires_grad_() for w in weights]
    masters = model.masters

    def gather_into(master):
        def hook(weight):
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None
        return hook

    for handle in getattr(model, "gathering", ()):  # hooks of an earlier optimizer
        handle.remove()
    model.gathering = [weight.register_post_accumulate_grad_hook(gather_into(master))
                       for weight, master in zip(weights, masters)]

    def copy_back(*_):
        torch._foreach_copy_([w.data for w in weights], masters)

    optimizer = kind(masters, **settings)
    optimizer.register_step_post_hook(copy_back)
    return optimizer


def trained(model):
    """The weights of a model that learn: all that are not frozen."""
    return [w for w in model.parameters() if w.requires_grad]


def weights_of(optimizer):
    """The float32 weights that an optimizer moves: the model's, or a bfloat16 model's masters."""
    return [w for group in optimizer.param_groups for w in group["params"]]


def take(optimizer, largest=CLIP, crew=Crew()):
    """One optimizer step, with gradients scaled down to a norm of `largest`.

    Of several processes, those that share the weights out have one gradient already. Where each
    has all the weights (LoRA's adapters), their gradients are averaged here.
    Returns their norm before. Where that is not finite, no step is taken. The gradients are gone in
    either case.
    """
    average(weights_of(optimizer), crew)
    norm = whole(torch.nn.utils.clip_grad_norm_(weights_of(optimizer), largest)).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def set_rate(optimizer, lr):
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# --------------------------------------------------------------------------------------------------
# Checkpoints

def save_state(path, optimizer, generator, facts, crew=Crew(), **tensors):
    """Write a checkpoint, one safetensors file.

    It holds the weights, the optimizer's state, the states of all processes' generators, `facts`
    (JSON) and other tensors. All processes of a crew call this, and the first one writes.

    The file is written beside its place and renamed. The one that was there becomes
    <name>.previous. So a kill at any moment leaves a whole checkpoint.
    Raises UserError where the file cannot be written; what was there before stays.
    """
    path = Path(path)
    tensors = tensors | {"generator": torch.stack(crew.all(generator.get_state()))}
    tensors |= {f"weight.{i}": w for i, w in enumerate(weights_of(optimizer))}
    for i, own in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in own.items()}
    tensors = gathered(tensors, crew.rank)
    if crew.rank:
        return
    new = path.with_name(path.name + ".new")
    try:
        facts = json.dumps(facts)
        save_file(tensors, new, {"facts": facts, "checksum": str(checksum(tensors, facts))})
        if path.exists():
            path.replace(previous(path))
        new.replace(path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({one_line(error)}); "
                        "what was saved before is whole") from None


def previous(path):
    """Where the checkpoint before the one at `path` is."""
    return path.with_name(path.name + ".previous")


def read_state(path):
    """(facts, tensors) of a checkpoint.

    Raises UserError for one that is missing, cut short or damaged, and offers the one before.
    """
    path = Path(path)
    offer = ""
    if previous(path).is_file():
        offer = f"; the one before it is here: --resume {previous(path)}"
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint{offer}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        facts = json.loads(metadata["facts"])
        is_whole = metadata["checksum"] == str(checksum(tensors, metadata["facts"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cut short, or not a checkpoint "
                        f"({one_line(error)}){offer}") from None
    if not is_whole:
        raise UserError(f"{path}: damaged, its checksum does not fit{offer}")
    return facts, tensors


def load_state(model, optimizer, generator, tensors, crew=Crew()):
    """Put a checkpoint's tensors back: weights, optimizer, generator. Raises UserError.

    The model's weights follow from the optimizer's. If another number of processes saved it, each
    process goes on with a new generator state of its own.
    """
    weights = weights_of(optimizer)
    shapes = [list(tensors[f"weight.{i}"].shape) for i in range(len(weights))
              if f"weight.{i}" in tensors]
    if [list(w.shape) for w in weights] != shapes:
        raise UserError("the checkpoint is of another model")
    with torch.no_grad():
        for i, w in enumerate(weights):
            w.copy_(shared_as(tensors[f"weight.{i}"], w))
        for own, w in zip(trained(model), weights):
            if own is not w:  # bfloat16: the optimizer's are the float32 masters
                own.copy_(w)
    state = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            like = weights[int(i)]
            value = shared_as(value, like) if value.shape == like.shape else value
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    states = tensors["generator"]  # [processes, bytes]
    if len(states) == crew.size:
        # A copy: PyTorch 2.13 misreads a state that is a view into a larger tensor.
        generator.set_state(states[crew.rank].clone())
    else:
        generator.manual_seed(zlib.crc32(states.numpy().tobytes()) ^ crew.rank)


def checksum(tensors, text=""):
    """CRC-32 of a text, and of tensors' names and bytes."""
    check = zlib.crc32(text.encode())
    for name in sorted(tensors):
        check = zlib.crc32(name.encode(), check)
        check = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), check)
    return check


def fingerprint(model, rows=None):
    """A number that changes when a model's weights change, or the data.

    It is the CRC-32 of the beginning of each weight, the same in any dtype, and of all data.
    rows: data.Rows, of which conversation and answer count.
    """
    beginnings = {name: p.detach().flatten()[:256].cpu().bfloat16()
                  for name, p in model.named_parameters()}
    return checksum(beginnings, repr(rows and [(row.messages, row.answer) for row in rows]))
