"""LoRA: adapters, what is frozen, and the folders that peft reads and writes."""
import json

import pytest
import torch
from conftest import HALF, ROOT, command, random_llama, read_lines
from safetensors.torch import load_file, save_file

import model as llama
import selfplay
import spin
from support import learning, machine
from support.console import UserError

IDS = torch.tensor([[5, 17, 30, 8, 21, 44, 9]])
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model, rank=3, alpha=6.0, targets=TARGETS, seed=0):
    """The model, with adapters that already changed it, and the one with its adapters off."""
    off = llama.adapt(model, rank, alpha, targets, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in llama.linear_layers(model).values():
            for B in layer.B.values():
                B.normal_(std=0.1)
    return model, off


def test_an_adapted_layer_is_its_formula(small):
    """y = x W^T + alpha/r (x A^T) B^T, part by part: LoRA eq. 3."""
    model, _ = adapted(small, targets=("q_proj", "v_proj"))
    layer, x = model.blocks[0].qkv, torch.randn(2, 32)  # q 32, k 16, v 16 rows
    plain = x @ layer.weight.T
    for name, rows in (("q_proj", slice(0, 32)), ("v_proj", slice(48, 64))):
        plain[:, rows] += 2.0 * (x @ layer.A[name].T) @ layer.B[name].T
    torch.testing.assert_close(layer(x), plain)
    assert list(layer.A) == ["q_proj", "v_proj"] and not model.blocks[0].down.A


def test_a_new_adapter_changes_nothing_and_only_it_learns(small):
    """B is 0 at first. The frozen weights have no gradient; the model without it shares them."""
    before = small.logits(IDS).detach()
    off = llama.adapt(small, 4)
    assert torch.equal(small.logits(IDS), before)
    optimizer = learning.optimizer_for(small, torch.optim.SGD, lr=0.5)
    frozen = {name: p.clone() for name, p in off.named_parameters()}
    for _ in range(2):  # at first only B has a gradient, as A is multiplied by B = 0
        llama.logprobs(small, *llama.pack([[3, 4, 5]], [[[6, 7], [8]]])).sum().backward()
        learning.take(optimizer)
    assert not torch.equal(small.logits(IDS), before) and torch.equal(off.logits(IDS), before)
    own = dict(small.named_parameters())
    for name, p in off.named_parameters():
        assert torch.equal(p, frozen[name]) and p is own[name] and not p.requires_grad
    moved = [name for name, p in own.items() if p.requires_grad]
    assert len(learning.weights_of(optimizer)) == len(moved) == 2 * 7 * 2
    assert sum(own[name].numel() for name in moved) == small.config.adapter_size(4, TARGETS)


def test_the_size_of_adapters_by_hand():
    """Width 32, 4 heads of 8, 2 shared, feed-forward 48, 2 layers, rank 3."""
    config = random_llama().config
    assert config.adapter_size(3, ("q_proj", "k_proj")) == 2 * 3 * (32 + 32 + 32 + 16)
    assert config.adapter_size(3, TARGETS) == 2 * 3 * (64 + 48 + 48 + 64 + 3 * 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_the_merged_model_and_its_adapter(tmp_path, dtype):
    """Both folders open here, and give the logits of the model that was saved."""
    model, off = adapted(llama.load(ROOT / "tiny", dtype=dtype)[0])
    llama.save(model, tmp_path / "merged")
    merged, _ = llama.load(tmp_path / "merged", dtype=dtype)
    other, _ = llama.load(tmp_path / "merged" / "adapter", dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(merged.logits(IDS), model.logits(IDS), **close)
    assert torch.equal(other.logits(IDS), merged.logits(IDS))
    assert (merged.logits(IDS) - off.logits(IDS)).abs().max() > 1
    assert not any(".A." in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "up_proj")])
def test_peft_opens_our_adapter(tmp_path, transformers, targets):
    """It sees q_proj, k_proj, .. and computes the same logits."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, _ = adapted(llama.load(ROOT / "tiny")[0], targets=targets)
    llama.save(model, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model.logits(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["k_proj"]}])
def test_pefts_adapter_opens_here(tmp_path, transformers, settings):
    """Its folder is a model's name: it stands for its base with the adapter merged in."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    settings = {"target_modules": "all-linear", "r": 3, "lora_alpha": 5} | settings
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    model, _ = llama.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder_of_an_adapter(tmp_path):
    """An adapter of the committed model, to be spoiled."""
    model, _ = adapted(llama.load(ROOT / "tiny")[0])
    llama.save(model, tmp_path / "model")
    return tmp_path / "model" / "adapter"


def with_config(folder, **changes):
    """Change an adapter's settings."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_tensors(folder, change):
    """Change an adapter's tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize("spoil, words", [
    (lambda f: with_config(f, use_dora=True), "use_dora = True is not supported"),
    (lambda f: with_config(f, modules_to_save=["score"]), "modules_to_save"),
    (lambda f: with_config(f, rank_pattern={"q_proj": 4}), "rank_pattern"),
    (lambda f: with_config(f, r="three"), "r and lora_alpha"),
    (lambda f: with_config(f, r=4), "no part of an adapter of rank 4"),
    (lambda f: with_config(f, base_model_name_or_path=None), "names no model"),
    (lambda f: with_config(f, base_model_name_or_path="nowhere"), "nowhere: no such model folder"),
    (lambda f: with_config(f, base_model_name_or_path=str(f)), "names no model"),
    (lambda f: with_tensors(f, lambda t: t.pop(FIRST.format("A"))), "has not both of A and B"),
    (lambda f: with_tensors(f, lambda t: t.update(extra=torch.zeros(2, 2))), "extra [2, 2]"),
    (lambda f: with_tensors(f, lambda t: t.update({FIRST.format("A"): torch.zeros(3, 64)})),
     "q_proj has (inputs, rows) (64, 128); in"),
    (lambda f: with_tensors(f, lambda t: t.update({
        FIRST.format(x).replace(".0.", ".9."): t[FIRST.format(x)].clone() for x in "AB"})),
     "no such layer"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "missing, cut short"),
])
def test_an_adapter_that_does_not_fit_is_one_line(folder_of_an_adapter, spoil, words):
    """Of another base, of another kind, or damaged."""
    spoil(folder_of_an_adapter)
    with pytest.raises(UserError) as error:
        llama.load(folder_of_an_adapter)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flags, words", [
    (("--lora", "129"), "--lora 129 is above the model's width of 128"),
    (("--lora-alpha", "8"), "name its rank"),
    (("--lora-targets", "q_proj"), "name its rank"),
    (("--lora", "2", "--model", "adapter"), "which is an adapter itself"),
])
@pytest.mark.parametrize("game", [selfplay, spin])
def test_settings_that_make_no_adapter_are_refused(tmp_path, game, flags, words):
    """Before anything is written."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(ROOT / "tiny")}))
    done = command(game, tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_weights_without_a_gradient_are_not_averaged():
    """In SPIN that is a batch in which no pair differs. (No process group is there to ask.)"""
    machine.average([torch.nn.Parameter(torch.zeros(2))], machine.Crew(0, 2))


def test_a_reward_model_gets_no_adapter():
    """It gives no answers."""
    raw = {"architectures": ["LlamaForSequenceClassification"]}
    with pytest.raises(UserError, match="reward model"):
        llama.adapt(random_llama(**raw), 2)


COMMON = ("--model", str(HALF), "--answer-tokens", "12", "--eval-items", "2")
SMALL = {selfplay: (*COMMON, "--steps", "4", "--queries", "2", "--answers", "3",
                    "--query-tokens", "24"),
         spin: (*COMMON, "--iterations", "2", "--pairs", "24", "--batch", "8")}


@pytest.mark.parametrize("game, dtype", [(selfplay, "float32"), (spin, "bfloat16")])
def test_a_run_with_lora_learns_and_goes_on_to_the_same_bits(tmp_path, monkeypatch, game, dtype):
    """The checkpoint holds the adapters alone; the saved model is the base with them."""
    flags = ("--lora", "2", "--dtype", dtype, "--save-every", "2", *SMALL[game])
    whole = command(game, tmp_path, *flags, "--run", "whole")
    assert whole.returncode == 0, whole.stderr
    real, calls = learning.take, []

    def take(optimizer, **crew):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(optimizer, **crew)
    monkeypatch.setattr(learning, "take", take)
    assert command(game, tmp_path, *flags, "--run", "killed").returncode == 130
    monkeypatch.undo()
    killed = tmp_path / "runs" / "killed"
    weights = load_file(killed / "checkpoint.safetensors")
    size = llama.load(HALF)[0].config.adapter_size(2, TARGETS)
    assert sum(w.numel() for name, w in weights.items() if name.startswith("weight.")) == size
    assert command(game, tmp_path, "--resume", str(killed)).returncode == 0
    last = "model" if game is selfplay else "iteration-1"
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        both = [tmp_path / "runs" / run / last / file for run in ("whole", "killed")]
        assert both[0].read_bytes() == both[1].read_bytes()
    adapter = load_file(both[0])
    assert max(w.abs().max() for name, w in adapter.items() if "lora_B" in name) > 0
    rows = [read_lines(tmp_path / "runs" / run / "metrics.jsonl") for run in ("whole", "killed")]
    assert [[{**row, "seconds": 0} for row in one] for one in rows][0] == [
        {**row, "seconds": 0} for row in rows[1]]


def test_the_rate_is_ten_times_that_of_full_training(tmp_path):
    """Schulman et al., 2025. A rate of one's own stays as it is."""
    assert selfplay.parse_args(["--lora", "4"]).lr == pytest.approx(10 * selfplay.parse_args([]).lr)
    assert selfplay.parse_args(["--lora", "4", "--lr", "0.5"]).lr == 0.5
    assert spin.parse_args(["--lora", "4"]).lr == pytest.approx(
        [10 * lr for lr in spin.parse_args([]).lr])


def test_a_run_does_not_go_on_with_other_adapters(tmp_path, monkeypatch):
    """The checkpoint knows what it was played with."""
    def stop(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(selfplay.evaluate, "compare", stop)
    command(selfplay, tmp_path, "--lora", "2", *SMALL[selfplay], "--run", "a")
    path = tmp_path / "runs" / "a" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora": 3}))
    done = command(selfplay, tmp_path, "--resume", "runs/a")
    assert done.returncode == 2 and "of a run with other settings" in done.stderr
