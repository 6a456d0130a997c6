"""The player: a Llama decoder in plain PyTorch, and the two things self-play asks of it - to sample, and to score.

    model, tokenizer = load("tiny")                       any folder (or hub name) in Hugging Face layout
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    rollout = generate(model, prompts, group=8, max_new_tokens=32)            # ids, log-probabilities, finished
    for packed in pack(prompts, groups(rollout.ids, 8)):                      # the same ids, ready to be scored
        lp = logprobs(model, packed)                                          # [n], with a gradient
    save(model, "folder")                                 transformers, vLLM and lm-eval can open it

What was left out to keep this readable: families other than Llama, Mistral, Qwen2 and Qwen3 (one decoder), dropout, quantised
weights, and every sampling filter (top-k, top-p): what was sampled must be scored under the very distribution it came from.

Shapes: B rows, T positions, S cached positions, D width, H heads, K key-value heads, C head size, V vocabulary,
N prompts, G completions a prompt, n completion tokens of a batch.
"""
import argparse
import errno
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as TextTokenizer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class UserError(Exception):
    """Something the user can mend. Every command prints it as one line and exits with code 2."""


def run_command(main):
    """Run a command's main: a UserError, or a full disk, becomes one line on stderr. Returns the exit code: 0, 2, or 130 after Ctrl-C.

    One of several processes ends here, with that code, and not by way of the interpreter's own end: threads of gloo may then
    still hold tensors, and letting go of one without an interpreter aborts the process (PyTorch pull request 179291).
    """
    code = _run(main)
    if "RANK" in os.environ:  # see join
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(main):
    try:
        main()
        return 0
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"{Path(sys.argv[0]).name}: error: no room left for {error.filename or 'what was to be written'} ({error.strerror}); what was saved before is whole", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}: try a smaller --lr", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


class TimeUp(BaseException):
    """What `time_limit` raises inside its `with`: no Exception, so that no `except Exception` there can swallow it."""


@contextmanager
def time_limit(seconds, complaint):
    """Raise UserError(complaint) once `seconds` have passed inside this `with`; of nested ones, the first to end counts.

    Only the main thread can be stopped so, and only between two lines of Python.
    """
    outer, _ = signal.getitimer(signal.ITIMER_REAL)
    if threading.current_thread() is not threading.main_thread() or 0 < outer < seconds:
        yield
        return
    up = TimeUp(complaint)

    def late(*_):
        raise up
    began, before = time.monotonic(), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and again every second: a bare `except` may swallow the first
    try:
        yield
    except TimeUp as error:
        raise UserError(complaint) if error is up else error from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer - (time.monotonic() - began)))


def number(kind, zero=False):
    """An argparse type: a number of `kind` (int, float) above zero, or zero too; anything else is refused in one line."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole number' if kind is int else 'number'}") from None
        if not (0 < value < 2**63 or zero and value == 0):
            raise argparse.ArgumentTypeError(f"{text} is not {'zero or more' if zero else 'above zero'}" + (", or too large" if value > 0 else ""))
        return value
    return parse


def check_device(name):
    """The name of a device that is really there. Raises UserError."""
    try:
        torch.empty(0, device=name)
        torch.Generator(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: no such device here ({one_line(error)})") from None
    return name


# ---------------------------------------------------------------------------------------------------------------------
# The decoder

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # one decoder; what sets them apart is in Config


@dataclass
class Config:
    """The settings of a Llama, by their names in Hugging Face's config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: queries and keys are normed, head by head
    score_head: bool = False  # a reward model: one number for a text instead of logits
    sliding_window: int | None = None  # Mistral: texts up to this long see no window, longer ones are refused

    @property
    def context(self):
        """The longest text, in tokens, that is computed as the model's authors would."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def from_json(cls, raw):
        """Config from a config.json's dict. Raises UserError for what this decoder would compute wrongly."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"model_type {family!r} is not supported; these are: {', '.join(FAMILIES)}")
        for key, supported in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                               "quantization_config": None, "pretraining_tp": 1}.items():
            if raw.get(key, supported) != supported:
                raise UserError(f"config.json: {key} = {raw[key]!r} is not supported (only {supported!r})")
        rope = raw.get("rope_parameters") or {}  # where transformers 5 keeps both the base and the scaling
        scaling = raw.get("rope_scaling") or rope
        if not isinstance(scaling, dict) or not isinstance(rope, dict):
            raise UserError("config.json: rope_scaling is not an object")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise UserError(f"config.json: rope scaling {kind!r} is not supported (only 'llama3')")
        try:
            if kind == "llama3":
                scaling = {k: float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
            heads = raw["num_attention_heads"]
            config = cls(
                **{k: raw[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),  # transformers' default, where a config is silent
                rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
                rope_scaling=scaling if kind == "llama3" else None,
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                qkv_bias=family == "qwen2",
                qk_norm=family == "qwen3",
                score_head=any("SequenceClassification" in str(name) for name in raw.get("architectures") or []),
                sliding_window=raw.get("sliding_window") if raw.get("use_sliding_window", family == "mistral") else None,
            )
            sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings")
            sizes += ("sliding_window",) * (config.sliding_window is not None)
            largest = {"num_hidden_layers": 2**10, "max_position_embeddings": 2**21}  # of the others, 2**24
            bad = [k for k in sizes if type(getattr(config, k)) is not int or not 1 <= getattr(config, k) <= largest.get(k, 2**24)]
            if bad or heads % config.num_key_value_heads or config.head_dim % 2:
                raise UserError(f"config.json: sizes do not fit each other (look at {', '.join(bad) or 'the heads'})")
            return config
        except KeyError as missing:
            raise UserError(f"config.json lacks {missing}") from None
        except (TypeError, ValueError, ZeroDivisionError):
            raise UserError("config.json: a setting is not a usable number") from None


def rope_table(config):
    """cos and sin, each [context, C/2]: the angle of every position and frequency (RoFormer; llama3 scaling)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**half  # [C/2], radians a position
    if s := config.rope_scaling:  # Llama 3.1: slow the long waves down, keep the short ones, blend in between
        wave = 2 * math.pi / frequency
        old, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
        blend = ((old / wave - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (blend + (1 - blend) / s["factor"])
    angle = torch.outer(torch.arange(config.context, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


class KVCache:
    """Keys and values of every layer, preallocated: k, v [layers, B, K, S, C], of which `length` positions are filled."""

    def __init__(self, config, rows, positions, like):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, positions, config.head_dim)
        self.k, self.v, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def extend(self, layer, k, v):
        """Append k, v [B, K, T, C] of one layer; returns all of that layer's so far, [B, K, length + T, C]."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def rows(self, index, positions):
        """A new cache made of these rows (repeats allowed), with room for `positions`."""
        new = KVCache.__new__(KVCache)
        new.length = self.length
        for name in ("k", "v"):
            old = getattr(self, name)
            room = old.new_empty(old.shape[0], len(index), old.shape[2], positions, old.shape[4])
            room[:, :, :, :self.length] = old[:, :, :, :self.length].index_select(1, index)
            setattr(new, name, room)
        return new

    def keep(self, index):
        """Make these the rows (repeats allowed). Whole rows are copied, filled or not: one long copy beats many short ones."""
        self.k, self.v = self.k.index_select(1, index), self.v.index_select(1, index)


class StaticCache:
    """What a KVCache is, at fixed addresses, for steps of one token: `place` [1] is the one of S places that it is written to, `reach` how many are read.

    Places count padding; a token's position in its text is another matter. The first rows are those of `old`. Attention also
    reads places that are not filled, under its mask: they are 0, for what was never written may be NaN, and NaN times a weight
    of 0 is NaN.
    """

    def __init__(self, old, rows):
        layers, given, K, places, C = old.k.shape
        self.k, self.v = (torch.zeros(layers, rows, K, places, C, dtype=x.dtype, device=x.device) for x in (old.k, old.v))
        for new, x in ((self.k, old.k), (self.v, old.v)):
            new[:, :given, :, :old.length] = x[:, :, :, :old.length]
        self.length, self.reach = old.length, places
        self.place = torch.zeros(1, dtype=torch.long, device=old.k.device)

    def extend(self, layer, k, v):
        """Write k, v [B, K, 1, C] of one layer into the first B rows; returns those rows, [B, K, reach, C]."""
        here = slice(0, len(k))
        self.k[layer, here].index_copy_(2, self.place, k)
        self.v[layer, here].index_copy_(2, self.place, v)
        return self.k[layer, here, :, :self.reach], self.v[layer, here, :, :self.reach]

    def keep(self, index):
        """Make these the first rows (repeats allowed)."""
        for x in (self.k, self.v):
            x[:, :len(index)] = x.index_select(1, index)


class Block(nn.Module):
    """One layer: attention with grouped key-value heads, then SwiGLU, each behind an RMSNorm and a residual."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.eps = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps
        self.attention_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.qkv = nn.Linear(c.hidden_size, (self.heads + 2 * self.kv_heads) * c.head_dim, bias=c.qkv_bias)  # one product for three
        self.q_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.out = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)  # one product for two
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache, layer):  # x [B, T, D]; cos, sin [B, 1, T, C/2]; mask [B, 1, T, S] or None
        B, T, D = x.shape
        H, K = self.heads, self.kv_heads
        qkv = self.qkv(F.rms_norm(x, (D,), self.attention_norm, self.eps))
        qkv = qkv.view(B, T, H + 2 * K, self.head_dim).transpose(1, 2)  # [B, H + 2K, T, C]
        qk = qkv[:, :H + K]
        if self.q_norm is not None:
            norm = lambda heads, weight: F.rms_norm(heads, (self.head_dim,), weight, self.eps)
            qk = torch.cat((norm(qk[:, :H], self.q_norm), norm(qk[:, H:], self.k_norm)), dim=1)
        a, b = qk.chunk(2, dim=-1)  # queries and keys are turned together; rotary pairs (i, i + C/2)
        qk = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        q, k, v = qk[:, :H], qk[:, H:], qkv[:, H + K:]
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        if isinstance(cache, StaticCache):  # T is 1: the H/K heads that share keys go in as H/K queries of one head, as the kernels that take a mask do not share keys
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K, self.head_dim), k, v, mask).reshape(B, H, T, self.head_dim)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=H != K)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, H * self.head_dim))
        gate, up = self.gate_up(F.rms_norm(x, (D,), self.mlp_norm, self.eps)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """A Llama without its sampling: ids in, hidden states out. `head` [V, D] turns those into logits."""

    def __init__(self, config, raw=None):
        super().__init__()
        self.config, self.raw = config, raw or {}  # raw: config.json as it was read, so that it is saved as it was
        self.recompute = False  # keep only each layer's input for the backward pass and compute the rest again: less memory
        self.replay = False  # sample by steps of fixed shapes, recorded as CUDA graphs: see Replay
        self.gathering = []  # see optimizer_for
        self.saved_in = None  # a dtype, where that is not the weights' own: see shard
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.score = nn.Linear(config.hidden_size, 1, bias=False) if config.score_head else None
        self.lm_head = None if config.tie_word_embeddings or config.score_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    @property
    def head(self):
        """The output matrix [V, D]: the embedding itself where the two are tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids, positions=None, mask=None, cache=None):
        """Hidden states [B, T, D] of ids [B, T].

        positions [B, T]: each token's place in its own text (default 0..T-1).
        mask [B, 1, T, S], True where a token may look (or numbers, 0 there and -inf elsewhere); None means causal, and needs an
            empty cache or T = 1.
        cache: a KVCache or StaticCache to read and extend.
        Raises UserError for a text longer than the model's context.
        """
        past = cache.length if cache else 0
        self.check_fits(past + ids.shape[1], positions)
        if positions is None:
            positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # [B, 1, T, C/2]
        x = self.embed(ids)  # [B, T, D]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        again = self.recompute and torch.is_grad_enabled() and cache is None
        for layer, block in enumerate(self.blocks):
            inputs = (x, cos, sin, mask, cache, layer)
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        if cache is not None:
            cache.length += ids.shape[1]
        return F.rms_norm(x, x.shape[-1:], self.norm, self.config.rms_norm_eps)

    def check_fits(self, length, positions=None):
        """Raise UserError if a text of so many tokens, padding included, is longer than the context. positions: of its tokens, without padding."""
        if length > len(self.cos) and (positions is None or int(positions.max()) >= len(self.cos)):
            why = " (its sliding window; longer texts would see through it)" if self.config.sliding_window else ""
            raise UserError(f"text of {length} tokens is longer than the model's context of {len(self.cos)}{why}")

    def logits(self, ids, **kwargs):
        """Logits [B, T, V] of ids [B, T]: for looking and for tests. Training and sampling never hold all of them."""
        return F.linear(self(ids, **kwargs), self.head)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

class Rollout(NamedTuple):
    """What `generate` returns, one entry a row; the rows of a prompt's group stand together."""
    ids: list  # list[int], the end token included
    logprobs: list  # Tensor [tokens], of each id under the distribution it was sampled from
    finished: list  # bool, False where max_new_tokens cut it


def groups(rows, size):
    """[[first `size` rows], [next `size` rows], ...]"""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


class Replay:
    """Decode steps of fixed shapes, which a GPU records once as CUDA graphs: hundreds of small kernels are then launched as one.

    A graph is made for each number of rows, rounded up to a power of two, and of places that attention reads, rounded up to
    a multiple of PLACES; what is not real is masked out, or thrown away. A graph holds for one call of `generate`, as weights
    and cache must not move. Elsewhere the same steps run unrecorded, so that tests on a CPU reach all but the recording.
    """
    PLACES = 64

    def __init__(self, model, cache, rows):
        """cache: the filled KVCache of the prompts. rows: how many there may be."""
        self.model, self.cache = model, StaticCache(cache, rows)
        device = self.cache.place.device
        self.token, self.position = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        # Added to the scores: 0 or -inf. Whole multiples of PLACES wide, as the kernels want each row of it aligned.
        self.mask = self.cache.k.new_empty(rows, -(-self.cache.k.shape[3] // self.PLACES) * self.PLACES)
        self.warm, self.graphs, self.pool = set(), {}, torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, token, position, real):
        """Hidden states [U, D] of one more token [U] at position [U] of each row; real [U, length + 1]: the places it may see."""
        U, end = real.shape
        self.model.check_fits(end, position)
        rows = min(1 << (U - 1).bit_length(), len(self.token))
        reach = min(-(-end // self.PLACES) * self.PLACES, self.cache.k.shape[3])
        self.token[:U], self.position[:U] = token, position  # the other rows are nobody's
        self.mask.fill_(-math.inf)
        self.mask[:U, :end].masked_fill_(real, 0)
        self.cache.place.fill_(end - 1)
        shape = (rows, reach)
        if self.pool is None or shape not in self.warm:  # on a GPU the first time plainly: libraries set themselves up, which cannot be recorded
            self.warm.add(shape)
            x = self._step(*shape)
        else:
            if shape not in self.graphs:
                self.graphs[shape] = self._record(*shape)
            graph, x = self.graphs[shape]
            graph.replay()
        self.cache.length = end
        return x[:U]

    def _step(self, rows, reach):
        # With 0 for its length the model's own check, which would read positions back from the GPU, has nothing to do: __call__ has made it.
        self.cache.length, self.cache.reach = 0, reach
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # not cuDNN's, which makes a plan for each new shape
            return self.model(self.token[:rows, None], self.position[:rows, None], self.mask[:rows, None, None, :reach], self.cache)[:, 0]

    def _record(self, rows, reach):
        """(graph, the states [rows, D] that it writes when it is replayed)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.mask.device), torch.cuda.graph(graph, pool=self.pool):
            x = self._step(rows, reach)
        return graph, x


@torch.no_grad()
def generate(model, prompts, group=1, max_new_tokens=64, temperature=1.0, generator=None, end_ids=None):
    """Sample `group` completions of each prompt: Rollout with N * group rows.

    prompts: list of N lists of ids, of any lengths. temperature 0 takes the likeliest id (its log-probabilities are then
    those of temperature 1). generator: torch.Generator on the model's device. end_ids: default model.end_ids.
    Every prompt is computed once for its group, and so is everything that rows of a group have said alike so far: the batch
    holds one node for each different text, and a row points to its node. Rows that ended leave at once.
    """
    if not all(prompts):
        raise UserError("cannot sample from an empty prompt")
    device, N, V = model.embed.weight.device, len(prompts), model.config.vocab_size
    ends = torch.tensor(sorted(model.end_ids if end_ids is None else end_ids), device=device)
    P = max(map(len, prompts))
    # Left-padded, so that all nodes append at the same place: [N, P], and which of those places are real.
    ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=device)
    real = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts], device=device)
    position = real.cumsum(1).sub(1).clamp(min=0)  # [N, P]
    padded = not bool(real.all())
    causal = torch.ones(P, P, dtype=torch.bool, device=device).tril()
    # Padding looks at itself only, which keeps the softmax finite; no real token looks at padding.
    mask = (causal & real[:, None, None, :]) | torch.eye(P, dtype=torch.bool, device=device) if padded else None
    cache = KVCache(model.config, N, P + max_new_tokens, model.embed.weight)
    x, position = model(ids, position, mask, cache)[:, -1], position[:, -1]  # [U, D], [U]: U nodes, at first the prompts

    B = N * group
    out = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    out_lp = torch.zeros(B, max_new_tokens, device=device)
    length = torch.full((B,), max_new_tokens, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    replay = Replay(model, cache, B) if model.replay else None
    if replay:
        cache, padded = replay.cache, True  # steps of fixed shapes read more than is filled: always masked
    U = N
    row = torch.arange(B, device=device)  # the rows that are still going ..
    node = row // group  # .. and the node of each
    for t in range(max_new_tokens):
        logits = F.linear(x, model.head).float()  # [U, V]
        lp = F.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
        token = torch.multinomial(lp.exp()[node], 1, generator=generator)[:, 0] if temperature > 0 else lp.argmax(-1)[node]
        out[row, t], out_lp[row, t] = token, lp[node, token]
        ended = torch.isin(token, ends)
        if ended.any():
            finished[row[ended]] = True
            length[row[ended]] = t + 1
            row, node, token = row[~ended], node[~ended], token[~ended]
        if len(row) == 0 or t == max_new_tokens - 1:
            break
        # A node and a token make a new node; rows that agree in both share it.
        pair, node = (node * V + token).unique(return_inverse=True)
        parent, token = pair // V, pair % V  # [U]
        if not torch.equal(parent, torch.arange(U, device=device)):  # unless every node goes on with one token, and all stay as they are
            position, real, U = position[parent], real[parent], len(parent)
            cache.keep(parent)
        position = position + 1
        if padded:
            real = F.pad(real, (0, 1), value=True)
        if replay:
            x = replay(token, position, real)  # [U, D]
        else:
            x = model(token[:, None], position[:, None], real[:, None, None, :] if padded else None, cache)[:, 0]  # [U, D]
    length = length.tolist()
    return Rollout([r[:n] for r, n in zip(out.tolist(), length)], [r[:n] for r, n in zip(out_lp, length)], finished.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Scoring: log-probabilities of given completions

class Packed(NamedTuple):
    """Rows of `one prompt + several of its completions`, side by side: each completion sees the prompt and itself.

    The prompt is computed once for its group, forward and backward. A completion's last token is scored but never read,
    so it is left out of the row.
    """
    ids: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, T]
    segment: torch.Tensor  # [B, T], 0 the prompt, 1.. the completions, -1 padding
    source: torch.Tensor  # [n], where in B * T the state stands that predicts each completion token
    target: torch.Tensor  # [n], the completion token
    owner: torch.Tensor  # [n], which completion it belongs to, counted over all prompts in order


def pack(prompts, completions, tokens=512, device="cpu", whole=False):
    """Lay prompts and their completions out as micro-batches of at most about `tokens` positions, padding included.

    prompts: N lists of ids. completions: N lists of lists of ids (groups may differ in size). Returns a list of Packed.
    whole: keep each group in one row, however long, for a loss that needs all of it at once.
    Rows of similar length share a micro-batch; `owner` says which token is whose, so order and split change no result.
    """
    rows, count = [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        if not prompt or not all(group):
            raise UserError("cannot score an empty prompt or completion")
        row = None
        for completion in group:
            read = [*completion[:-1]]
            if row is None or not whole and len(row[0]) + len(read) > max(tokens // 2, len(prompt) + len(read)):
                row = ([*prompt], [*range(len(prompt))], [0] * len(prompt), [], [], [])
                rows.append(row)
            ids, positions, segment, source, target, owner = row
            source += [len(prompt) - 1, *range(len(ids), len(ids) + len(read))]
            target += completion
            owner += [count] * len(completion)
            ids += read
            positions += range(len(prompt), len(prompt) + len(read))
            segment += [segment[-1] + 1 if read else segment[-1]] * len(read)
            count += 1
    rows.sort(key=lambda row: len(row[0]))
    batches, batch = [], []
    for row in rows:  # sorted, so the last row of a batch is its longest
        if batch and len(row[0]) * (len(batch) + 1) > tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    return [_stack(batch, device) for batch in batches + [batch] if batch]


def _stack(rows, device):
    T = max(len(row[0]) for row in rows)
    padded = lambda i, fill: torch.tensor([row[i] + [fill] * (T - len(row[i])) for row in rows], device=device)
    flat = lambda i: torch.tensor([x for row in rows for x in row[i]], device=device)
    source = torch.tensor([b * T + s for b, row in enumerate(rows) for s in row[3]], device=device)
    return Packed(padded(0, 0), padded(1, 0), padded(2, -1), source, flat(4), flat(5))


def states(model, packed, prefix=None):
    """The hidden state [n, D] from which each completion token of a Packed is predicted.

    prefix: a KVCache of one row that stands before every prompt (a rubric), computed once and only read here.
    """
    B, T = packed.ids.shape
    segment = packed.segment
    mask = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])  # [B, T, T]: the prompt, or my own
    mask = mask & torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
    cache, positions = None, packed.positions
    if prefix is not None:
        cache = prefix.rows(torch.zeros(B, dtype=torch.long, device=mask.device), prefix.length + T)
        mask = F.pad(mask, (prefix.length, 0), value=True)  # [B, T, S]
        positions = positions + prefix.length
    hidden = model(packed.ids, positions, mask[:, None], cache)  # [B, T, D]
    return hidden.flatten(0, 1).index_select(0, packed.source)  # indexing with [..] would sum its gradient in no fixed order


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ head.T / temperature)[target] without ever holding [n, V]: chunks, computed again backward."""

    @staticmethod
    def forward(ctx, hidden, head, target, temperature, chunk):  # [n, D], [V, D], [n] -> [n]
        out, lse = hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(len(hidden), dtype=torch.float32)
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logits = (hidden[part] @ head.T).float() / temperature  # [chunk, V]
            lse[part] = logits.logsumexp(-1)
            out[part] = logits.gather(1, target[part, None])[:, 0] - lse[part]
        ctx.save_for_backward(hidden, head, target, lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        return out

    @staticmethod
    def backward(ctx, grad):  # [n]
        hidden, head, target, lse = ctx.saved_tensors
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        for i in range(0, len(hidden), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            logits = (hidden[part] @ head.T).float() / ctx.temperature
            d = -(logits - lse[part, None]).exp()  # d out / d logits = onehot(target) - softmax
            d.scatter_add_(1, target[part, None], torch.ones_like(d[:, :1]))
            d = (d * (grad[part, None] / ctx.temperature)).to(hidden.dtype)  # [chunk, V]
            d_hidden[part] = d @ head
            d_head += d.T @ hidden[part]
        return d_hidden, d_head.to(head.dtype), None, None, None


def logprobs(model, packed, temperature=1.0, chunk=1024):
    """Log-probability [n] (natural log, float32) of each completion token of a Packed, with a gradient.

    temperature: the one the completions were sampled with, so that what is trained is what was played.
    chunk: how many tokens' logits are alive at once.
    """
    return TokenLogprobs.apply(states(model, packed), model.head, packed.target, temperature, chunk)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, `torchrun --nproc-per-node 8 selfplay.py ..`: each plays its share of a step's games, and holds its share of the
# weights and of the optimizer (FSDP2). They are gathered once for sampling; in training, layer by layer.

class Crew(NamedTuple):
    """The processes that play one run together: which one this is, and how many they are."""
    rank: int = 0
    size: int = 1

    def share(self, items):
        """This process's part of what all have, in order of rank."""
        n = len(items) // self.size
        return items[self.rank * n:(self.rank + 1) * n]

    def all(self, mine):
        """What every process has, in order of rank: a list."""
        out = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(out, mine)
        return out


def join(device):
    """(Crew, device) of this process: torchrun says in the environment how many play together; alone, without it."""
    if "RANK" not in os.environ:
        return Crew(), check_device(device)
    if device.startswith("cuda"):
        device = check_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    # Long: others may wait for one's slow reward, or for the first to write. One that dies is torchrun's to notice, at once.
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    return Crew(dist.get_rank(), dist.get_world_size()), check_device(device)


def leave(crew):
    """The end of playing together: all wait for the last."""
    if crew.size > 1:
        dist.barrier()
        dist.destroy_process_group()


def shard(model, device="cpu", dtype=torch.float32):
    """Share the float32 weights of a model on the CPU out among the processes' devices, layer by layer; it computes in dtype. Returns it."""
    from torch.distributed.device_mesh import init_device_mesh  # half a second, which one process alone need not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    model.saved_in = dtype
    mesh, policy = init_device_mesh(torch.device(device).type, (dist.get_world_size(),)), MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def _gathered(tensors, rank):
    """{name: tensor} whole and on the CPU, in the first process; the others only help, one tensor after the other."""
    whole = {}
    for name, tensor in tensors.items():
        value = _whole(tensor.detach())
        if rank == 0:
            whole[name] = value.cpu().contiguous()
    return whole


def _whole(tensor):
    """A tensor that is shared out, gathered from all processes; any other one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _as(tensor, like):
    """A whole tensor, shared out as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


# ---------------------------------------------------------------------------------------------------------------------
# Learning

def optimizer_for(model, kind, **settings):
    """An optimizer (kind: a class of torch.optim) of float32 weights, for a model of any dtype.

    A model in bfloat16 computes in bfloat16 and learns in float32: every weight has a float32 master, in which the gradients
    of all micro-batches are summed, and each step copies the masters back. Without them, a small step would be rounded away.
    """
    weights = list(model.parameters())
    if model.embed.weight.dtype == torch.float32:
        return kind(weights, **settings)
    masters = [w.detach().float().requires_grad_() for w in weights]

    def gather(master):
        def hook(weight):
            master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
            weight.grad = None
        return hook
    for handle in model.gathering:  # of an earlier optimizer
        handle.remove()
    model.gathering = [weight.register_post_accumulate_grad_hook(gather(master)) for weight, master in zip(weights, masters)]
    optimizer = kind(masters, **settings)
    optimizer.register_step_post_hook(lambda *_: torch._foreach_copy_([w.data for w in weights], masters))
    return optimizer


def weights_of(optimizer):
    """The float32 weights that an optimizer moves, in the model's order: its own, or for a bfloat16 model their masters."""
    return [w for group in optimizer.param_groups for w in group["params"]]


def clip(optimizer, largest):
    """Scale the gradients of an optimizer's weights down to a norm of `largest`; returns their norm before.

    Raises FloatingPointError where that is not finite: the step must not be taken then.
    """
    norm = _whole(torch.nn.utils.clip_grad_norm_(weights_of(optimizer), largest)).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    return norm


def set_rate(optimizer, lr):
    """Learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def save_state(path, optimizer, generator, facts, crew=Crew(), **tensors):
    """Write a checkpoint, one safetensors file: weights, optimizer, the generators' states, `facts` (JSON) and other tensors.

    All processes of a crew (default: one alone) call this, and the first writes.

    Written beside its place and renamed; the one that was there becomes <name>.previous. A kill at any moment leaves a whole one.
    Raises UserError where it cannot be written; what was there before stays.
    """
    path = Path(path)
    tensors = tensors | {"generator": torch.stack(crew.all(generator.get_state()))} | {f"weight.{i}": w for i, w in enumerate(weights_of(optimizer))}
    tensors |= {f"optimizer.{i}.{name}": value for i, own in optimizer.state_dict()["state"].items() for name, value in own.items()}
    tensors = _gathered(tensors, crew.rank)
    if crew.rank:
        return
    new = path.with_name(path.name + ".new")
    try:
        facts = json.dumps(facts)
        save_file(tensors, new, metadata={"facts": facts, "checksum": str(_checksum(tensors, facts))})
        if path.exists():
            path.replace(previous(path))
        new.replace(path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({one_line(error)}); what was saved before is whole") from None


def previous(path):
    """Where the checkpoint before the one at `path` is."""
    return path.with_name(path.name + ".previous")


def read_state(path):
    """(facts, tensors) of a checkpoint. Raises UserError for one that is missing, cut short or damaged, and offers the one before."""
    path = Path(path)
    other = previous(path) if previous(path).is_file() else None
    offer = f"; the one before it is here: --resume {other}" if other else ""
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint{offer}")
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        facts, whole = json.loads(metadata["facts"]), metadata["checksum"] == str(_checksum(tensors, metadata["facts"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cut short or no checkpoint ({one_line(error)}){offer}") from None
    if not whole:
        raise UserError(f"{path}: damaged, its checksum is another{offer}")
    return facts, tensors


def load_state(model, optimizer, generator, tensors, crew=Crew()):
    """Put a checkpoint's tensors back: weights, optimizer, generator. The model's weights follow from the optimizer's.

    With another number of processes than it was saved by, each draws on from a new state of its own.
    """
    weights = weights_of(optimizer)
    if [list(w.shape) for w in weights] != [list(tensors[f"weight.{i}"].shape) for i in range(len(weights)) if f"weight.{i}" in tensors]:
        raise UserError("the checkpoint is of another model")
    with torch.no_grad():
        for i, w in enumerate(weights):
            w.copy_(_as(tensors[f"weight.{i}"], w))
        for own, w in zip(model.parameters(), weights):
            if own is not w:  # bfloat16: the optimizer's are the float32 masters
                own.copy_(w)
    state = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = _as(value, weights[int(i)]) if value.shape == weights[int(i)].shape else value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    states = tensors["generator"]  # [processes, bytes]
    if len(states) == crew.size:
        generator.set_state(states[crew.rank])
    else:
        generator.manual_seed(zlib.crc32(states.numpy().tobytes()) ^ crew.rank)


def _checksum(tensors, text=""):
    """CRC-32 of a text, and of tensors' names and bytes."""
    check = zlib.crc32(text.encode())
    for name in sorted(tensors):
        check = zlib.crc32(name.encode(), check)
        check = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), check)
    return check


def fingerprint(model, data=None):
    """A number that changes when a model's weights do, or the data: CRC-32 of the beginning of each weight, in any dtype, and of all data."""
    return _checksum({name: p.detach().flatten()[:256].cpu().bfloat16() for name, p in model.named_parameters()}, repr(data))


def offload(model):
    """Move a frozen model's weights to CPU memory, page-locked where a GPU will want them back; `resident` brings them. Returns it."""
    for p in model.parameters():
        p.data = p.data.cpu().pin_memory() if p.data.is_cuda else p.data.cpu()
    return model


@contextmanager
def resident(model):
    """The model with all its weights on its device, that of its rotary tables, for the length of a `with`.

    Nothing happens to a model that is there already. An offloaded one is copied, and the copy dropped: it is frozen, so its
    weights in CPU memory are still the truth. One that is shared out among processes is gathered once, by all of them together.
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


def parameter_count(config):
    """How many weights a model of this Config has."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def memory_plan(config, dtype, optimizer_floats, rows, positions, tokens, recompute=False, chunk=1024, frozen=(), offloaded=False):
    """{use: bytes} of a training run, before anything is loaded. What stays, then what comes and goes.

    optimizer_floats: float32 numbers a weight that the optimizer keeps (AdamW 2, RMSProp 1). rows, positions: of the largest
    sampling batch. tokens: of a micro-batch. frozen: Configs of the models that only look on (reference, reward model).
    offloaded: those come one at a time.
    """
    c, size, P = config, dtype.itemsize, parameter_count(config)
    width = c.num_attention_heads * c.head_dim
    layer = 6 * c.hidden_size + 4 * width + 4 * c.num_key_value_heads * c.head_dim + 5 * c.intermediate_size  # floats a token kept for backward
    kept = (c.num_hidden_layers * c.hidden_size + layer) if recompute else c.num_hidden_layers * layer
    return {
        "weights": P * size,
        "float32 masters": 4 * P if size < 4 else 0,
        "gradients": 4 * P,
        "optimizer": 4 * optimizer_floats * P,
        "frozen models": (max if offloaded else sum)([0, *(parameter_count(f) for f in frozen)]) * size,
        "cache": 2 * c.num_hidden_layers * rows * positions * c.num_key_value_heads * c.head_dim * size * 2,  # twice: rows that leave are copied
        "activations": tokens * kept * size,
        "logits": (3 * 4 * min(chunk, tokens) + (4 + 2 * size) * c.hidden_size) * c.vocab_size,  # with the head's gradient
    }


def free_memory(device):
    """Bytes that are free on a device; None where that cannot be told."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def most_memory(plan):
    """Bytes of a memory_plan at their peak: sampling (the cache) and training (gradients, activations, logits) are never there at once."""
    return sum(plan.values()) - min(plan["cache"], plan["gradients"] + plan["activations"] + plan["logits"])


def check_memory(plan, device, show=False):
    """Print a memory_plan (show), and raise UserError if it cannot fit."""
    total, free = most_memory(plan), free_memory(device)
    if show:
        for use, size in plan.items():
            print(f"    {use:<18}{size / 2**30:9.2f} GiB")
        print(f"    {'at the most':<18}{total / 2**30:9.2f} GiB" + (f" of {free / 2**30:.2f} GiB free on {device}" if free else ""))
    if free is not None and total > free:
        raise UserError(f"this needs about {total / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}: "
                        "try --dtype bfloat16, --recompute, a smaller --micro-batch, fewer games, a smaller model, or on a GPU selfplay.py's --offload")


# ---------------------------------------------------------------------------------------------------------------------
# Text

class Tokenizer:
    """A model folder's tokenizer.json and chat template."""

    MARK = "\ue000"  # a private character that breaks up text which would spell a special token

    def __init__(self, folder):
        folder, settings = Path(folder), read_json(Path(folder) / "tokenizer_config.json")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder}: tokenizer.json is missing")
        try:
            self.text = TextTokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise UserError(f"{path}: not a tokenizer ({one_line(error)})") from None
        self.text.no_truncation(), self.text.no_padding()  # a trainer's habits, saved with the file
        self.special = {t.content: i for i, t in self.text.get_added_tokens_decoder().items() if t.special}
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")") if self.special else None
        name = lambda t: t if isinstance(t, str) else name(t.get("content")) if isinstance(t, dict) else ""  # older files hold a dict for each
        self.names = {k: name(settings.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text()
        if not isinstance(template, str) or not template:
            raise UserError(f"{folder}: no chat_template in tokenizer_config.json: is this an instruct model?")
        # What transformers offers to a template, so that every author's own template renders as there.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": _raise_template_error, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self.template = environment.from_string(template)
        except (TemplateError, ValueError, RecursionError, MemoryError, OverflowError, TypeError) as error:
            raise UserError(f"{folder}: the chat template does not compile ({one_line(error)})") from None

    def encode(self, text):
        """Ids of plain text: nothing in it becomes a special token, nothing is put before or after it."""
        self.text.encode_special_tokens = True
        return self._encode(text)

    def _encode(self, text):
        try:
            return self.text.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise UserError(f"the tokenizer cannot take {text[:40]!r} ({one_line(error)})") from None

    def decode(self, ids):
        """Text of ids, special tokens left out."""
        return self.text.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=True):
        """Ids of a conversation, [{"role": .., "content": ..}, ..], as the model folder's own template writes it.

        The same ids as transformers' apply_chat_template, but for one thing: special tokens come from the template alone, and
        text that spells one stays text. Raises UserError where the template refuses the conversation.
        """
        safe = [{**m, "content": self._disarm(m["content"])} for m in messages]
        text = self._render(messages=safe, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self.names)
        if self.MARK not in text:  # nobody's text spells a special token
            self.text.encode_special_tokens = False
            return self._encode(text)
        ids = []
        for i, part in enumerate(self._split.split(text)):  # text, special, text, special, ..
            ids += [self.special[part]] if i % 2 else self.encode(part.replace(self.MARK, "")) if part else []
        return ids

    def _render(self, **variables):
        pieces, size = [], 0
        try:
            with time_limit(TEMPLATE_SECONDS, f"the chat template took longer than {TEMPLATE_SECONDS} seconds"):
                for piece in self.template.generate(**variables):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_FILE:
                        raise UserError("the chat template writes without end")
        except UserError:
            raise
        except Exception as error:  # whatever somebody's template may raise
            raise UserError(f"the chat template failed: {one_line(error)}") from None
        return "".join(pieces)

    def end_of_turn(self, end_ids):
        """The id that the template writes at the end of an assistant's answer: one of end_ids. Raises UserError for none."""
        ids = self.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
        answer = ids[len(self.chat([{"role": "user", "content": "a"}])):]
        ends = [i for i in answer if i in end_ids]
        if not ends:
            raise UserError("the chat template ends an assistant's answer with none of the model's end tokens")
        return ends[0]

    def _disarm(self, text):
        text = text.replace(self.MARK, "")  # a mark of the user's own would break up nothing
        return self._split.sub(lambda m: m[0][0] + self.MARK + m[0][1:], text) if self._split else text


def _raise_template_error(message):
    raise TemplateError(message)


def one_line(error):
    """An error's message on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


MAX_FILE = 2**28  # bytes of a JSON file, characters of a rendered conversation: far above any real one
TEMPLATE_SECONDS = 10  # for one conversation


def read_json(path):
    """The dict in a JSON file. Raises UserError for one that is missing, absurdly large, or no JSON object."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError("the file is absurdly large")
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("an object was expected")
        return value
    except FileNotFoundError:
        raise UserError(f"{path.parent}: {path.name} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({one_line(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Files in Hugging Face layout

def _weight_map(config):
    """Our parameter name -> the Hugging Face names whose rows it stacks, with the rows of each."""
    kv, names = config.num_key_value_heads * config.head_dim, {}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        names[ours + "attention_norm"] = {theirs + "input_layernorm.weight": None}
        names[ours + "qkv.weight"] = {theirs + "self_attn.q_proj.weight": config.num_attention_heads * config.head_dim,
                                      theirs + "self_attn.k_proj.weight": kv, theirs + "self_attn.v_proj.weight": kv}
        if config.qkv_bias:
            names[ours + "qkv.bias"] = {name.replace("weight", "bias"): rows for name, rows in names[ours + "qkv.weight"].items()}
        if config.qk_norm:
            names |= {ours + "q_norm": {theirs + "self_attn.q_norm.weight": None}, ours + "k_norm": {theirs + "self_attn.k_norm.weight": None}}
        names[ours + "out.weight"] = {theirs + "self_attn.o_proj.weight": None}
        names[ours + "mlp_norm"] = {theirs + "post_attention_layernorm.weight": None}
        names[ours + "gate_up.weight"] = {theirs + "mlp.gate_proj.weight": config.intermediate_size,
                                          theirs + "mlp.up_proj.weight": config.intermediate_size}
        names[ours + "down.weight"] = {theirs + "mlp.down_proj.weight": None}
    names |= {"embed.weight": {"model.embed_tokens.weight": None}, "norm": {"model.norm.weight": None}}
    if config.score_head:
        names["score.weight"] = {"score.weight": None}
    elif not config.tie_word_embeddings:
        names["lm_head.weight"] = {"lm_head.weight": None}
    return names


def _read_weights(folder):
    """All tensors of a folder's model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if not (folder / shards[0]).is_file() and index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index}: no weight_map from tensors to files")
        shards = sorted(set(weight_map.values()))
    tensors = {}
    for shard in shards:
        if Path(shard).name != shard or not os.path.isfile(folder / shard):  # of any text at all; Path.is_file may raise
            raise UserError(f"{folder}: {one_line(shard)} is missing")
        try:
            with safe_open(folder / shard, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise UserError(f"{folder / shard}: cut short or not safetensors ({one_line(error)})") from None
    return tensors


def is_hub_name(name):
    """Does a name look like a hub's, org/model, and not like a path here?"""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not Path(name).exists() and not Path(name).parent.is_dir()


def load(name, device="cpu", dtype=torch.float32, revision=None):
    """(model, tokenizer) of a folder in Hugging Face layout, or of a model on the hub ("org/name"), there of a revision.

    Nothing is fetched unless `name` is no folder and looks like a hub name. The model carries `end_ids` (set of int).
    Raises UserError, one line, for whatever is missing, unsupported or does not fit.
    """
    folder = _find(name, revision)
    raw = read_json(folder / "config.json")
    config = Config.from_json(raw)
    tensors = _read_weights(folder)
    with torch.device("meta"):
        model = Llama(config, raw)
    weights, used = {}, set()
    for ours, parts in _weight_map(config).items():
        if missing := [n for n in parts if n not in tensors]:
            raise UserError(f"{folder}: the weights lack {missing[0]}")
        weights[ours] = torch.cat([tensors[n] for n in parts]) if len(parts) > 1 else tensors[next(iter(parts))]
        expected = model.get_parameter(ours).shape
        if weights[ours].shape != expected:
            asked = "a reward model has one label" if ours == "score.weight" else f"config.json asks for {list(expected)}"
            raise UserError(f"{folder}: {' + '.join(parts)} is {list(weights[ours].shape)}, {asked}")
        used |= parts.keys()
    extra = [n for n in tensors if n not in used and not n.endswith("rotary_emb.inv_freq") and n != "lm_head.weight"]
    if extra:
        raise UserError(f"{folder}: weights that no Llama has: {extra[0]}" + (f" and {len(extra) - 1} more" if len(extra) > 1 else ""))
    model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
    model.cos, model.sin = rope_table(config)
    model = model.to(device)
    tokenizer = Tokenizer(folder)
    settings = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    ends = settings.get("eos_token_id", raw.get("eos_token_id"))
    ends = [tokenizer.special.get(tokenizer.names["eos_token"])] if ends is None else ends
    ends = ends if isinstance(ends, list) else [ends]
    if not all(e is None or type(e) is int and 0 <= e < config.vocab_size for e in ends):
        raise UserError(f"{folder}: eos_token_id in generation_config.json is not an id of the vocabulary, or several")
    model.end_ids = {e for e in ends if e is not None}
    if not model.end_ids and not config.score_head:
        raise UserError(f"{folder}: no end token: give eos_token_id in generation_config.json")
    if tokenizer.text.get_vocab_size() > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer knows {tokenizer.text.get_vocab_size()} ids, the model {config.vocab_size}")
    model.folder = folder
    return model, tokenizer


def read_config(name, revision=None):
    """The Config of a model's folder or hub name, without its weights. Raises UserError."""
    return Config.from_json(read_json(_find(name, revision, ["config.json"]) / "config.json"))


def _find(name, revision, files=("*.json", "*.jinja", "*.safetensors")):
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise UserError(f"{name}: no such model folder")
    return _fetch(str(name), revision, list(files))


def _fetch(name, revision, files):
    """The folder of a hub model: downloaded once, then from the hub library's cache; a cut download goes on where it stopped."""
    from huggingface_hub import errors, snapshot_download  # only who names a hub model needs it
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["consolidated*"]))
    except errors.HFValidationError as error:
        raise UserError(f"{name}: not a name that the hub allows ({one_line(error)})") from None
    except errors.GatedRepoError:
        raise UserError(f"{name}: its authors ask you to accept their terms first: do so on its page of the hub, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub knows no revision {revision!r} of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: no such folder here, and no such model on the hub (or it is private: `hf auth login`)") from None
    except (errors.HTTPError, OSError) as error:  # no network, a broken download: the hub library's own http library says HTTPError
        raise UserError(f"{name}: no such folder here, and the hub cannot be reached ({one_line(error)}); "
                        "offline, name a local folder instead") from None


def save(model, folder):
    """Write a loaded model, and the tokenizer files of the folder it came from, to a folder in Hugging Face layout.

    The weights come last and by renaming: where a model.safetensors is, it is whole. Raises UserError where it cannot be written.
    All processes of a crew call this, and the first writes.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    weights = _gathered(dict(model.named_parameters()), rank)
    if rank:
        return
    try:
        _save(model, weights, Path(folder))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({one_line(error)})") from None


def _save(model, weights, folder):
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(model.saved_in or weight.dtype) for name, weight in weights.items()}
    dtype = str(weights["embed.weight"].dtype).removeprefix("torch.")
    raw = model.raw | {"torch_dtype": dtype} | ({"dtype": dtype} if "dtype" in model.raw else {})  # newer transformers read dtype
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json"):
        if (model.folder / name).is_file() and model.folder.resolve() != folder.resolve():
            shutil.copyfile(model.folder / name, folder / name)
    tensors = {}
    for ours, parts in _weight_map(model.config).items():
        split = weights[ours].split(list(parts.values())) if len(parts) > 1 else [weights[ours]]
        tensors |= {name: piece.contiguous().clone() for name, piece in zip(parts, split)}
    save_file(tensors, folder / "model.safetensors.new", metadata={"format": "pt"})
    (folder / "model.safetensors.new").replace(folder / "model.safetensors")
