"""Files: bad folders, hub names, and the data that people bring."""
import json
import locale
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from model import load, read_config, save
from support import files
from support.console import UserError

# --------------------------------------------------------------------------------------------------
# Model folders

def test_sharded_index(folder, tiny):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, part in shards.items():
        save_file({n: tensors[n] for n in part}, folder / shard)
    index = {"weight_map": {n: s for s, part in shards.items() for n in part}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = load(folder)
    for a, b in zip(model.parameters(), tiny[0].parameters()):
        assert torch.equal(a, b)
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors is missing"):
        load(folder)


@pytest.mark.parametrize("weight_map, message", [
    (["a.safetensors"], "no weight_map"),
    ({"norm": 3}, "no weight_map"),
    ({"norm": "../copy/other.safetensors"}, "other.safetensors is missing"),  # never outside
])
def test_bad_index_is_one_line(folder, weight_map, message):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def spoil_config(**changes):
    def spoil(folder):
        raw = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in raw.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
    return spoil


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda f: (f / "tokenizer.json").write_text("[]"), "not a tokenizer"),
    (cut_weights, "cut short"),
    (spoil_config(model_type="gpt2"), "'gpt2' is not supported"),
    (spoil_config(model_type="qwen2"),
     "the weights lack model.layers.0.self_attn.q_proj.bias"),
    (spoil_config(model_type="mistral", sliding_window=0), "look at sliding_window"),
    (spoil_config(hidden_act="gelu"), "hidden_act"),
    (spoil_config(rope_scaling={"rope_type": "yarn"}), "yarn"),
    (lambda f: (f / "config.json").write_text("[]"), "an object was expected"),
    (spoil_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
     "lacks 'low_freq_factor'"),
    (spoil_config(hidden_size=...), "lacks 'hidden_size'"),
    (spoil_config(hidden_size="wide"), "sizes do not fit"),
    (spoil_config(num_attention_heads=0), "look at num_attention_heads"),
    (spoil_config(rope_theta="far"), "usable number"),
    (spoil_config(architectures=2.5), "usable number"),
    (spoil_config(rope_scaling="x"), "not an object"),
    (spoil_config(num_key_value_heads=3), "do not fit"),
    (spoil_config(intermediate_size=200), "config.json asks for"),
    (spoil_config(num_hidden_layers=5), "the weights lack model.layers.4"),
    (spoil_config(num_hidden_layers=3), "no Llama has"),
])
def test_bad_folder_is_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_huge_file_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE", 100)
    with pytest.raises(UserError, match="config.json: not readable as JSON .the file is too large"):
        load(folder)


def stacked(tensors, shape=(3, 2)):
    """files.stack of a joined tensor and a single one."""
    names = {"qk": {"q": 2, "k": 1}, "score_head.weight": {"score.weight": None}}
    return files.stack("here", tensors, names, {"qk": shape, "score_head.weight": (1, 2)})


def test_stacking_by_hand():
    """Tensors that we join stand below each other. What is not asked for has to be known."""
    q, k = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6]])
    score = torch.tensor([[7.0, 8]])
    whole = {"q": q, "k": k, "score.weight": score}
    known = {"lm_head.weight": score, "model.layers.0.self_attn.rotary_emb.inv_freq": k}
    weights = stacked(whole | known)
    assert weights["qk"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert weights["score_head.weight"] is score and len(weights) == 2
    for tensors, message in (
        ({"q": q, "score.weight": score}, "here: the weights lack k"),
        (whole | {"x": k}, "here: weights that no Llama has: x$"),
        (whole | {"x": k, "y": k}, "no Llama has: x and 1 more$"),
        (whole | {"score.weight": q}, r"score.weight is \[2, 2\], a reward model has one label"),
    ):
        with pytest.raises(UserError, match=message):
            stacked(tensors)
    with pytest.raises(UserError, match=r"q \+ k is \[3, 2\], config.json asks for \[4, 2\]"):
        stacked(whole, (4, 2))


def test_where_the_end_tokens_are_read_from(tmp_path):
    """generation_config.json comes first, then config.json, then the tokenizer's own."""
    tokenizer = SimpleNamespace(special={"</s>": 7}, names={"eos_token": "</s>"},
                                beyond=lambda vocabulary: ["x"] * (vocabulary < 10))

    def read(generation, raw, vocabulary=10):
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return files.end_ids(tmp_path, raw, tokenizer, vocabulary)
    assert read({"eos_token_id": [3, 4]}, {"eos_token_id": 5}) == {3, 4}
    assert read({}, {"eos_token_id": 5}) == {5}
    assert read({}, {}) == {7}
    del tokenizer.names["eos_token"]
    assert read({}, {}) == set()
    for bad in (10, -1, "3", [3, 2.0], True):
        with pytest.raises(UserError, match="not an id of the vocabulary"):
            read({"eos_token_id": bad}, {})
    with pytest.raises(UserError, match="may write 'x', whose id the model does not have"):
        read({}, {"eos_token_id": 5}, 9)


def test_a_model_without_an_end_token_is_refused(folder):
    """Nothing would end its answers."""
    (folder / "generation_config.json").unlink()
    spoil_config(eos_token_id=None)(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(folder)[0].end_ids == {3}  # the one that the template writes is known
    settings["chat_template"] = settings["chat_template"].replace("<|end|>", "")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no end token: give eos_token_id"):
        load(folder)


def test_a_saved_tokenizer_is_read_by_transformers_as_by_us(folder, tmp_path):
    """transformers 5 builds some classes anew and ignores a part of tokenizer.json."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name, kept in (("LlamaTokenizer", "PreTrainedTokenizerFast"), ("Other", "Other")):
        changed = settings | {"tokenizer_class": name}
        (folder / "tokenizer_config.json").write_text(json.dumps(changed))
        save(load(folder)[0], tmp_path / name)
        saved = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert saved == settings | {"tokenizer_class": kept}


def test_the_switches_of_the_template_are_told_to_who_opens_the_model(folder, tmp_path):
    save(load(folder, variables={"enable_thinking": False})[0], tmp_path / "a")
    assert '{"enable_thinking": false}' in (tmp_path / "a" / "README.md").read_text()
    save(load(folder)[0], tmp_path / "b")
    assert not (tmp_path / "b" / "README.md").exists()


def test_saved_weights_are_read_by_whom_the_settings_are(folder, tmp_path):
    save(load(folder)[0], tmp_path / "a")
    modes = {(tmp_path / "a" / name).stat().st_mode
             for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_ids_may_have_gaps(folder):
    """The largest id counts, not how many there are."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = 139  # 138 is no token now: there still are 139
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="whose id the model does not have: it has 139 ids"):
        load(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_is_read_as_utf_8(tmp_path, encoding):
    """Whatever the machine's own encoding is, and with or without a byte order mark."""
    (tmp_path / "a.json").write_bytes('{"é": 1}'.encode(encoding))
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")  # ASCII
        assert files.read_json(tmp_path / "a.json") == {"é": 1}
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def test_weights_are_written_last(tmp_path, folder, monkeypatch):
    """A model.safetensors that is there is whole, whenever the writing stops."""
    new, weights = tmp_path / "new", {"w": torch.ones(2)}

    def no_room(tensors, path, **_):
        Path(path).write_bytes(b"the beginning")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", no_room)
        with pytest.raises(UserError, match="new cannot be written .*No space left"):
            files.write_folder(new, {"a": 1}, weights, copy_from=folder)
    assert not list(new.glob("model.safetensors*"))  # what is half written takes up no room
    files.write_folder(new, {"a": 1}, weights, copy_from=folder)
    assert {path.name for path in new.iterdir()} == {path.name for path in folder.iterdir()}
    assert json.loads((new / "config.json").read_text()) == {"a": 1}
    assert torch.equal(load_file(new / "model.safetensors")["w"], weights["w"])
    files.write_folder(new, {"a": 2}, weights, copy_from=new)  # a folder may be its own source
    assert json.loads((new / "config.json").read_text()) == {"a": 2}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        files.write_folder(tmp_path / "file", {}, weights, copy_from=folder)


# --------------------------------------------------------------------------------------------------
# The hub

@pytest.mark.parametrize("name, is_one", [
    ("org/model", True), ("org/model-1.0_b", True), ("org/model@v1", True),
    ("org/model@refs/pr/1", True), ("org/new", True),
    ("model", False), ("org/model/more", False), ("/org/model", False), ("org/a model", False),
    ("org/model@", False), ("./model", False), ("../model", False), ("here/model", False),
    ("here/new", False),
])
def test_what_is_a_hub_name(tmp_path, monkeypatch, name, is_one):
    """What could be a path here is none: a mistyped folder must not be looked up elsewhere."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert files.is_hub_name(name) == is_one


@pytest.mark.parametrize("name, revision", [("org/model", None), ("org/model@v1", "v1")])
def test_a_name_may_hold_a_revision(monkeypatch, name, revision):
    asked = []

    def snapshot_download(*names, **settings):
        asked.append((*names, settings["revision"], settings["allow_patterns"]))
        return str(ROOT / "tiny")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load(name)[0].folder == ROOT / "tiny"
    patterns = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
    assert asked == [("org/model", revision, patterns)]
    read_config(name)  # weights are not fetched where the settings are enough
    assert asked[1:] == [("org/model", revision, ["config.json"])]


def test_nothing_is_fetched_for_what_is_no_hub_name(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        load(tmp_path / "missing")


def test_hub_offline_says_how_to_go_on(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="name a local folder"):
        load("nobody/nothing")


def test_a_name_that_the_hub_does_not_allow_is_one_line():
    with pytest.raises(UserError, match="the hub does not allow such a name"):
        load("org/my--model")
