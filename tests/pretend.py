"""A pretend GPU: PyTorch on the CPU, playing "cuda" or "mps" for tests on machines without one.

    with pretend("cuda") as gpu:
        model, tokenizer = llama.load(ROOT / "tiny", "cuda")
        llama.generate(model, prompts, generator=torch.Generator("cuda"))
    gpu.waits       # Counter: {"model.py generate: tolist": 8, ..}
    gpu.operations  # the names of what ran on it: {"mm", "add.Tensor", ..}

Every tensor really is a CPU tensor. A table says which storages are on the pretend GPU; a result is
where its arguments are. Two modes of PyTorch see all that happens:
    Asked   (a TorchFunctionMode): `.device`, `.to`, `device=`, `.tolist()`, ..: what Python asks
    Played  (a TorchDispatchMode): each operation, also in the backward pass and in optimizers
A mixture of devices is an error, as it would be on a GPU. A wait is counted: there the CPU would
stop until the GPU had done all its work. That is where a number comes back (`item`, a comparison in
an `if`), where the size of a result depends on values (a boolean index, `unique`), and where data
goes to the GPU from a Python list or from ordinary memory.

It knows CUDA's rules from PyTorch 2.13's documentation and sources, not from a GPU. What a kernel
does inside is out of its sight: it neither sees whether the kernel waits nor what it rounds.
"""
import contextlib
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
CPU, MASKS = torch.device("cpu"), (torch.bool, torch.uint8)

# Operations whose kernels read a number back from the GPU. The profiler shows that of 2.13's
# multinomial: it once read two, and now checks its input on the GPU (_assert_async).
WAIT = {"aten::_local_scalar_dense": "item", "aten::nonzero": "nonzero", "aten::equal": "equal",
        "aten::_unique2": "unique", "aten::_unique": "unique", "aten::unique_dim": "unique",
        "aten::unique_consecutive": "unique", "aten::masked_select": "boolean index",
        "aten::bincount": "bincount", "aten::repeat_interleave": "repeat_interleave"}
UPLOADS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)  # of Python's numbers
COPIES = ("aten::copy_", "aten::_foreach_copy_")  # these may have tensors of two devices


def tensors_of(value):
    """The tensors in an operation's arguments or result, and in lists, tuples and dicts of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in tensors_of(part)]


class Marks:
    """A set of storages. It does not keep them alive."""

    def __init__(self):
        self.refs, self.limit = {}, 1000

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.refs[storage._cdata] = StorageWeakRef(storage)
        if len(self.refs) > self.limit:
            self.refs = {key: ref for key, ref in self.refs.items() if not ref.expired()}
            self.limit = 2 * len(self.refs) + 1000

    def __contains__(self, tensor):
        # A weak reference keeps the address of its storage from being used again.
        return tensor.untyped_storage()._cdata in self.refs


class Gpu:
    """The pretend GPU: what is on it, what ran on it, and who waited for it."""

    def __init__(self, kind):
        self.device = torch.device(kind, 0)
        self.here, self.pinned = Marks(), Marks()
        self.waits, self.operations = Counter(), set()
        self.busy = False  # was something started on it since the last wait?
        self.copying = False  # in a copy between devices: its caller says where the result is

    def forget(self):
        """Begin to count anew, as if the GPU were at work. Returns the waits so far."""
        waits, self.waits, self.busy = self.waits, Counter(), True
        return waits

    @contextlib.contextmanager
    def between(self):
        """A copy between devices."""
        before, self.copying = self.copying, True
        try:
            yield
        finally:
            self.copying = before

    def plays(self, device):
        """Is this device (a name, a torch.device or None) the pretend one? CUDA has one, 0."""
        if device is None or isinstance(device, int):
            return isinstance(device, int)
        device = torch.device(device)
        if device.type == self.device.type and device.index not in (None, 0):
            raise RuntimeError(f"{device}: invalid device ordinal")
        return device.type == self.device.type

    def where(self, tensor):
        return self.device if tensor in self.here else tensor.device

    def put(self, tensor):
        """Mark a tensor as being on the GPU."""
        if self.device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                            "doesn't support float64.")
        self.here.add(tensor)
        return tensor

    def wait(self, why):
        """Count a wait, under the function of this project that caused it.

        An upload waits only if something runs: what is sent to an idle GPU is there at once.
        """
        busy, self.busy = self.busy, False
        if why == "upload" and not busy:
            return
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts  # .venv in ROOT
            if ours and path.name != Path(__file__).name:
                break
            frame = frame.f_back
        place = f"{path.name} {frame.f_code.co_name}" if frame else "elsewhere"
        self.waits[f"{place}: {why}"] += 1

    def moved(self, tensor, device, dtype=None, non_blocking=False):
        """tensor.to(device, dtype): a copy, if it is somewhere else."""
        there = self.device if self.plays(device) else torch.device(device or self.where(tensor))
        if there == self.where(tensor) or "meta" in (there.type, tensor.device.type):
            out = tensor.to(tensor.device if there == self.device else there, dtype)
        else:
            if there == CPU or not non_blocking:
                self.wait("download" if there == CPU else "upload")
            with self.between():
                out = tensor.to(dtype=dtype, copy=True)
            self.busy |= there != CPU and non_blocking
        return self.put(out) if there == self.device else out


class Asked(TorchFunctionMode):
    """What Python code asks of tensors, answered as if the GPU were there."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs = self.gpu, dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):  # not asked by Python code
            return func(*args, **kwargs)
        if func in ANSWERS:
            return ANSWERS[func](gpu, *args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and args[0] in gpu.here:
            raise TypeError(f"can't convert {gpu.device} device type tensor to numpy")
        if (source := kwargs.get("generator")) is not None:
            place = kwargs.get("device")  # of a new tensor; else the generator fills args[0]
            kind = (gpu.where(args[0]) if place is None else torch.device(place)).type
            if source.device.type != kind:
                raise RuntimeError(f"Expected a '{kind}' device type for generator but found "
                                   f"'{source.device.type}'")
        device = kwargs.get("device")
        if gpu.plays(device):
            if func in UPLOADS:
                gpu.wait("upload")
            gpu.busy |= func not in UPLOADS and "empty" not in func.__name__
            return gpu.put(func(*args, **kwargs | {"device": CPU}))
        if device is not None:  # zeros_like(on_the_gpu, device="cpu"): not where its argument is
            with gpu.between():
                return func(*args, **kwargs)
        if func is Tensor.tolist and args[0] in gpu.here:
            gpu.wait("tolist")
        if func is Tensor.__deepcopy__ and args[0] in gpu.here:
            with gpu.between():
                return gpu.put(func(*args, **kwargs))
        return func(*args, **kwargs)


def _to(gpu, tensor, *args, **kwargs):
    if args and isinstance(args[0], Tensor):  # .to(other)
        args = (gpu.where(args[0]), args[0].dtype, *args[1:])
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    out = gpu.moved(tensor, device, dtype, non_blocking)
    return out.clone() if copy and out is tensor else out


def _pin(gpu, tensor):
    if tensor in gpu.here:
        raise RuntimeError("cannot pin: only dense CPU tensors can be pinned")
    out = tensor.clone()
    gpu.pinned.add(out)
    return out


ANSWERS = {
    Tensor.device.__get__: lambda gpu, t: gpu.where(t),
    Tensor.is_cuda.__get__: lambda gpu, t: gpu.where(t).type == "cuda",
    Tensor.is_mps.__get__: lambda gpu, t: gpu.where(t).type == "mps",
    Tensor.is_cpu.__get__: lambda gpu, t: gpu.where(t).type == "cpu",
    Tensor.is_pinned: lambda gpu, t: t in gpu.pinned,
    Tensor.pin_memory: _pin,
    Tensor.to: _to,
    Tensor.cpu: lambda gpu, t: gpu.moved(t, CPU),
    Tensor.cuda: lambda gpu, t, **more: gpu.moved(t, "cuda", **more),
}


class Played(TorchDispatchMode):
    """Every operation: are its tensors on one device, and does it wait?"""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, name = self.gpu, kwargs or {}, func._schema.name
        tensors = tensors_of((args, kwargs))
        played = any(t in gpu.here for t in tensors)
        if played and not gpu.copying:
            gpu.operations.add(str(func).removeprefix("aten.").removesuffix(".default"))
            self.check(func, name, args, kwargs, tensors)
            gpu.busy |= not (func.is_view or name in WAIT or "empty" in name)
        before = {t.untyped_storage()._cdata for t in tensors}
        out = func(*args, **kwargs)
        if played and not gpu.copying:
            for t in tensors_of(out):
                if t.untyped_storage()._cdata not in before:
                    gpu.put(t)
        return out

    def check(self, func, name, args, kwargs, tensors):
        """Refuse what a GPU would, and count the wait."""
        gpu = self.gpu
        away = [t for t in tensors if t not in gpu.here]
        if name in COPIES:
            if away and not (kwargs.get("non_blocking") or True in args[2:]):
                gpu.wait("upload" if tensors_of(args[0])[0] in gpu.here else "download")
            return
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            away = self.indexed(args, away)
        elif name in WAIT:
            gpu.wait(WAIT[name])
        elif name == "aten::isin" and args[1].numel() >= 10 * args[0].numel() ** 0.145:
            gpu.wait("isin")  # it sorts, and looks for unique elements
        # A number on the CPU may be an argument of what works element by element.
        scalars = torch.Tag.pointwise in func.tags or "_foreach" in name or "index_put" in name
        written = [value for value, arg in zip(args, func._schema.arguments)
                   if arg.alias_info and arg.alias_info.is_write]
        if any(t.dim() or not scalars or any(t is w for w in tensors_of(written)) for t in away):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least "
                               f"two devices, {gpu.device} and cpu! ({name})")

    def indexed(self, args, away):
        """The tensors that are on the wrong device in x[indices], or x[indices] = values."""
        gpu, indices = self.gpu, [i for i in args[1] if i is not None]
        if args[0] not in gpu.here:
            return [args[0]]  # the GPU's indices cannot index a tensor on the CPU
        for i in indices:
            # x[mask] = number is a masked_fill, which need not know how many they are.
            fills = len(indices) == 1 and args[2:] and args[2].numel() == 1
            if i.dtype in MASKS and not fills:
                gpu.wait("boolean index")
            elif i not in gpu.here:
                gpu.wait("upload")  # an index on the CPU is allowed
        return [t for t in away if not any(t is i for i in indices)]


@contextlib.contextmanager
def pretend(kind="cuda", memory=2**36, bfloat16=True):
    """The Gpu that is there inside the `with`. kind: "cuda" or "mps"."""
    gpu, real = Gpu(kind), torch.Generator
    grouping = torch._C._group_tensors_by_device_and_dtype

    class Generator(real):
        """A torch.Generator that says it is on the GPU."""
        def __new__(cls, device="cpu"):
            made = super().__new__(cls, CPU if gpu.plays(device) else device)
            made.place = gpu.device if gpu.plays(device) else CPU
            return made

        @property
        def device(self):
            return self.place

    def grouped(lists, with_indices=False):
        """Optimizers work group by group: all on one device."""
        groups = {}
        for (device, dtype), value in grouping(lists, with_indices).items():
            some = value[0][0][0]
            groups[gpu.device if some in gpu.here else device, dtype] = value
        return groups

    asked, run_backward = Asked(gpu), torch.autograd._engine_run_backward

    def backward(*args, **kwargs):
        """PyTorch turns a function mode off inside of a function. This one calls our code."""
        with asked:
            return run_backward(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
                (torch, "Generator", Generator),
                (torch.autograd, "_engine_run_backward", backward),
                (torch._C, "_group_tensors_by_device_and_dtype", grouped),
                (torch.cuda, "mem_get_info", lambda device=None: (memory, memory)),
                (torch.cuda, "is_bf16_supported", lambda *_, **__: bfloat16),
                (torch.mps, "recommended_max_memory", lambda: memory),
                (torch.mps, "driver_allocated_memory", lambda: 0),
                (torch.backends.mps, "is_macos_or_newer", lambda *_: bfloat16)):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(torch.backends.cuda.enable_math_sdp, torch.backends.cuda.math_sdp_enabled())
        # Where checkpoint looks at a tensor's device, a function mode may be on or off.
        stack.enter_context(mock.patch.dict(
            torch.utils.checkpoint._allowed_determinism_checks_to_fns,
            default=lambda x: (x.shape, x.dtype)))
        stack.enter_context(Played(gpu))
        stack.enter_context(asked)
        yield gpu
