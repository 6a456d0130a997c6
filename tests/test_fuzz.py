"""A few hundred broken files for every reader. `python tests/fuzz.py` breaks a hundred thousand."""
import json
import time

import fuzz
import pytest
from conftest import ROOT

from support import console, text


def test_no_broken_file_is_more_than_one_line():
    counts, failures = fuzz.fuzz(60 * len(fuzz.READERS), seed=1)
    assert failures == []
    answers = counts.pop("answer.txt")  # any text at all is an answer, if not a right one
    assert all(c["refused"] > 0 for c in counts.values()) and answers["taken"] == answers["inputs"]
    assert sum(c["taken"] for c in counts.values()) > 0


def test_the_fuzzer_sees_a_reader_that_hangs(monkeypatch):
    """The fuzzer notices it although the reader turns every Exception into a refusal."""
    def hangs(folder):
        try:
            time.sleep(5)
        except Exception as error:  # the project's readers do this when a library fails
            raise console.UserError("refused") from error
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
    monkeypatch.setattr(text, "TEMPLATE_SECONDS", 0.5)
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "tiny" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(console.UserError, match=says):
        text.Tokenizer(tmp_path).chat([{"role": "user", "content": "hello"}])
