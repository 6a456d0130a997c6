"""What the README says that bad input says."""
import re

import pytest
import torch
from conftest import ROOT, command

import evaluate
import model as llama
import selfplay
import spin

TABLE = re.search(r"What bad input says.*?\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[1]
LINES = [re.fullmatch(r"    python (\w+)\.py (.*?)  +(.*)", line).groups() for line in TABLE.splitlines()]


@pytest.mark.parametrize("module, flags, says", LINES, ids=[flags for _, flags, _ in LINES])
def test_bad_input_says_what_the_readme_says(module, flags, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(llama, "free_memory", lambda device: 22.4 * 2**30)  # the README's machine, also where nobody can tell
    there = lambda: sorted([*ROOT.iterdir(), *(ROOT / "runs").glob("*")])
    before = there()
    done = command({"selfplay": selfplay, "spin": spin, "evaluate": evaluate}[module], ROOT, *flags.split())
    assert done.returncode == 2 and f"error: {says}" in done.stderr.splitlines()[-1]
    assert there() == before
