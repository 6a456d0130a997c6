"""What the README quotes: what bad input says, and lines of the code."""
import inspect
import re

import pytest
import torch
from conftest import ROOT, command

import evaluate
import model as llama
import rewards
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


def test_the_lines_of_the_course_are_lines_of_the_code():
    """Each row of the course's table of equations quotes the line that computes it."""
    table = (ROOT / "README.md").read_text().split("| what | equation | line | here |")[1].split("\n\n")[0]
    quoted = re.findall(r"\| `([^`]*)` in `(\w+)\.(\w+)` \|", table)
    assert len(quoted) == table.count("\n") - 1  # one a row, below the line under the heading
    for line, module, name in quoted:
        thing = getattr({"selfplay": selfplay, "rewards": rewards}[module], name)
        source = inspect.getsource(thing) if callable(thing) else (ROOT / f"{module}.py").read_text().split(f"\n{name} = ")[1].split("\n\n")[0]
        assert line in source, f"{module}.{name} has no such line: {line}"
