"""Folders as others write them: each is read as transformers reads it, or refused in one line.

A row of the tables changes a copy of the embedded default's folder, in one of the ways in which the
files of a folder can disagree, or say a thing elsewhere.
"""
import json
from datetime import datetime

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from model import load, save
from support.console import UserError

NOW = datetime(2024, 7, 26, 10)
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def change(name, **changes):
    """Other settings in a JSON file of the folder; ... takes one out."""
    def alter(folder):
        path = folder / name
        raw = (json.loads(path.read_text()) if path.is_file() else {}) | changes
        kept = {key: value for key, value in raw.items() if value is not ...}
        path.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    return alter


def config(**changes):
    return change("config.json", **changes)


def ends(**changes):
    return change("generation_config.json", **changes)


def settings(**changes):
    return change("tokenizer_config.json", **changes)


def mapped(**changes):
    """The names stand in special_tokens_map.json alone."""
    return both(settings(**dict.fromkeys(NAMES, ...)), change("special_tokens_map.json", **changes))


def template(old, new):
    """Replace a piece of the chat template."""
    def alter(folder):
        text = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        assert old in text
        settings(chat_template=text.replace(old, new))(folder)
    return alter


def template_file(text):
    def alter(folder):
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return alter


def tokens(edit):
    """Another tokenizer.json. edit: changes its dict in place."""
    def alter(folder):
        raw = json.loads((folder / "tokenizer.json").read_text())
        edit(raw)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    return alter


def end_is_plain(raw):
    for token in raw["added_tokens"]:
        token["special"] &= token["content"] != "<|end|>"


def end_is_not_added(raw):
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<|end|>"]


def last_id_is(i):
    def edit(raw):
        vocab = raw["model"]["vocab"]
        vocab[max(vocab, key=vocab.get)] = i
    return tokens(edit)


def weights(edit):
    """Other weights. edit: changes their dict in place."""
    def alter(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return alter


def head(factor):
    """An output matrix in the file: so many times the embedding."""
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    return weights(edit)


def rows(count):
    """A longer embedding than the tokenizer needs, as many published models have."""
    def edit(tensors):
        old = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([old, old[:count - len(old)]])
    return both(weights(edit), config(vocab_size=count))


def both(*alters):
    def alter(folder):
        for one in alters:
            one(folder)
    return alter


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False} | flags


PLAIN = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + "
         "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

SAME = {
    "as it is": both(),
    # The output matrix.
    "tied, and the same head": head(1.0),
    "the base of the rotary positions in rope_scaling": config(
        rope_scaling={"rope_type": "default", "rope_theta": 555.0}),
    "two bases": config(rope_theta=555.0, rope_parameters={"rope_type": "default",
                                                           "rope_theta": 5555.0}),
    "tied, and another head": head(-0.5),
    "untied, and a head": both(head(-0.5), config(tie_word_embeddings=False)),
    "untied, and the same head": both(head(1.0), config(tie_word_embeddings=False)),
    # Names of special tokens.
    "names in the map alone": mapped(bos_token="<|begin|>", eos_token="<|end|>"),
    "names in the map, as objects": mapped(bos_token=token("<|begin|>")),
    "another name in the map": change("special_tokens_map.json", bos_token="<|pad|>"),
    "no name in the map": change("special_tokens_map.json", bos_token=None),
    "a map beside listed tokens is not read": both(
        mapped(bos_token="<|begin|>"), settings(added_tokens_decoder={"3": token("<|end|>")})),
    "names as typed objects": settings(bos_token=token("<|begin|>", __type="AddedToken")),
    "an empty name": settings(bos_token=""),
    "no name, and the template asks": both(
        settings(bos_token=...), template("{{ bos_token }}", "{{ bos_token is defined }}")),
    "more names": both(settings(cls_token="<|system|>", my_token="<|pad|>"),
                       template("{{ bos_token }}", "{{ cls_token + my_token }}")),
    "more names, as a dict": both(settings(extra_special_tokens={"my_token": "<|pad|>"}),
                                  template("{{ bos_token }}", "{{ my_token }}")),
    # What is special.
    "the end is plain in tokenizer.json, and named": tokens(end_is_plain),
    "the end is plain everywhere": both(tokens(end_is_plain), settings(eos_token=...)),
    "the end is special in a list alone": both(
        tokens(end_is_plain),
        settings(eos_token=..., added_tokens_decoder={"3": token("<|end|>", special=True)})),
    "the end is plain in a list alone": settings(
        eos_token=..., added_tokens_decoder={"3": token("<|end|>", special=False)}),
    "the end is no added token, but named": tokens(end_is_not_added),
    "the end is no added token, and not named": both(
        tokens(end_is_not_added), settings(eos_token=...)),
    "the end is no added token, but listed": both(
        tokens(end_is_not_added),
        settings(eos_token=..., added_tokens_decoder={"3": token("<|end|>", special=True)})),
    "an end that is plain stays plain if it is an extra": both(
        tokens(end_is_plain), settings(eos_token=..., additional_special_tokens=["<|end|>"])),
    "the end is an extra special token": both(
        tokens(end_is_not_added), settings(eos_token=..., additional_special_tokens=["<|end|>"])),
    "the end is an extra special token, in the map": both(
        tokens(end_is_not_added), settings(eos_token=...),
        change("special_tokens_map.json", extra_special_tokens=[token("<|end|>")])),
    # Tokens and rows.
    "room for more tokens": rows(160),
    "new tokens in a list, in the order of their ids": both(rows(160), settings(
        added_tokens_decoder={"150": token("<x>", special=True), "145": token("Add")})),
    "new tokens in added_tokens.json": both(
        rows(160), change("added_tokens.json", **{"<x>": 150, "<|pad|>": 1, "Add": 140})),
    "a new pad token": both(rows(160), settings(pad_token="<pad>")),
    "a new pad token that nobody writes, and no room": settings(pad_token="<pad>"),
    "a new extra token": both(rows(160), settings(extra_special_tokens=["<x>"])),
    "ids with a gap, and room": both(rows(160), last_id_is(150)),
    "a tokenizer that cuts and pads": tokens(lambda raw: raw.update(
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None,
                 "pad_id": 1, "pad_type_id": 0, "pad_token": "<|pad|>"})),
    # Templates.
    "a template in a file": template_file(PLAIN.replace("'<|end|>'", "'!<|end|>'")),
    "a template that is not ASCII": template_file(PLAIN.replace("'<|end|>'", "'ö<|end|>'")),
    "not ASCII in tokenizer_config.json": template("'<|end|>'", "'ö<|end|>'"),
    "several templates": settings(chat_template=[
        {"name": "default", "template": PLAIN}, {"name": "tool_use", "template": "x"}]),
    "a template that opens a thought": template("'<|assistant|>'", "'<|assistant|><think>\\n'"),
    "a template that leaves thoughts out": template(
        "m['content']", "m['content'].split('</think>')[-1]"),
    "a template with a date": template("{{ bos_token }}", "{{ strftime_now('%d %b %Y') }}"),
    "a template with a date of its own": template(
        "{{ bos_token }}", "{% if not date_string is defined %}{% set date_string = '26' %}"
        "{% endif %}{{ date_string }}"),
    "a template with the tag for training": template(
        "{% for m", "{% generation %}{{ eos_token }}{% endgeneration %}{% for m"),
    "a template that writes JSON": template(
        "{{ bos_token }}", "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}"),
    # Ends.
    "ends in generation_config.json alone": both(
        config(eos_token_id=...), ends(eos_token_id=[3, 1])),
    "one end, not in a list": ends(eos_token_id=3),
    "generation_config.json names another end": ends(eos_token_id=1),
    "config.json names another end": config(eos_token_id=1),
    "no end but the template's": both(
        config(eos_token_id=...), ends(eos_token_id=...), settings(eos_token=...)),
}

REFUSED = {
    "a head of another shape": (
        weights(lambda t: t.update({"lm_head.weight": t["model.norm.weight"][None].clone()})),
        "lm_head.weight is"),
    "a head alone": (
        weights(lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})),
        "lack model.embed_tokens.weight"),
    "untied without a head": (config(tie_word_embeddings=False), "lack lm_head.weight"),
    "a token beyond the embedding that the template writes": (
        both(settings(pad_token="<pad>", eos_token="<|end|>"), template("'<|end|>'", "pad_token")),
        "may write '<pad>'"),
    "a plain token beyond the embedding": (
        settings(added_tokens_decoder={"139": token("<x>", special=False)}), "may write '<x>'"),
    "ids with a gap beyond the embedding": (last_id_is(139), "does not have: it has 139 ids"),
    "listed tokens that are none": (settings(added_tokens_decoder=[1]), "not readable"),
    "extra tokens that are none": (settings(extra_special_tokens=[[1]]), "not readable"),
    "a map that is none": (
        lambda folder: (folder / "special_tokens_map.json").write_text("[]"), "not readable"),
    "no end": (both(config(eos_token_id=...), ends(eos_token_id=...), settings(eos_token=...),
                    template("<|end|>", "")), "no end token"),
    "an end beyond the embedding": (ends(eos_token_id=139), "not an id of the vocabulary"),
}

USER = {"role": "user", "content": 'Take "abd", reverse it.'}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Add "}, USER],
    [USER, {"role": "assistant", "content": "<think>ab</think>dba"}, USER],
    [{"role": "user", "content": "Caf\u00e9 <b>12</b> \n\n  x "}],
]
IDS = [[111, 3], [2, 5, 108, 109, 3, 6, 111, 3, 1], list(range(139)), [138, 0, 3, 3]]


@pytest.fixture(autouse=True)
def the_same_moment(transformers, monkeypatch):
    """transformers' templates read the clock themselves."""
    class Moment(datetime):
        @classmethod
        def now(cls):
            return NOW
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Moment)


def assert_same(folder, transformers, read=None):
    """Our reading of a folder and transformers' are one. read: the folder that transformers reads.

    Returns our model and theirs.
    """
    model, tokenizer = load(folder, date=NOW.isoformat())
    peer = transformers.AutoTokenizer.from_pretrained(read or folder)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            theirs = peer.apply_chat_template(messages, add_generation_prompt=prompt,
                                              return_dict=False)
            assert tokenizer.chat(messages, prompt) == list(theirs)
    for ids in IDS:
        assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    lm = transformers.AutoModelForCausalLM.from_pretrained(read or folder)
    ids = torch.tensor([tokenizer.chat(CONVERSATIONS[1])[:40]])
    with torch.no_grad():
        assert (model.logits(ids) - lm(ids).logits).abs().max() < 1e-4
    theirs = lm.generation_config.eos_token_id
    theirs = theirs if isinstance(theirs, list) else [theirs]
    assert {i for i in theirs if i is not None} <= model.end_ids
    return model, lm


@pytest.mark.parametrize("name", SAME)
def test_a_folder_is_read_as_transformers_reads_it(name, folder, tmp_path, transformers, capsys):
    """And so is what is saved of it. There transformers stops wherever we do."""
    SAME[name](folder)
    model, _ = assert_same(folder, transformers)
    save(model, tmp_path / "saved")
    capsys.readouterr()
    again, lm = assert_same(tmp_path / "saved", transformers)
    ends = lm.generation_config.eos_token_id
    assert again.end_ids == model.end_ids == set(ends if isinstance(ends, list) else [ends])
    assert "ends an answer" not in capsys.readouterr().err
    assert torch.equal(again.head, model.head)


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_read_is_one_line(name, folder):
    alter, message = REFUSED[name]
    alter(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_does_no_harm(folder, transformers):
    """transformers cannot read such files. They say what they would say without the mark."""
    template_file(PLAIN)(folder)
    for path in [*folder.glob("*.json"), folder / "chat_template.jinja"]:
        if path.name != "tokenizer.json":  # the tokenizers library reads it
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_same(folder, transformers, ROOT / "tiny")
