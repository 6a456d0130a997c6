"""The player: parity with transformers, sampling, scoring, load and save."""
import json
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, copy_tokenizer, random_llama, small_config
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as llama
from model import Packed, config_from_json, generate, groups, load, logprobs, pack, save
from support import text
from support.console import UserError

PROMPTS = [[1, 7, 9, 11], [1, 30], [1, 4, 4, 8, 20, 41, 5]]
COMPLETIONS = [[[5, 6, 2], [9, 2]], [[2], [13, 14, 15, 16]], [[8, 3, 2]]]


# --------------------------------------------------------------------------------------------------
# Parity with transformers

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


@pytest.mark.parametrize("changes", [
    pytest.param({}, id="untied"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"num_key_value_heads": 4}, id="ungrouped"),
    pytest.param({"num_key_value_heads": 1}, id="one kv head"),
    pytest.param({"head_dim": 16}, id="wide heads"),
    pytest.param({"rope_scaling": dict(LLAMA3), "rope_theta": 500000.0}, id="llama3 rope"),
    pytest.param({"model_type": "mistral", "sliding_window": 48}, id="mistral"),
    pytest.param({"model_type": "mistral", "sliding_window": None}, id="mistral without window"),
    pytest.param({"model_type": "qwen2", "tie_word_embeddings": True}, id="qwen2"),
    pytest.param({"model_type": "qwen3", "head_dim": 16}, id="qwen3"),
])
def test_parity_with_transformers(tmp_path, transformers, changes):
    """Logits agree within 1e-4, and greedy ids are equal, also in a batch of unequal prompts.

    transformers opens the folder that we save, and finds the same bits in it.
    """
    torch.manual_seed(1)
    settings = small_config(**changes, initializer_range=0.3)
    settings.pop("architectures")
    config = transformers.AutoConfig.for_model(**settings)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases start at 0 and norms at 1: an error in them would not be seen
        for p in peer.parameters():
            p += 0.2 * torch.randn_like(p) * (p.dim() == 1)
    peer.save_pretrained(tmp_path / "peer")
    copy_tokenizer(tmp_path / "peer")
    with pytest.MonkeyPatch.context() as patch:  # it has 50 ids, fewer than the borrowed tokenizer
        patch.setattr(text.Tokenizer, "beyond", lambda self, vocabulary: [])
        ours, _ = load(tmp_path / "peer")
    ids = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours.logits(ids) - peer(ids).logits).abs().max() < 1e-4
        out = generate(ours, PROMPTS, max_new_tokens=12, temperature=0, end_ids={2})
        for prompt, row in zip(PROMPTS, out.ids):
            theirs = peer.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=12, do_sample=False)
            assert row == theirs[0, len(prompt):].tolist()
    save(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for name, value in peer.state_dict().items():
        assert torch.equal(value, again[name])


@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("tokens, masked", [(1, True), (1, False), (5, True), (5, False)])
def test_both_ways_to_attend_are_the_formula(heads, shared, tokens, masked):
    """softmax(q k^T / sqrt(C)) v, also by the way for GPUs, which no GPU has run yet."""
    torch.manual_seed(heads + tokens)
    B, C, S = 2, 8, 7 if masked or tokens == 1 else tokens
    q, k, v = torch.randn(B, heads, tokens, C), *torch.randn(2, B, shared, S, C)
    mask = torch.rand(B, 1, tokens, S) < 0.5 if masked else None
    may_look = mask if masked else torch.ones(tokens, S, dtype=torch.bool).tril(S - tokens)
    if masked:
        mask[..., 0] = True  # each token looks at something
    whose = [h * shared // heads for h in range(heads)]  # the keys and values of each query head
    scores = (q @ k[:, whose].transpose(2, 3)) / C**0.5
    expected = scores.masked_fill(~may_look, -torch.inf).softmax(-1) @ v[:, whose]
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if masked else None
    for way in (llama.attend, llama.attend_fused):
        torch.testing.assert_close(way(q, k, v, added), expected, rtol=1e-5, atol=1e-5)


def test_a_mask_is_made_once_and_as_a_gpus_kernel_wants_it(small, monkeypatch):
    """All layers get the same tensor, and its rows begin at multiples of 8: no layer copies it."""
    seen, real = [], llama.attend
    monkeypatch.setattr(llama, "attend", lambda q, k, v, mask: (seen.append(mask), real(
        q, k, v, mask))[1])
    packed = pack([[1, 2, 3], [4, 5]], [[[6, 7], [8, 9, 10]], [[11, 12]]])[0]
    logprobs(small, packed)
    assert seen[0] is seen[1] and seen[0].shape[2:] == 2 * packed.ids.shape[1:] and len(seen) == 2
    assert packed.ids.shape[1] % 8 and seen[0].stride(2) % 8 == 0 and seen[0].stride(3) == 1


def test_on_a_gpu_keys_and_values_are_not_shared_where_there_is_a_mask(monkeypatch):
    """The kernels for CUDA do not take both: no call may ask for it, nor for the math kernel."""
    calls = []

    def kernel(q, k, v, mask=None, is_causal=False, enable_gqa=False):
        calls.append((q.shape[1] == k.shape[1], enable_gqa, is_causal and mask is not None))
        return q
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    for tokens in (1, 3):
        for mask in (None, torch.ones(1, 1, tokens, 3, dtype=torch.bool)):
            y = llama.attend_fused(torch.randn(1, 4, tokens, 8), *torch.randn(2, 1, 2, 3, 8), mask)
            assert y.shape == (1, 4, tokens, 8)
    assert calls == 4 * [(True, False, False)]


def test_llama3_rope_slows_long_waves_only():
    scaled = config_from_json(
        small_config(rope_scaling=LLAMA3, rope_theta=10000.0, head_dim=16))
    plain = config_from_json(small_config(head_dim=16))

    def angles(config):
        cos, sin = llama.rope_table(config)
        return torch.atan2(sin[1], cos[1])
    angle, plain_angle = angles(scaled), angles(plain)
    assert torch.isclose(angle[-1], plain_angle[-1] / 8)
    assert not torch.isclose(angle[0], plain_angle[0] / 8)


# --------------------------------------------------------------------------------------------------
# Settings

@pytest.mark.parametrize("family, changes, expected", [
    ("llama", {}, {}),
    ("llama", {"rope_scaling": LLAMA3},
     {"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_type"}}),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, {"score_head": True}),
    ("mistral", {"sliding_window": 16}, {"sliding_window": 16}),
    ("mistral", {"sliding_window": None}, {}),
    ("qwen2", {"sliding_window": 16}, {"qkv_bias": True}),  # its window is off unless asked for
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, {"qkv_bias": True}),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
     {"qkv_bias": True, "sliding_window": 16}),
    ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "head_dim": 8,
               "layer_types": ["full_attention", "sliding_attention"]},
     {"qk_norm": True, "sliding_window": 16}),
    ("llama", {"sliding_window": 16}, {}),
    ("mistral", {"sliding_window": 16, "use_sliding_window": False}, {"sliding_window": 16}),
    # What transformers takes where a key is absent.
    ("mistral", {"sliding_window": ..., "max_position_embeddings": ..., "num_key_value_heads": ...,
                 "num_attention_heads": 8},
     {"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8,
      "num_attention_heads": 8}),
    ("qwen3", {"head_dim": ...}, {"qk_norm": True, "head_dim": 128}),
    ("qwen2", {"attention_bias": True, "hidden_act": "swish", "pretraining_tp": 2},
     {"qkv_bias": True}),
    ("qwen3", {"head_dim": 16}, {"qk_norm": True, "head_dim": 16}),
])
def test_settings_of_each_family(family, changes, expected):
    """A family differs from Llama in what `expected` names, and in nothing else."""
    raw = small_config(model_type=family, **changes)
    config = config_from_json({key: value for key, value in raw.items() if value is not ...})
    assert vars(config) == vars(config_from_json(small_config())) | expected
    assert config.context == expected.get("sliding_window", 64)


def test_settings_that_config_json_leaves_out():
    """transformers' defaults stand in for them."""
    left_out = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
                "rope_theta", "tie_word_embeddings", "architectures")
    raw = small_config()
    config = config_from_json({key: raw[key] for key in raw if key not in left_out})
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)  # one a head; 32 / 4
    assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)
    assert (config.rope_theta, config.tie_word_embeddings) == (10000.0, False)
    assert not config.score_head


def test_both_ways_to_write_the_rotary_settings():
    """Newer files keep base and scaling in one object, older files apart."""
    older = small_config(rope_scaling=LLAMA3, rope_theta=500000.0)
    newer = small_config(rope_parameters=LLAMA3 | {"rope_theta": 500000.0})
    del newer["rope_theta"]
    assert config_from_json(newer) == config_from_json(older)
    assert config_from_json(older).rope_theta == 500000.0


@pytest.mark.parametrize("name, parameters", [
    ("Llama-3.2-1B-Instruct", 1_235_814_400),
    ("Llama-3.2-3B", 3_212_749_824),
    ("Mistral-7B-v0.1", 7_241_732_096),
    ("TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
])
def test_published_models_have_their_published_size(name, parameters, tmp_path):
    path = SHARED / "configs" / f"{name}.json"
    if not path.is_file():
        pytest.skip("the published settings are not at hand (../shared/data)")
    shutil.copy(path, tmp_path / "config.json")
    assert llama.read_config(tmp_path)[1] == parameters


def test_a_text_longer_than_the_sliding_window_is_refused():
    model = random_llama(model_type="mistral", sliding_window=16)
    with pytest.raises(UserError, match="context of 16 .its sliding window"):
        model(torch.ones(1, 17, dtype=torch.long))


# --------------------------------------------------------------------------------------------------
# Sampling

def plain_logprobs(model, prompt, completion, temperature=1.0):
    """The formula itself: log softmax at position t - 1, read at token t."""
    ids = torch.tensor([prompt + completion])
    lp = F.log_softmax(model.logits(ids).float() / temperature, dim=-1)[0]
    return torch.stack([lp[len(prompt) + t - 1, token] for t, token in enumerate(completion)])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_recomputed_ones(small, temperature):
    """Trap 3: the sampler and the trainer must use the same distribution.

    This also shows that rows which are finished and leave the batch do not change the others.
    """
    out = generate(small, PROMPTS, 16, 20, temperature, seeded(0))
    assert len({len(r) for r in out.ids}) > 3  # many lengths: rows did leave
    for i, (ids, lp) in enumerate(zip(out.ids, out.logprobs)):
        plain = plain_logprobs(small, PROMPTS[i // 16], ids, temperature)
        assert torch.allclose(lp, plain, atol=1e-4)
    packs = pack(PROMPTS, groups(out.ids, 16))
    flat = torch.cat(out.logprobs)
    start = torch.tensor([0] + [len(r) for r in out.ids]).cumsum(0)
    for packed in packs:
        lp = logprobs(small, packed, temperature)
        for o in packed.owner.unique():
            sampled = flat[start[o]:start[o + 1]]
            assert torch.allclose(lp[packed.owner == o], sampled, atol=1e-4)


def test_generate_ends_and_flags(small):
    out = generate(small, PROMPTS, 8, 10, generator=seeded(1))
    for ids, finished in zip(out.ids, out.finished):
        assert finished == (ids[-1] == 2)
        assert 2 not in ids[:-1]
        assert finished or len(ids) == 10
    out = generate(small, [[1]], 64, 10, generator=seeded(1), end_ids={2, 7, 9})
    last = {ids[-1] for ids, finished in zip(out.ids, out.finished) if finished}
    assert last == {2, 7, 9}  # any of the end tokens ends an answer


def test_a_long_prompt_that_ended_cannot_stop_the_others(small):
    """A finished row may wait in the batch until it is longer than the model's context.

    That must not stop the rows that are not finished.
    """
    long = [1] * 60
    end = generate(small, [long], max_new_tokens=1, temperature=0).ids[0][0]
    prompts = [long, [1, 5], [1, 6], [1, 7], [1, 8]]
    out = generate(small, prompts, max_new_tokens=20, temperature=0, end_ids={end})
    assert out.finished[0] and len(out.ids[0]) == 1


def test_sampling_follows_the_distribution(small):
    out = generate(small, [[1, 7]], 4000, 1, generator=seeded(0))
    share = torch.bincount(torch.tensor([r[0] for r in out.ids]), minlength=50) / 4000
    with torch.no_grad():
        p = small.logits(torch.tensor([[1, 7]]))[0, -1].softmax(-1)
    assert (share - p).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_generate_is_reproducible_and_left_padding_changes_nothing(small):
    a, b = (generate(small, PROMPTS, 2, 8, generator=seeded(3)).ids for _ in range(2))
    assert a == b
    alone = [generate(small, [p], max_new_tokens=8, temperature=0).ids[0] for p in PROMPTS]
    together = generate(small, PROMPTS, max_new_tokens=8, temperature=0).ids
    assert together == alone


def test_greedy_logprobs_are_those_of_temperature_1(small):
    out = generate(small, PROMPTS, max_new_tokens=6, temperature=0)
    for prompt, ids, lp in zip(PROMPTS, out.ids, out.logprobs):
        assert torch.allclose(lp, plain_logprobs(small, prompt, ids), atol=1e-4)
        logits = small.logits(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1]
        assert ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("end, third", [
    (40, [[8], [12], [8]]),  # no completion ends: 3 nodes
    (12, [[8], [8]]),  # completion 1 samples the end token and leaves: 2 nodes
])
def test_a_node_splits_where_completions_differ(small, monkeypatch, end, third):
    """The example of generate's docstring: completions sample a a b a, and then c d c c.

    The forward batch holds each different text once: first one row, then two, then three.
    """
    a, b, c, d = 5, 9, 8, 12
    sampled, batches, forward = [[a, a, b, a], [c, d, c, c], [7, 7, 7, 7]], [], small.forward

    def draw(p, row, generator):
        return torch.tensor(sampled.pop(0)[:len(row)])

    def noted(ids, *more):
        batches.append(ids.tolist())
        return forward(ids, *more)
    monkeypatch.setattr(llama, "draw", draw)
    monkeypatch.setattr(small, "forward", noted)
    out = generate(small, [[1, 7]], group=4, max_new_tokens=3, end_ids={end})
    assert batches == [[[1, 7]], [[a], [b]], third]
    assert out.ids == [[a, c, 7], [a, d, 7][:2 if end == d else 3], [b, c, 7], [a, c, 7]]
    assert out.finished == [False, end == d, False, False]
    monkeypatch.undo()
    for ids, lp in zip(out.ids, out.logprobs):
        assert torch.allclose(lp, plain_logprobs(small, [1, 7], ids), atol=1e-4)


def test_a_token_is_drawn_by_where_a_number_falls(monkeypatch):
    """p = 1/4, 0, 1/2, 1/4: up to 1/4 it is token 0, up to 3/4 token 2, then 3; never token 1."""
    numbers = torch.tensor([0, 0.24, 0.25, 0.74, 0.75, 1 - 2**-24])[:, None]  # the last: largest
    monkeypatch.setattr(torch, "rand", lambda *shape, **more: numbers)
    p = torch.tensor([[0, 0.0, 0.0, 1.0], [0.25, 0.0, 0.5, 0.25], [0.0, 1, 0, 0]])
    assert llama.draw(p, torch.tensor([1] * 6)).tolist() == [0, 0, 2, 2, 3, 3]
    assert llama.draw(p, torch.tensor([0, 2, 0, 2, 0, 2])).tolist() == [3, 1, 3, 1, 3, 1]


def test_draws_are_as_frequent_as_they_are_probable():
    p = torch.tensor([[0.7, 0.0, 0.2, 0.1], [0.0, 0.5, 0.0, 0.5]])
    row = torch.tensor([0, 1]).repeat_interleave(100_000)
    drawn = llama.draw(p, row, seeded(0)).view(2, -1)
    for mine, probable in zip(drawn, p):
        counts = mine.bincount(minlength=4)
        assert counts[probable == 0].sum() == 0
        # Five standard deviations of a share of 100,000 draws are at most 0.008.
        assert (counts / 100_000 - probable).abs().max() < 0.008


def test_no_draw_is_beyond_the_vocabulary_however_the_sum_is_rounded(monkeypatch):
    """The largest number that torch.rand gives, on 1,000 distributions of 999 words."""
    monkeypatch.setattr(torch, "rand", lambda n, *rest, **more: torch.full((n, 1), 1 - 2**-24))
    p = (3 * torch.randn(1000, 999, generator=seeded(0))).softmax(-1)
    drawn, total = llama.draw(p, torch.arange(1000)), p.cumsum(-1)[:, -1]
    assert (total > 1).any() and (total < 1).any()
    assert drawn.max() < 999


def test_sampling_reads_nothing_that_was_never_written(small, monkeypatch):
    """Memory that was never written may hold NaN. Rows of the cache are copied with it."""
    def sample():
        return generate(small, PROMPTS, 4, 12, generator=seeded(4), end_ids={3, 4})
    plain, new_empty = sample(), torch.Tensor.new_empty

    def nan(*args, **kwargs):
        return new_empty(*args, **kwargs).fill_(float("nan"))
    monkeypatch.setattr(torch.Tensor, "new_empty", nan)
    out = sample()
    assert out.ids == plain.ids
    assert all(map(torch.equal, out.logprobs, plain.logprobs))


def test_too_long_a_text_is_refused(small):
    with pytest.raises(UserError, match="longer than the model's context of 64"):
        generate(small, [[1] * 60], max_new_tokens=20, end_ids=set())
    # 60 tokens of the prompt and 5 new ones: the last is never read.
    assert len(generate(small, [[1] * 60], max_new_tokens=5, end_ids=set()).ids[0]) == 5


def test_nothing_to_sample_from_or_to_score_is_refused(small):
    with pytest.raises(UserError, match="sample from an empty prompt"):
        generate(small, [[1], []])
    for prompts, completions in (([[]], [[[5]]]), ([[1]], [[[5], []]])):
        with pytest.raises(UserError, match="score an empty prompt or completion"):
            pack(prompts, completions)


def test_many_prompts_are_sampled_some_at_a_time(small, monkeypatch):
    """In the order of the prompts, with as many in a batch as ROOM allows."""
    prompts = [[1] * n for n in (5, 2, 9, 3, 7)]
    alone = [generate(small, [p], max_new_tokens=6, temperature=0).ids[0] for p in prompts]
    sizes, real = [], llama.generate

    def counted(model, prompts, *rest):
        sizes.append(len(prompts))
        return real(model, prompts, *rest)
    monkeypatch.setattr(llama, "generate", counted)
    monkeypatch.setattr(llama, "ROOM", 2 * 2 * (9 + 6))  # two prompts of two completions
    assert llama.sample_all(small, prompts, 2, 6, 0) == [[ids, ids] for ids in alone]
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(llama, "ROOM", 1)  # at least one prompt at a time
    assert llama.sample_all(small, prompts, 1, 6, 0) == [[ids] for ids in alone]


# --------------------------------------------------------------------------------------------------
# Scoring

# The mask of Packed's example, as its docstring draws it: what each token may look at.
DRAWN = """
    p q a b c d
p   x
q   x x
a   x x x
b   x x x x
c   x x x   x
d   x x       x
"""


def test_a_row_is_packed_as_its_docstring_draws_it(small):
    """Prompt p q, completions a b e, a c e and d e, where e is the end token."""
    p, q, a, b, c, d, e = 11, 12, 13, 14, 15, 16, 2
    packed, = pack([[p, q]], [[[a, b, e], [a, c, e], [d, e]]])
    assert [field.tolist() for field in packed] == [
        [[p, q, a, b, c, d]], [[0, 1, 2, 3, 3, 2]], [[5, 5, 4, 3, 4, 5]],
        [1, 2, 3, 1, 2, 4, 1, 5], [a, b, e, a, c, e, d, e], [0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 2]]
    mixed, = pack([(p, q)], [[(d, e), [a, c, e], (a, b, e)]])  # any order, lists and tuples
    assert all(map(torch.equal, packed[:3], mixed[:3]))
    lines = DRAWN.strip("\n").splitlines()
    assert all(f"{line.strip()}\n" in Packed.__doc__ for line in lines)
    drawn = [[line[i:i + 1] == "x" for i in range(4, 15, 2)] for line in lines[1:]]

    def model(ids, positions, mask):
        assert mask.shape == (1, 1, 6, 6) and mask[0, 0].tolist() == drawn
        return ids[:, :, None].float()  # the state of a position is its id, to see what is read
    assert llama.states(model, packed)[:, 0].tolist() == [q, a, b, q, a, c, q, d]


def test_a_tree_has_each_beginning_once_and_shows_each_token_its_own_text():
    """Random groups: rows have as many tokens as there are different beginnings.

    And what a token may look at, read in order, is a prompt and the beginning of its completion.
    """
    rng = random.Random(0)
    for _ in range(50):
        prompts = [[rng.randrange(3, 9) for _ in range(rng.randint(1, 4))] for _ in range(3)]
        answers = [[[rng.randrange(3) for _ in range(rng.randint(1, 6))]
                    for _ in range(rng.randint(1, 8))] for _ in prompts]
        flat = [(prompt, ids) for prompt, group in zip(prompts, answers) for ids in group]
        found, tokens = {}, 0
        for packed in pack(prompts, answers, tokens=200):
            T, last = packed.ids.shape[1], packed.last.flatten().tolist()
            ids = packed.ids.flatten().tolist()
            tokens += sum(x < T for x in last)  # padding has T
            for source, target, owner in zip(*(x.tolist() for x in packed[3:6])):
                first, place = source // T * T, source % T
                seen = [ids[first + j] for j in range(place + 1) if last[first + j] >= place]
                found.setdefault(owner, []).append((seen, target))
        for m, (prompt, answer) in enumerate(flat):
            assert found[m] == [(prompt + answer[:t], answer[t]) for t in range(len(answer))]
        assert tokens == sum(map(len, prompts)) + sum(
            len({tuple(ids[:t]) for ids in group for t in range(1, len(ids))}) for group in answers)


def gather(model, packs, temperature=1.0):
    """Log-probabilities, summed over each completion: [M]."""
    M = 1 + max(int(p.owner.max()) for p in packs)
    total = torch.zeros(M)
    for packed in packs:
        total = total.index_add(0, packed.owner, logprobs(model, packed, temperature))
    return total


def test_logprobs_are_shifted_and_share_the_prompt(small):
    """Trap 5: the logits of position t are scored against token t + 1.

    A group shares its prompt, and still gives what the plain formula gives.
    """
    flat = [(p, c) for p, group in zip(PROMPTS, COMPLETIONS) for c in group]
    plain = torch.stack([plain_logprobs(small, p, c).sum() for p, c in flat])
    assert torch.allclose(gather(small, pack(PROMPTS, COMPLETIONS)), plain, atol=1e-5)


def test_logprobs_do_not_depend_on_padding_order_or_split(small):
    """Traps 1 and 4: the loss sees the completions' tokens only, wherever they were packed."""
    whole = gather(small, pack(PROMPTS, COMPLETIONS))
    split = pack(PROMPTS, COMPLETIONS, tokens=8)
    assert len(split) > 2
    assert all(p.ids.numel() <= 8 or len(p.ids) == 1 for p in split)
    assert torch.allclose(gather(small, split), whole, atol=1e-5)
    order = [2, 0, 1]
    turned = gather(small, pack([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order]))
    assert torch.allclose(turned[[1, 2, 3, 4, 0]], whole, atol=1e-5)
    tokens = sum(len(c) for group in COMPLETIONS for c in group)
    assert sum(len(p.target) for p in split) == tokens


def test_end_token_gets_gradient(small):
    """Traps 1 and 2: the end token (2) is trained.

    This also holds where it stands inside a prompt, and where padding has the same id.
    """
    for prompts, completions in (
        ([[1, 7]], [[[5, 2]]]),
        ([[1, 2, 7, 2]], [[[5, 2], [2]]]),
    ):
        packed = pack(prompts, completions)[0]
        assert (packed.target == 2).sum() == sum(c.count(2) for c in completions[0])
        lp = logprobs(small, packed)
        small.zero_grad()
        lp[packed.target == 2].sum().backward()
        assert small.head.grad[2].abs().max() > 1e-3


def test_token_logprobs_gradient_is_the_plain_formulas():
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64)
    head = torch.randn(11, 5, dtype=torch.float64)
    target = torch.randint(0, 11, (7,))
    weight = torch.randn(7)
    for chunk in (1, 3, 100):
        a, b = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        (llama.TokenLogprobs.apply(a, b, target, 0.7, chunk) * weight).sum().backward()
        c, d = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        lp = F.log_softmax(c @ d.T / 0.7, dim=-1).gather(1, target[:, None])[:, 0]
        (lp * weight).sum().backward()
        assert torch.allclose(a.grad, c.grad, atol=1e-5)
        assert torch.allclose(b.grad, d.grad, atol=1e-5)


def test_no_vocabulary_sized_tensor_beyond_a_chunk():
    """64 tokens go forward and backward in chunks of 8. No tensor of size 64 x V is ever made."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and 1000 in out.shape:
                largest.append(out.numel() // 1000)
            return out

    hidden = torch.randn(64, 4, requires_grad=True)
    head = torch.randn(1000, 4, requires_grad=True)
    with Watch():
        llama.TokenLogprobs.apply(hidden, head, torch.arange(64), 1.0, 8).sum().backward()
    assert max(largest) == 8


def test_a_group_can_be_kept_whole():
    """For a loss that needs all of a group at once, its row may be longer than a micro-batch."""
    completions = [[[5] * 9, [6] * 9, [7] * 9], [[8] * 3]]
    split = pack([[1], [1]], completions, tokens=16)
    assert len({i for i, packed in enumerate(split) if {0, 1, 2} & {*packed.owner.tolist()}}) > 1
    whole = pack([[1], [1]], completions, tokens=16, whole=True)
    owners = [sorted({*packed.owner.tolist()}) for packed in whole]
    assert sorted(owners) == [[0, 1, 2], [3]]


def test_recomputing_activations_changes_no_gradient(small):
    """It keeps each layer's input for the backward pass, and hardly anything else."""
    weights = {p.data_ptr() for p in small.parameters()}

    def gradients(recompute):
        small.recompute, kept = recompute, {}
        small.zero_grad()

        def keep(tensor):
            if tensor.data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        for packed in pack(PROMPTS, COMPLETIONS):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                total = logprobs(small, packed).sum()
            total.backward()
        return [p.grad.clone() for p in small.parameters()], sum(kept.values())
    (plain, much), (again, little) = gradients(False), gradients(True)
    for a, b in zip(plain, again):
        assert torch.allclose(a, b, atol=1e-6)
    assert little < much / 2


def test_gradients_have_the_same_bits_every_time(tiny):
    """A run with the same seed is the same run, also on several threads.

    On a machine with one core this test cannot fail.
    """
    model, tokenizer = tiny
    prompt = tokenizer.chat([{"role": "user", "content": "Add 1 and 2."}])
    # The gradients of the first tokens of all completions meet in one hidden state.
    completions = [[20 + i % 90] for i in range(1000)]
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            weight = model.blocks[0].qkv.weight
            packs = pack([prompt], [completions], whole=True)
            total = sum((logprobs(model, packed) ** 2).sum() for packed in packs)
            found.append(torch.autograd.grad(total, weight)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(g, found[0]) for g in found)


# --------------------------------------------------------------------------------------------------
# Files

def test_save_and_load_are_bitwise(tmp_path, tiny):
    model, _ = tiny
    save(model, tmp_path / "again")
    again, _ = load(tmp_path / "again")
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert again.end_ids == model.end_ids
    assert again.raw == model.raw | {"torch_dtype": "float32"}


def test_a_head_beside_the_tie_is_used_and_kept(tmp_path, folder, tiny):
    """config.json says tied, the file holds another output matrix: transformers uses that one."""
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"] = -weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    model, _ = load(folder)
    ids = torch.tensor([[2, 5, 20]])
    assert torch.allclose(model.logits(ids), -tiny[0].logits(ids), atol=1e-5)
    save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] \
        is False
    assert torch.equal(load(tmp_path / "saved")[0].head, head)
    # The embedding itself is no other head.
    save_file(weights | {"lm_head.weight": -head}, folder / "model.safetensors")
    assert load(folder)[0].lm_head is None
    # A head of another shape is an error, not left out.
    save_file(weights | {"lm_head.weight": head[:9].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is \[9, 128\]"):
        load(folder)


def test_the_date_of_the_prompts_is_the_callers(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%d') }}" + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer = load(folder, date="2024-07-26T10:00:00")
    assert tokenizer.date == "2024-07-26T10:00:00"
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": ""}])) == "26"


def ends(folder):
    """eos_token_id of a folder's generation_config.json."""
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_the_templates_end_token_is_one_of_the_models(tmp_path, folder, capsys):
    """It is said once: what is saved names them all, and the other settings are kept."""
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 1}))
    model, _ = load(folder)
    assert model.end_ids == {1, 3}
    assert "ends an answer with <|end|>, which generation" in capsys.readouterr().err
    save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == settings | {
        "eos_token_id": [1, 3]}
    again, _ = load(tmp_path / "saved")
    assert again.end_ids == {1, 3} and capsys.readouterr().err == ""
    save(again, tmp_path / "saved")  # a folder may be its own source
    assert ends(tmp_path / "saved") == [1, 3]
    # No file but config.json names an end: one is written only where it would say more.
    for eos, written in ((3, False), (1, True)):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": eos}))
        (folder / "generation_config.json").unlink(missing_ok=True)
        save(load(folder)[0], tmp_path / str(eos))
        assert (tmp_path / str(eos) / "generation_config.json").exists() == written
    assert ends(tmp_path / "1") == [1, 3]


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_saved_model_names_its_own_dtype(tmp_path, key):
    """Processes that share a model keep float32 weights, and save what it computes in."""
    model = random_llama(vocab_size=200, **{key: "float16"})
    model.saved_in = torch.bfloat16
    save(model, tmp_path / "half")
    half, _ = load(tmp_path / "half", dtype=torch.bfloat16)
    assert half.raw[key] == half.raw["torch_dtype"] == "bfloat16"
    for a, b in zip(model.parameters(), half.parameters()):
        assert torch.equal(a.bfloat16(), b)
    from_file = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in from_file.values()} == {torch.bfloat16}


def test_settings_can_be_read_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    count = sum(p.numel() for p in random_llama().parameters())
    assert llama.read_config(tmp_path) == (config_from_json(small_config()), count)
    with pytest.raises(UserError, match="no such model folder"):
        llama.read_config(tmp_path / "missing")


# --------------------------------------------------------------------------------------------------
# The committed model

def test_golden_text(tiny):
    """The embedded default's greedy answers, letter by letter.

    This is the cheapest strong test of everything in this file.
    """
    model, tokenizer = tiny
    queries = json.loads((ROOT / "tests" / "golden.json").read_text())
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in queries]
    out = generate(model, prompts, max_new_tokens=32, temperature=0)
    answers = {query: tokenizer.decode(ids) for query, ids in zip(queries, out.ids)}
    assert answers == queries
