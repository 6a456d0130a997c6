"""The player: a Llama decoder in plain PyTorch. Self-play asks two things of it: to sample texts,
and to say how probable given texts are.

    model, tokenizer = load("tiny")                       # a folder in Hugging Face layout
    prompts = [tokenizer.chat([{"role": "user", "content": query}]) for query in queries]
    rollout = generate(model, prompts, group=8, max_new_tokens=32)
    for packed in pack(prompts, groups(rollout.ids, 8)):  # each group of sampled ids as a tree
        lp = logprobs(model, packed)                      # their log-probabilities, with a gradient
    save(model, "folder")                                 # transformers and vLLM can open it

Left out: families other than FAMILIES, dropout, quantised weights, top-k and top-p sampling.
recipes/plain.py samples and scores without any of the savings below. Begin there.
Shapes: B rows of a batch, T positions, S cached positions, D width, H heads, K key-value heads, C
head size, vocab words; N prompts, G completions of each, M = N * G completions, n their tokens."""
import copy
import math
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support import adapters, console, files, machine
from support.adapters import TARGETS
from support.text import Tokenizer


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each behind an RMSNorm. __init__ is below `forward`."""

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        """x [B, T, D] -> x. cos, sin [B or 1, T, 1, C]: see rope_table. mask: see `attend`."""
        B, T, D = x.shape
        H, K, C = self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv(rms_norm(x, self.attention_norm, self.eps))
        qk, v = qkv.view(B, T, H + 2 * K, C).split((H + K, K), dim=2)
        if self.q_norm is not None:  # Qwen3
            q = rms_norm(qk[:, :, :H], self.q_norm, self.eps)
            k = rms_norm(qk[:, :, H:], self.k_norm, self.eps)
            qk = torch.cat((q, k), dim=2)
        # Rotary positions turn each pair (a, b) = (i, i + C/2) by its angle: a cos - b sin,
        # b cos + a sin. The sign is in `sin`.
        qk = torch.addcmul(qk * cos, qk.roll(C // 2, dims=-1), sin)
        q, k = qk.split((H, K), dim=2)  # [B, T, H, C], [B, T, K, C]
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # [B, S, K, C]: all positions so far
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y = (attend_fused if x.is_cuda else attend)(q, k, v, mask)  # [B, H, T, C]
        x = x + self.out(y.transpose(1, 2).reshape(B, T, H * C))
        gate, up = self.gate_up(rms_norm(x, self.mlp_norm, self.eps)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def __init__(self, c):
        """c: a Config."""
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_dim, self.eps = c.head_dim, c.rms_norm_eps
        self.attention_norm = nn.Parameter(torch.ones(c.hidden_size))
        # Queries, keys and values in one product; gate and up in another.
        self.qkv = Linear(c, "q_proj", "k_proj", "v_proj", bias=c.qkv_bias)
        self.q_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(c.head_dim)) if c.qk_norm else None
        self.out = Linear(c, "o_proj")
        self.mlp_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.gate_up = Linear(c, "gate_proj", "up_proj")
        self.down = Linear(c, "down_proj")


def rms_norm(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension (arXiv 1910.07467)."""
    if x.is_cuda or x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # On a CPU F.rms_norm is a dozen operations.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [.., 1]
    return x * (norm * norm / x.shape[-1] + eps).rsqrt() * weight


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(C)) v, [B, H, T, C], of q [B, H, T, C] and k, v [B, K, S, C].

    H/K heads of queries share one of keys and values. mask [B, 1, T, S] is added to the scores: 0
    where a token may look, else -inf. None means causal.
    """
    if q.shape[2] == 1:
        return attend_one(q, k, v, mask)
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=shared)


def attend_one(q, k, v, mask):
    """`attend` where T = 1: a head's H/K queries stand in a row, as if they were so many tokens."""
    B, H, _, C = q.shape
    q = q.reshape(B, k.shape[1], -1, C)  # [B, K, H/K, C]
    return F.scaled_dot_product_attention(q, k, v, mask).reshape(B, H, 1, C)


def attend_fused(q, k, v, mask):
    """`attend` for a GPU, by a fused kernel.

    PyTorch 2.13's kernels for CUDA take a mask, or heads that share keys and values, but not both:
    it would take the math kernel, which holds [B, H, T, S] (pytorch issue 191085). So nothing is
    shared here. (Where no kernel fits, it raises: machine.check_device rules the math kernel out.)
    """
    if q.shape[2] == 1:
        return attend_one(q, k, v, mask)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # [B, H, S, C]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


class Linear(nn.Linear):
    """A linear layer that may have LoRA adapters (arXiv 2106.09685, eq. 3).

        y = x W^T + alpha/r (x A^T) B^T       W [rows, in] is frozen; A [r, in], B [rows, r] learn

    It is one or several layers of Config.linear in one product, and each part has its own adapter.
    B begins as 0, so the model begins as it was. `adapt` makes the adapters.
    """

    def __init__(self, c, *names, bias=False):
        """c: a Config. names: of the parts."""
        self.parts = {name: c.linear[name][1] for name in names}  # {part: its rows of W}
        super().__init__(c.linear[names[0]][0], sum(self.parts.values()), bias=bias)
        self.scale = 0.0  # alpha/r; 0 without adapters
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()  # {part: matrix}

    def forward(self, x):
        """x [.., in] -> y [.., rows]"""
        y = F.linear(x, self.weight, self.bias)
        if not self.scale:
            return y
        more = [F.linear(F.linear(x, self.A[name]), self.B[name]) if name in self.A
                else x.new_zeros(*x.shape[:-1], rows) for name, rows in self.parts.items()]
        return y.add_(torch.cat(more, dim=-1), alpha=self.scale)  # in place: it is large

    @torch.no_grad()
    def merged(self):
        """W + alpha/r B A, [rows, in], computed in float32."""
        weight = self.weight.float()
        more = [self.B[name].float() @ self.A[name].float() if name in self.A
                else weight.new_zeros(rows, self.in_features) for name, rows in self.parts.items()]
        return (weight + self.scale * torch.cat(more)).to(self.weight.dtype)


# One decoder for all. Each family has what transformers takes where a config.json leaves a key out.
# For a new family, see also Config, Block, files.config_settings, weight_names.
FAMILIES = {
    "llama": {},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8,
                "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
              "head_dim": 128},
}


@dataclass
class Config:
    """A model's settings, by their names in Hugging Face's config.json."""
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # C
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: queries and keys are normed, head by head
    score_head: bool = False  # a reward model: one number for a text instead of logits
    sliding_window: int | None = None  # Mistral: a longer text is refused, so nothing slides

    @property
    def linear(self):
        """{linear layer of a block, by its name in Hugging Face's layout: (inputs, outputs)}."""
        D, width, kv_width = (self.hidden_size, self.num_attention_heads * self.head_dim,
                              self.num_key_value_heads * self.head_dim)
        return {"q_proj": (D, width), "k_proj": (D, kv_width), "v_proj": (D, kv_width),
                "o_proj": (width, D), "gate_proj": (D, self.intermediate_size),
                "up_proj": (D, self.intermediate_size), "down_proj": (self.intermediate_size, D)}

    def adapter_size(self, rank, targets):
        """How many numbers LoRA adapters have in all; None without a rank, that is, without LoRA.

        Raises UserError where LoRA cannot be.
        """
        if rank is None:
            return None
        if self.score_head:
            raise console.UserError("--lora is for a model that answers, and this one is a reward "
                                    "model")
        if rank > self.hidden_size:
            raise console.UserError(f"--lora {rank} is above the model's width of "
                                    f"{self.hidden_size}: a rank is far smaller, such as 16")
        return self.num_hidden_layers * rank * sum(sum(self.linear[name]) for name in targets)

    @property
    def context(self):
        """The longest text, in tokens, that is computed as the model's authors would."""
        longest = self.max_position_embeddings
        return min(longest, self.sliding_window or longest)


class Llama(nn.Module):
    """The decoder: ids in, hidden states out. `head` turns hidden states into logits."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.recompute = False  # compute activations again in the backward pass: less memory
        self.lora = None  # settings of its adapters, by peft's names; see adapt
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(c.hidden_size))
        self.score_head = nn.Linear(c.hidden_size, 1, bias=False) if c.score_head else None
        tied = c.tie_word_embeddings or c.score_head
        self.lm_head = None if tied else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        cos, sin = rope_table(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:  # on meta there are no numbers to draw
                nn.init.normal_(p, std=0.02)

    @property
    def head(self):
        """The output matrix [vocab, D]: the embedding itself where the two are tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids, positions=None, mask=None, cache=None):
        """Hidden states [B, T, D] of ids [B, T].

        positions [B, T]: each token's place in its own text. Default: 0 .. T-1.
        mask [B, 1, T, S]: True where a token may look. None means causal, and needs an empty cache
            or T = 1.
        cache: a KVCache to read and to extend.
        Raises UserError for a text longer than the model's context.
        """
        past = cache.length if cache else 0
        length, context = past + ids.shape[1], len(self.cos)
        # Padding may make a row longer than its text, so the positions decide.
        if length > context and (positions is None or int(positions.max()) >= context):
            window = " (its sliding window)" if self.config.sliding_window else ""
            length = length if positions is None else int(positions.max()) + 1
            raise console.UserError(f"text of {length} tokens is longer than the model's context "
                                    f"of {context}{window}")
        if positions is None:
            positions = torch.arange(past, length, device=ids.device)[None]
        x = self.embed(ids)  # [B, T, D]
        cos = self.cos[positions][:, :, None].to(x.dtype)  # [B or 1, T, 1, C]
        sin = self.sin[positions][:, :, None].to(x.dtype)
        if mask is not None:  # once for all layers, as what is added to a score
            S = mask.shape[-1]
            # Rows begin at multiples of 8, as a GPU's kernel wants them: else each layer copies it.
            bias = x.new_zeros(*mask.shape[:-1], S + -S % 8)[..., :S]
            mask = bias.masked_fill_(~mask, -math.inf)
        again = self.recompute and torch.is_grad_enabled() and cache is None
        for layer, block in enumerate(self.blocks):
            inputs = (x, cos, sin, mask, cache, layer)
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        if cache is not None:
            cache.length += ids.shape[1]
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, ids, **kwargs):
        """Logits [B, T, vocab] of ids [B, T], for plain.py and tests. Training never holds them."""
        return F.linear(self(ids, **kwargs), self.head)


def rope_table(config):
    """(cos, sin) of the angle of every position and frequency (2104.09864), each [context, C].

    Both halves of a head have the same angles. The sine is negative in the first: see Block.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**half  # [C/2], radians a position
    if s := config.rope_scaling:  # Llama 3.1: slow long waves, keep short ones, blend between
        wave = 2 * math.pi / frequency
        old, low = s["original_max_position_embeddings"], s["low_freq_factor"]
        blend = ((old / wave - low) / (s["high_freq_factor"] - low)).clamp(0, 1)
        frequency = frequency * (blend + (1 - blend) / s["factor"])
    angle = torch.outer(torch.arange(config.context, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()  # [context, C/2]
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class KVCache:
    """Keys and values of every layer, so that sampling computes each position once.

    kv [B, S, 2K, C] of each layer are allocated at once, a position's keys before its values;
    `length` positions of them are filled.
    """

    def __init__(self, config, rows, positions, like):
        """like: a tensor with the dtype and the device of the cache."""
        shape = rows, positions, 2 * config.num_key_value_heads, config.head_dim
        self.kv = [like.new_empty(shape) for _ in range(config.num_hidden_layers)]
        self.length = 0

    def extend(self, layer, k, v):
        """Append k, v [B, T, K, C] of one layer. Returns all of it, [B, length + T, K, C].

        All layers write at the same place. Then Llama.forward moves `length` on.
        """
        kv, K, end = self.kv[layer], k.shape[2], self.length + k.shape[1]
        kv[:, self.length:end, :K], kv[:, self.length:end, K:] = k, v
        return kv[:, :end, :K], kv[:, :end, K:]

    def keep(self, index):
        """Replace the rows by rows[index]. An index may repeat: then its row is copied."""
        for layer, old in enumerate(self.kv):  # one by one: only one layer is there twice
            self.kv[layer] = new = old.new_empty(len(index), *old.shape[1:])
            filled = slice(self.length)
            torch.index_select(old[:, filled], 0, index, out=new[:, filled])


# --------------------------------------------------------------------------------------------------
# Sampling

class Rollout(NamedTuple):
    """What `generate` returns: one entry a completion. The group of a prompt stands together."""
    ids: list  # M lists of int, the end token included
    logprobs: list  # M Tensors [tokens]: of each id, under the distribution it was sampled from
    finished: list  # M bools: False where max_new_tokens cut it


def groups(rows, size):
    """[[first `size` rows], [next `size` rows], ..]"""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


@torch.no_grad()
def generate(model, prompts, group=1, max_new_tokens=64, temperature=1.0, generator=None,
             end_ids=None):
    """Sample `group` completions of each of N prompts. Returns a Rollout of M = N * group.

    prompts: lists of ids, of any lengths. temperature: 0 takes the most probable id, with its
    log-probability at temperature 1. generator: a torch.Generator on the model's device.
    end_ids: ids that end a completion, model.end_ids by default. Raises UserError for an empty
    prompt, and for a text longer than the model's context.

    The same as plain.sample in recipes/plain.py, with three savings:
    1. A prompt is computed once for its whole group.
    2. Completions of a prompt that are equal so far share one node, a row of the forward batch. A
       node splits when its completions sample different tokens:
           step 1    completions 0..3 sample  a a b a   ->  2 nodes: a (0, 1, 3), b (2)
           step 2    they sample              c d c c   ->  3 nodes: ac (0, 3), ad (1), bc (2)
    3. A completion that has ended leaves.
    So the forward batch has N rows at first, and then one for each different completion that still
    goes on, prompt by prompt.
    """
    if not all(prompts):
        raise console.UserError("cannot sample from an empty prompt")
    device, ends = model.embed.weight.device, set(model.end_ids if end_ids is None else end_ids)
    N, M, P = len(prompts), len(prompts) * group, max(map(len, prompts))  # P: longest prompt

    # Who goes on, and in which node, is counted in Python. So the CPU waits for the device once a
    # token, for the sampled ids. What it then tells the device goes there while that is idle.
    alive = list(range(M))  # the completions that still go on, A of them
    node_of = [i // group for i in alive]  # the node of each
    row = torch.tensor(node_of, device=device)  # [A]: the same
    out, owner, chosen = [[] for _ in range(M)], [], []  # ids; who sampled each, log-probability

    # Prompts are padded on the left, so that all nodes append at the same place.
    pad = [P - len(p) for p in prompts]
    ids = torch.tensor([[0] * k + p for k, p in zip(pad, prompts)], device=device)  # [N, P]
    token_here = torch.tensor([[False] * k + [True] * (P - k) for k in pad], device=device)
    position = token_here.cumsum(1).sub(1).clamp(min=0)  # [N, P]
    padded, mask = any(pad), None
    if padded:  # padding looks at itself alone: that keeps its softmax finite
        causal = torch.ones(P, P, dtype=torch.bool, device=device).tril()
        itself = torch.eye(P, dtype=torch.bool, device=device)
        mask = (causal & token_here[:, None, None, :]) | itself  # [N, 1, P, P]
    cache = KVCache(model.config, N, P + max_new_tokens, model.embed.weight)
    x = model(ids, position, mask, cache)[:, -1]  # [B, D]: B nodes, at first the N prompts
    position = position[:, -1]  # [B]

    for t in range(max_new_tokens):
        logits = F.linear(x, model.head).float()  # [B, vocab]
        p = (logits / temperature if temperature > 0 else logits).softmax(-1)
        token = draw(p, row, generator) if temperature > 0 else logits.argmax(-1)[row]  # [A]
        chosen.append(p[row, token].log())
        owner += alive
        sampled = token.tolist()
        for i, own in zip(alive, sampled):
            out[i].append(own)
        # A node and a token make a new node. Completions that agree in both share it.
        pairs = [pair for pair in zip(node_of, sampled) if pair[1] not in ends]
        alive = [i for i, own in zip(alive, sampled) if own not in ends]
        if not alive or t == max_new_tokens - 1:
            break
        nodes = sorted(set(pairs))  # the new nodes, B of them: (parent, token)
        number = {pair: i for i, pair in enumerate(nodes)}
        node_of = [number[pair] for pair in pairs]
        parents, tokens = zip(*nodes)
        row, parent, token = torch.tensor([*node_of, *parents, *tokens], device=device).split(
            [len(alive), len(nodes), len(nodes)])
        if parents != tuple(range(len(x))):  # else all stay in place
            position, token_here = position[parent], token_here[parent]
            cache.keep(parent)
        position = position + 1
        mask = None
        if padded:
            token_here = F.pad(token_here, (0, 1), value=True)
            mask = token_here[:, None, None, :]  # [B, 1, 1, S]
        x = model(token[:, None], position[:, None], mask, cache)[:, 0]  # [B, D]
    # Log-probabilities stand step by step: put each completion's own together.
    order = torch.tensor(sorted(range(len(owner)), key=owner.__getitem__), device=device)
    logprobs = torch.cat(chosen)[order].split([len(ids) for ids in out])
    return Rollout(out, list(logprobs), [ids[-1] in ends for ids in out])


def draw(p, row, generator=None):
    """Sample a token from each of the distributions p[row]. p [B, vocab], row [A] -> [A].

    By inversion: the first token up to which the probabilities add up to more than a random number.
    (torch.multinomial draws a random number for each word of the vocabulary.)
    """
    upto = p.cumsum(-1)[row]  # [A, vocab]: rising from 0 to 1, but for rounding
    number = torch.rand(len(row), 1, device=p.device, generator=generator) * upto[:, -1:]
    # right: a token of probability 0 is never drawn, not even where the number is 0.
    return torch.searchsorted(upto, number, right=True)[:, 0]


ROOM = 16384  # cached positions of one batch of sample_all: bounds its memory


def sample_all(model, prompts, group=1, max_new_tokens=64, temperature=1.0, generator=None):
    """`generate` for many prompts, some at a time: N groups of G lists of ids, in order."""
    found = [None] * len(prompts)
    settings = (group, max_new_tokens, temperature, generator)
    for part, answers in sample_parts(model, prompts, *settings):
        for i, ids in zip(part, answers):
            found[i] = ids
    return found


def sample_parts(model, prompts, group=1, max_new_tokens=64, temperature=1.0, generator=None):
    """`generate` for many prompts. Yields (which prompts, their groups of ids), shortest first.

    Each batch has the room for its own longest prompt. What is left behind a batch is batched in
    the same way by a new call: so a run may stop between two of them.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding
    while by_length:
        count = 1
        while count < len(by_length) and (count + 1) * group * (
                len(prompts[by_length[count]]) + max_new_tokens) <= ROOM:
            count += 1
        part, by_length = by_length[:count], by_length[count:]
        rollout = generate(model, [prompts[i] for i in part], group, max_new_tokens, temperature,
                           generator)
        yield part, groups(rollout.ids, group)


# --------------------------------------------------------------------------------------------------
# Log-probabilities of given completions

class Packed(NamedTuple):
    """A batch of rows. A row is one prompt and several of its completions, as a tree.

    So the prompt is computed once for its group, and so is what completions begin with alike,
    forward and backward. A token sees the tokens before it in its own texts. (A completion's last
    token is predicted but never read, so it is not in the row.)
    Example: prompt p q, completions a b e, a c e and d e, where e is the end token:

        ids        p q a b c d    source  1 2 3   1 2 4   1 5        may look at   p q a b c d
        positions  0 1 2 3 3 2    target  a b e   a c e   d e                  p   x
        last       5 5 4 3 4 5    owner   0 0 0   1 1 1   2 2                  q   x x
                                  here    0 1 2                                a   x x x
        An a that ends at 4 is seen up to there: by b and c, not by d.         b   x x x x
                                                                               c   x x x   x
                                                                               d   x x       x
    """
    ids: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, T]
    last: torch.Tensor  # [B, T]: the place of the last token that continues this one
    source: torch.Tensor  # [n]: index into the B * T positions, of the state that predicts it
    target: torch.Tensor  # [n]: the tokens of all completions
    owner: torch.Tensor  # [n]: whose token, counted over all prompts' completions in order
    here: torch.Tensor  # [u]: the owners in ascending order


def pack(prompts, completions, tokens=512, device="cpu", whole=False):
    """Lay prompts and their completions out as micro-batches: a list of Packed.

    prompts: N lists of ids. completions: N lists of lists of ids; groups may differ in size.
    tokens: a micro-batch has about so many positions at the most, padding included.
    whole: keep a group in one row, however long, for a loss that needs all of it at once.
    Rows of similar length share a micro-batch. `owner` says whose token is whose, so neither order
    nor split changes a result. Raises UserError for an empty prompt or completion.
    """
    rows, before = [], 0  # before: how many completions the prompts before had
    for prompt, group in zip(prompts, completions, strict=True):
        if not prompt or not all(group):
            raise console.UserError("cannot score an empty prompt or completion")
        row = None
        # In sorted order, what a completion shares with any one before, it shares with the last.
        for i in sorted(range(len(group)), key=lambda i: tuple(group[i])):
            # Half a micro-batch at the most: then two rows of like length share one.
            room = max(tokens // 2, len(prompt) + len(group[i]) - 1)
            if row is None or not (whole or row.fits(group[i], room)):
                row = Row(prompt)
                rows.append(row)
            row.add(group[i], before + i)
        before += len(group)
    rows.sort(key=lambda row: len(row.ids))
    batches, batch = [], []
    for row in rows:  # sorted, so the last row of a batch is its longest
        if batch and len(row.ids) * (len(batch) + 1) > tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    return [_stack(batch, device) for batch in batches + [batch] if batch]


class Row:
    """A row of a Packed while it grows: lists, not tensors yet."""

    def __init__(self, prompt):
        P = len(prompt)
        self.ids, self.positions, self.last = [*prompt], [*range(P)], [None] * P
        self.source, self.target, self.owner = [], [], []
        self.read = []  # the latest completion, without its last token
        self.path = [P - 1]  # the places that predict its tokens

    def shared(self, completion):
        """How many tokens of a completion are in the row: those the latest one begins with, too."""
        return len(commonprefix([self.read, [*completion[:-1]]]))

    def fits(self, completion, room):
        """Whether the row has at most `room` tokens with this completion."""
        return len(self.ids) + len(completion) - 1 - self.shared(completion) <= room

    def add(self, completion, owner):
        """Let a completion branch off from the latest one."""
        shared, here = self.shared(completion), len(self.ids)
        for place in self.path[shared + 1:]:  # nothing more will continue these
            self.last[place] = here - 1
        self.read = [*completion[:-1]]
        new = self.read[shared:]
        self.path[shared + 1:] = range(here, here + len(new))
        start = self.positions[self.path[shared]] + 1
        self.ids.extend(new)
        self.positions.extend(range(start, start + len(new)))
        self.last.extend([None] * len(new))
        self.source.extend(self.path)
        self.target.extend(completion)
        self.owner.extend([owner] * len(completion))


def _stack(rows, device):
    """Rows as one Packed, padded on the right. Padding looks at itself: its softmax stays finite.
    """
    T = max(len(row.ids) for row in rows)

    def padded(lists, fill):
        full = [values + [fill] * (T - len(values)) for values in lists]
        return torch.tensor(full, device=device)

    def flat(lists):
        return torch.tensor([value for values in lists for value in values], device=device)
    last = [[len(row.ids) - 1 if place is None else place for place in row.last] for row in rows]
    source = [[b * T + s for s in row.source] for b, row in enumerate(rows)]
    return Packed(padded([row.ids for row in rows], 0), padded([row.positions for row in rows], 0),
                  padded(last, T), flat(source), flat([row.target for row in rows]),
                  flat([row.owner for row in rows]),
                  flat([sorted({owner for row in rows for owner in row.owner})]))


def states(model, packed):
    """The hidden state [n, D] from which each completion token of a Packed is predicted."""
    place = torch.arange(packed.ids.shape[1], device=packed.ids.device)  # [T]
    causal = place <= place[:, None]  # [T, T]
    mask = causal & (place[:, None] <= packed.last[:, None, :])  # [B, T, T]
    hidden = model(packed.ids, packed.positions, mask[:, None])  # [B, T, D]
    # hidden[source] would be right, too. But its backward pass adds in no fixed order, and two runs
    # of one seed would differ in the last digits.
    return hidden.flatten(0, 1).index_select(0, packed.source)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ head.T / temperature)[target], without ever holding [n, vocab].

    `chunk` tokens at a time have logits; the backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, head, target, temperature, chunk):
        """hidden [n, D], head [vocab, D], target [n] -> [n], float32."""
        out = hidden.new_empty(len(hidden), dtype=torch.float32)
        lse = torch.empty_like(out)
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logits = (hidden[part] @ head.T).float() / temperature  # [chunk, vocab]
            lse[part] = logits.logsumexp(-1)
            out[part] = logits.gather(1, target[part, None])[:, 0] - lse[part]
        ctx.save_for_backward(hidden, head, target, lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        return out

    @staticmethod
    def backward(ctx, grad):
        """grad [n] -> gradients of hidden and head."""
        hidden, head, target, lse = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        frozen = not ctx.needs_input_grad[1]  # with LoRA
        d_head = None if frozen else torch.zeros_like(head, dtype=torch.float32)
        for i in range(0, len(hidden), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            logits = (hidden[part] @ head.T).float() / ctx.temperature
            d = -(logits - lse[part, None]).exp()  # d out / d logits = onehot(target) - softmax
            d.scatter_add_(1, target[part, None], torch.ones_like(d[:, :1]))
            d = (d * (grad[part, None] / ctx.temperature)).to(hidden.dtype)  # [chunk, vocab]
            d_hidden[part] = d @ head
            if not frozen:
                d_head += d.T @ hidden[part]
        return d_hidden, None if frozen else d_head.to(head.dtype), None, None, None


def logprobs(model, packed, temperature=1.0, chunk=1024):
    """Log-probability [n] (natural log, float32) of each completion token, with a gradient.

    temperature: the one the completions were sampled with, so that what is trained is what was
    sampled. chunk: how many tokens' logits are alive at once.
    """
    hidden = states(model, packed)
    return TokenLogprobs.apply(hidden, model.head, packed.target, temperature, chunk)


# --------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685): learn a small addition to each weight, and leave the weight as it is

def adapt(model, rank, alpha=32.0, targets=TARGETS, seed=0):
    """Freeze a model, and give linear layers of its blocks adapters to learn.

    Returns the model with its adapters off, as a Llama of its own: it shares the frozen weights, so
    it takes no memory. rank: r. targets: which layers. seed: of A, which begins as in peft (Kaiming
    uniform); B begins as 0. Raises UserError for a rank above the model's width.
    """
    model.config.adapter_size(rank, targets)
    model.requires_grad_(False)
    off = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    generator = torch.Generator().manual_seed(seed)
    for layer in linear_layers(model).values():
        for name in [name for name in layer.parts if name in targets]:
            A = torch.empty(rank, layer.in_features, device="cpu")
            A.uniform_(-1, 1, generator=generator).div_(layer.in_features ** 0.5)
            B = torch.zeros(layer.parts[name], rank, device="cpu")
            # In the weight's dtype and on its device.
            layer.A[name], layer.B[name] = (nn.Parameter(x.to(layer.weight)) for x in (A, B))
            layer.scale = alpha / rank
    model.lora = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
    return off


def linear_layers(model):
    """{name: layer} of what may have adapters."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def merge_adapter(model, folder):
    """Add the adapters of a folder, peft's or ours, to a model's weights. Raises UserError."""
    names, layers = adapter_names(model.config), linear_layers(model)
    sizes = {theirs: model.config.linear[part] for theirs, (_, part) in names.items()}
    scale, found = adapters.read(folder, model.folder, sizes)
    for theirs, both in found.items():
        ours, part = names[theirs]
        layers[ours].A[part], layers[ours].B[part] = map(nn.Parameter, both)
        layers[ours].scale = scale
    for layer in layers.values():
        layer.weight = nn.Parameter(layer.merged())
        layer.A, layer.B, layer.scale = nn.ParameterDict(), nn.ParameterDict(), 0.0


def adapter_names(config):
    """{a layer that may have an adapter, by its name in peft: (our layer, the part of it)}."""
    return {theirs.removesuffix(".weight"): (ours.removesuffix(".weight"), theirs.split(".")[-2])
            for ours, parts in weight_names(config).items() for theirs in parts
            if theirs.endswith("_proj.weight")}


# --------------------------------------------------------------------------------------------------
# Files in Hugging Face layout

def load(name, device="cpu", dtype=torch.float32, date=None, variables=None):
    """(model, tokenizer) of a folder, or of a model on the hub: "org/name" or "org/name@revision".

    The folder of an adapter stands for its base, with the adapter merged in.
    date: what the chat template takes for now, in ISO form; None: this moment. variables: others
    that it reads, {name: value}.
    Nothing is fetched unless `name` is no folder and looks like a hub name. The model carries
    `end_ids` (set of int), `folder` (Path) and `raw` (config.json as it was read, but untied where
    the weights hold an output matrix of their own: transformers uses it, too).
    Raises UserError, one line, for whatever is missing, unsupported or does not fit.
    """
    folder = files.find(name)
    raw = files.read_json(folder / "config.json")
    config, weights = config_from_json(raw), files.read_tensors(folder)
    if config.tie_word_embeddings and not config.score_head and files.has_own_head(weights):
        console.note(f"{folder}: config.json ties the output matrix to the embedding, and the "
                     "weights hold another one: that one is used, as in transformers 5")
        raw["tie_word_embeddings"] = config.tie_word_embeddings = False
    with torch.device("meta"):
        model = Llama(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = files.stack(folder, weights, weight_names(config), shapes)
    model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    model.cos, model.sin = rope_table(config)
    tokenizer = Tokenizer(folder, date, variables)
    model.folder, model.raw, model.variables = folder, raw, tokenizer.variables
    if adapter := files.adapter_of(name):
        merge_adapter(model, adapter)
    model.end_ids = files.end_ids(folder, raw, tokenizer, config.vocab_size)
    end = None if config.score_head else tokenizer.turn_end
    if end is not None and end not in model.end_ids:
        token = tokenizer.text.id_to_token(end)
        console.note(f"{folder}: the chat template ends an answer with {token}, which "
                     "generation_config.json does not name: answers stop there, too")
        model.end_ids.add(end)
    if not model.end_ids and not config.score_head:
        raise console.UserError(f"{folder}: no end token: give eos_token_id in "
                                "generation_config.json")
    return model.to(device), tokenizer


def save(model, folder):
    """Write a loaded model, with the tokenizer of the folder it came from, in Hugging Face layout.

    With adapters: they are merged into the weights, and written by themselves into folder/adapter.
    All processes of a crew call this, and the first one writes. Raises UserError where it cannot.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    weights = machine.gathered(dict(model.named_parameters()), rank)
    if rank:
        return
    if model.lora:
        layers, found = linear_layers(model), {}
        for theirs, (ours, part) in adapter_names(model.config).items():
            if part in layers[ours].A:
                found[theirs] = weights[f"{ours}.A.{part}"], weights[f"{ours}.B.{part}"]
        adapters.write(Path(folder) / "adapter", model.folder, model.lora, found)
        for name, layer in layers.items():
            weights[f"{name}.weight"] = layer.merged().cpu()
    tensors = {}
    for ours, parts in weight_names(model.config).items():
        weight = weights[ours].to(getattr(model, "saved_in", weights[ours].dtype))
        pieces = weight.split(list(parts.values())) if len(parts) > 1 else [weight]
        tensors |= {name: piece.contiguous().clone() for name, piece in zip(parts, pieces)}
    dtype = str(weight.dtype).removeprefix("torch.")
    raw = model.raw | {"torch_dtype": dtype}
    if "dtype" in raw:  # its name in newer files
        raw["dtype"] = dtype
    files.write_folder(folder, raw, tensors, model.folder, getattr(model, "end_ids", None),
                       getattr(model, "variables", None))


def read_config(name):
    """(Config, how many weights) of a model's folder or hub name, without reading the weights.

    Raises UserError.
    """
    config = config_from_json(files.read_json(files.find(name, ["config.json"]) / "config.json"))
    with torch.device("meta"):
        return config, sum(p.numel() for p in Llama(config).parameters())


def config_from_json(raw):
    """Config from a config.json's dict. Raises UserError for what Llama would compute wrongly."""
    config = Config(**files.config_settings(raw, FAMILIES))
    files.check_sizes(config)
    return config


def weight_names(config):
    """{our parameter: {name in the file: its rows}}. Of several names, the rows are stacked."""
    rows = {name: outputs for name, (_, outputs) in config.linear.items()}
    # Our name in a block, and the parts it is made of in a layer of the file.
    block = {"attention_norm": ["input_layernorm.weight"],
             "qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
             "out.weight": ["self_attn.o_proj.weight"],
             "mlp_norm": ["post_attention_layernorm.weight"],
             "gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
             "down.weight": ["mlp.down_proj.weight"]}
    if config.qkv_bias:
        block["qkv.bias"] = [f"self_attn.{x}_proj.bias" for x in "qkv"]
    if config.qk_norm:
        block |= {"q_norm": ["self_attn.q_norm.weight"], "k_norm": ["self_attn.k_norm.weight"]}
    names = {f"blocks.{i}.{ours}": {f"model.layers.{i}.{part}": rows.get(part.split(".")[-2])
                                    for part in parts}
             for i in range(config.num_hidden_layers) for ours, parts in block.items()}
    names["embed.weight"] = {"model.embed_tokens.weight": None}
    names["norm"] = {"model.norm.weight": None}
    if config.score_head:
        names["score_head.weight"] = {"score.weight": None}
    elif not config.tie_word_embeddings:
        names["lm_head.weight"] = {"lm_head.weight": None}
    return names
