"""A few hundred broken files for every reader; `python tests/fuzz.py` breaks a hundred thousand."""
import json
import time

import fuzz
import pytest
from conftest import ROOT

import evaluate
import model as llama


def test_no_broken_file_is_more_than_one_line():
    counts, failures = fuzz.fuzz(60 * len(fuzz.READERS), seed=1)
    assert failures == []
    assert all(c["refused"] > 0 for c in counts.values()) and sum(c["taken"] for c in counts.values()) > 0


def test_the_fuzzer_sees_a_reader_that_hangs(monkeypatch):
    """Though the reader makes a refusal of every Exception."""
    def hangs(folder):
        try:
            time.sleep(5)
        except Exception as error:  # as the readers of this project do with what libraries raise
            raise llama.UserError("refused") from error
    first = next(iter(fuzz.READERS))
    monkeypatch.setitem(fuzz.READERS, first, hangs)
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    counts, failures = fuzz.fuzz(1, seed=0)
    assert counts[first]["failed"] == 1 and "more than 0.1 seconds" in failures[0]


TEMPLATES = {"hangs": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
             "floods": "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endfor %}",
             "reaches out": "{{ messages.__class__.__mro__ }}", "deep": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
             "no text": "\ud800 {{ messages }}"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template(name, tmp_path, monkeypatch):
    """Limited in time and in output, in a sandbox."""
    monkeypatch.setattr(llama, "TEMPLATE_SECONDS", 0.5)
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "tiny" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES[name]}))
    says = {"hangs": "took longer", "floods": "took longer|without end", "reaches out": "unsafe|access", "deep": "does not compile", "no text": "cannot take"}[name]
    with pytest.raises(llama.UserError, match=says):
        llama.Tokenizer(tmp_path).chat([{"role": "user", "content": "hello"}])


def test_time_limits_nest():
    """The inner limit's end does not lift the outer one; a sooner outer one cuts a later inner one off; nobody swallows it."""
    with pytest.raises(llama.UserError, match="outer"), llama.time_limit(0.2, "outer"), llama.time_limit(5, "inner"):
        time.sleep(5)
    with pytest.raises(llama.UserError, match="outer"), llama.time_limit(0.2, "outer"):
        for _ in range(50):
            try:
                time.sleep(0.1)
            except Exception:  # as a reward of somebody's own might: it must not swallow the limit
                pass
    with pytest.raises(llama.UserError, match="again"), llama.time_limit(0.1, "again"):
        try:
            time.sleep(5)
        except BaseException:  # the worst that somebody's code can do: the limit comes back a second later
            pass
        time.sleep(5)
    with pytest.raises(llama.UserError, match="outer"), llama.time_limit(0.3, "outer"):
        with llama.time_limit(5, "inner"):
            pass
        time.sleep(5)
    with pytest.raises(llama.UserError, match="inner"), llama.time_limit(5, "outer"), llama.time_limit(0.1, "inner"):
        time.sleep(5)
    time.sleep(0.05)  # nothing is left ticking


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a\\ud800", "answer": "b"}\n' * 2)
    with pytest.raises(llama.UserError, match="line 1: half of a surrogate"):
        evaluate.read_data(tmp_path / "data.jsonl")
