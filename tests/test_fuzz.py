"""A few hundred broken files for every reader. `python tests/fuzz.py` breaks a hundred thousand."""
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
    assert all(c["refused"] > 0 for c in counts.values())
    assert sum(c["taken"] for c in counts.values()) > 0


def test_the_fuzzer_sees_a_reader_that_hangs(monkeypatch):
    """The fuzzer notices it although the reader turns every Exception into a refusal."""
    def hangs(folder):
        try:
            time.sleep(5)
        except Exception as error:  # the project's readers do this when a library fails
            raise llama.UserError("refused") from error
    first = next(iter(fuzz.READERS))
    monkeypatch.setitem(fuzz.READERS, first, hangs)
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    counts, failures = fuzz.fuzz(1, seed=0)
    assert counts[first]["failed"] == 1
    assert "more than 0.1 seconds" in failures[0]


LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
TEMPLATES = {  # name: template, and what the refusal says
    "hangs": (LOOP + LOOP + END + END, "took longer"),
    "floods": (LOOP + LOOP + "{{ 'x' * 99999 }}" + END + END, "took longer|without end"),
    "reaches out": ("{{ messages.__class__.__mro__ }}", "unsafe|access"),
    "deep": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "does not compile"),
    "no text": ("\ud800 {{ messages }}", "cannot take"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template(name, tmp_path, monkeypatch):
    """A template runs in a sandbox, with a limit on its time and its output."""
    template, says = TEMPLATES[name]
    monkeypatch.setattr(llama, "TEMPLATE_SECONDS", 0.5)
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "tiny" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(llama.UserError, match=says):
        llama.Tokenizer(tmp_path).chat([{"role": "user", "content": "hello"}])


def test_time_limits_nest():
    """The end of an inner limit does not lift the outer one, and the earlier of two limits counts.

    Code inside the block cannot swallow a limit.
    """
    limited = llama.time_limit
    with pytest.raises(llama.UserError, match="outer"), limited(0.2, "outer"), limited(5, "inner"):
        time.sleep(5)
    with pytest.raises(llama.UserError, match="outer"), limited(0.2, "outer"):
        for _ in range(50):
            try:
                time.sleep(0.1)
            except Exception:  # a user's own reward may do this: the limit must still work
                pass
    with pytest.raises(llama.UserError, match="again"), limited(0.1, "again"):
        try:
            time.sleep(5)
        except BaseException:  # the worst that a user's code can do: the limit comes back later
            pass
        time.sleep(5)
    with pytest.raises(llama.UserError, match="outer"), limited(0.3, "outer"):
        with limited(5, "inner"):
            pass
        time.sleep(5)
    with pytest.raises(llama.UserError, match="inner"), limited(5, "outer"), limited(0.1, "inner"):
        time.sleep(5)
    time.sleep(0.05)  # no limit is left running


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a\\ud800", "answer": "b"}\n' * 2)
    with pytest.raises(llama.UserError, match="line 1: half of a surrogate"):
        evaluate.read_data(tmp_path / "data.jsonl")
